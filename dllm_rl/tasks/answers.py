"""Find the answer in a completion. Every function runs in linear time on any text and never raises."""

import re
from fractions import Fraction

MAX_ANSWER_LENGTH = 10_000  # characters of an answer, box or expression; longer ones are ignored
# d1's parsers have no limits. These limits are far above any completion.
MAX_SEARCH_LENGTH = 100_000  # characters searched for a closing brace or a number
MAX_BOXES = 10_000  # boxes searched for a number

SPECIAL_TOKENS = ("<|eot_id|>", "<|endoftext|>")
_BRACE = re.compile(r"[{}]")
_BOX_END = re.compile(r"[}\n]")
# A box as TeX reads it: white space may come before the brace. Without a brace, the content is a number, or what
# comes before the end of the formula or of the text; other mentions of the command are not boxes. The possessive
# quantifiers (*+) keep the search linear.
_BOX = re.compile(
    r"\\(?P<command>boxed|fbox)(?![a-zA-Z])\s*+(?:(?P<brace>\{)|(?P<bare>[+-]?(?:[0-9]++(?:[.,/][0-9]+)*+|\.[0-9]++)"
    r"(?![\w\\^{/])|(?:[0-9A-Za-z(\[|.+-]|\\[A-Za-z{])[^\s$]{0,200}?(?=\s*+\.?\s*+(?:\$|\\[)\]]|\Z))))"
)
_NUMBER = re.compile(r"-?\d+\.?\d*")
# ASCII characters for typographic minus signs, spaces of other widths and full-width digits.
ASCII_CHARACTERS = dict.fromkeys((*range(0x2010, 0x2014), 0x2212, 0xFE63, 0xFF0D), "-")
ASCII_CHARACTERS |= {0xFF0B: "+", 0xFF0C: ",", 0xFF0E: ".", 0xFF0F: "/", 0x2044: "/"}
ASCII_CHARACTERS |= dict.fromkeys((0xA0, *range(0x2000, 0x200C), 0x202F, 0x205F, 0x2060, 0x3000, 0xFEFF), " ")
ASCII_CHARACTERS |= {0xFF10 + digit: str(digit) for digit in range(10)}
_LATEX_SPACE = re.compile(r"(?<!\\)\\(?:[,;:> ]|\Z)|\\(?:quad|qquad|thinspace|enspace)(?![a-zA-Z])|(?<!\\)~")
_THIN_SPACE = re.compile(r"\\!\s*")  # negative; TeX ignores blanks after the command
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,/^_} ])(?<!\d )(-?\d{1,3}(?: \d{3})+)(?![\d/^_{]| [\d(])")
# Delimiters of mathematics around a whole text, with an optional final point: $...$, $$...$$, \\(...\\), \\[...\\].
_DELIMITED = re.compile(
    r"(\$\$?)(?P<dollars>(?:[^$\\]|\\.)+)\1\.?|\\\((?P<round>(?:(?!\\[()]).)+)\\\)\.?|\\\[(?P<square>(?:(?!\\[\[\]]).)+)\\\]\.?",
    re.DOTALL,
)
_DECIMAL_NUMBER = re.compile(r"([+-]?) ?\$?([+-]?) ?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)


def last_answer(text: str) -> str | None:
    """Return the text after the last `<answer>`, up to `</answer>`, a special token or the end of the text.

    None if there is no `<answer>`.
    """
    start = text.rfind("<answer>")
    if start < 0:
        return None
    return cut(text, start + len("<answer>"))


def first_closed_answer(text: str) -> str | None:
    """Return the text between the first `<answer>` and the next `</answer>`; None if either is missing."""
    start = text.find("<answer>")
    end = text.find("</answer>", start + len("<answer>"))
    return text[start + len("<answer>") : end] if 0 <= start < end else None


def last_closed_answer(text: str) -> str | None:
    """Return the text in the last of the non-overlapping `<answer>...</answer>` pairs; None without a pair."""
    for piece in reversed(text.split("</answer>")[:-1]):  # each piece ends at an end tag
        start = piece.find("<answer>")
        if start >= 0:
            return piece[start + len("<answer>") :]
    return None


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, else of the last `\fbox{...}`, with balanced braces.

    As in TeX, white space may come before the brace, and there may be no brace: `$\boxed 7$` and `$\boxed\frac12$`.
    """
    last: dict[str, re.Match[str]] = {box["command"]: box for box in _BOX.finditer(text)}
    box = last.get("boxed") or last.get("fbox")
    if box is None:
        return None
    return _balanced(text, box.end()) if box["brace"] else box["bare"]


def final_answer(text: str) -> str | None:
    """Return the answer of the strict protocol.

    It is the last box in the last `<answer>` block, or the whole block if it has no box. Without a block, it is the
    last box of the text.
    """
    block = last_answer(text)
    box = last_box(text if block is None else block)  # an answer block takes precedence over a box in the reasoning
    answer = block if box is None else box
    return None if answer is None or len(answer) > MAX_ANSWER_LENGTH else answer.strip()


def without_delimiters(text: str) -> str:
    r"""Return the text, or its last box if it has one, without $...$, \(...\) or \[...\] around all of it."""
    box = last_box(text)
    text = (text if box is None else box).strip()
    while len(text) <= MAX_ANSWER_LENGTH and (match := _DELIMITED.fullmatch(text)):
        text = match[match.lastgroup or 0].strip()
    return text


def d1_box(text: str) -> str | None:
    r"""Return the last `\boxed`, or without one `\fbox`, as d1 reads it.

    The result is None if the box is not closed, and the complete text if it has no box. The content of "\boxed " with a
    space extends to the next dollar sign. Otherwise "\boxed{" and "}" are removed; "\fbox{" stays.
    """
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    start = text.rfind("\\boxed") if "\\boxed" in text else text.rfind("\\fbox")
    if start < 0:
        return text
    depth = 0
    for brace in _BRACE.finditer(text, start, start + MAX_SEARCH_LENGTH):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0 and brace[0] == "}":
            box = text[start : brace.end()]
            return box[len("\\boxed{") : -1] if box.startswith("\\boxed{") else box
    return None


def first_boxed_number(text: str) -> float | None:
    r"""Return the number of the first `\boxed{...}` that has one, as d1 reads it.

    A box extends to the first closing brace and must be in one line. Its number is its text as a float, else the first
    number in it.
    """
    start = text.find("\\boxed{")
    for _ in range(MAX_BOXES):
        end = _BOX_END.search(text, start + len("\\boxed{")) if start >= 0 else None
        if end is None:
            return None
        if end[0] == "}":
            number = number_in(text[start + len("\\boxed{") : end.start()].strip(), 0)
            if number is not None:
                return number
        start = text.find("\\boxed{", end.start())
    return None


def to_plain_characters(text: str) -> str:
    """Replace typographic minus signs, wide and LaTeX spaces and full-width digits by ASCII characters.

    Separators of thousands, as in 1{,}000 and 1 000, are removed or become commas. Other spaces between digits stay:
    3 4 is not 34.
    """
    text = _THIN_SPACE.sub("", text.translate(ASCII_CHARACTERS))
    text = _LATEX_SPACE.sub(" ", text).replace("{,}", ",")
    return _SPACED_THOUSANDS.sub(lambda match: match[1].replace(" ", ""), text)


def exact_number(text: str) -> Fraction | None:
    """Read the text as one decimal number, with optional sign, dollar sign, thousands commas and final point."""
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    text = to_plain_characters(text).strip().replace("\\$", "$").removesuffix(".").rstrip()
    match = _DECIMAL_NUMBER.fullmatch(text) if len(text) <= 100 else None
    if not match or (match[1] and match[2]):  # a sign may be before or after the dollar sign, but not both
        return None
    value = Fraction(match[3].replace(",", ""))
    return -value if "-" in match[1] + match[2] else value


def cut(text: str, start: int, ends: tuple[str, ...] = (*SPECIAL_TOKENS, "</answer>"), *, closed: bool = False) -> str:
    """Return the text from `start` up to the first of `ends`.

    Without any of them, the result is the rest of the text, or "" if `closed`.
    """
    positions = [position for end in ends if (position := text.find(end, start)) >= 0]
    return text[start : min(positions, default=start if closed else len(text))]


def _balanced(text: str, start: int) -> str | None:
    depth = 1
    for length, character in enumerate(text[start : start + MAX_ANSWER_LENGTH]):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start : start + length]
    return None


def number_in(text: str, place: int) -> float | None:
    """Return the text as a float, else its first (place 0) or last (-1) number; None if it has none or is long."""
    if len(text) > MAX_SEARCH_LENGTH:
        return None
    try:
        return float(text)  # also 1e3, inf and nan, as d1 reads them
    except ValueError:
        numbers = _NUMBER.findall(text)
        return float(numbers[place]) if numbers else None
