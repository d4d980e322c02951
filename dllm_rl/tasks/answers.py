"""Scanners that find an answer in a completion. Each is linear in its length, whatever the text, and none raises."""

import re
from fractions import Fraction

# An answer, box or expression longer than this is treated as none: no answer of these tasks comes near.
LONGEST = 10_000

_ENDS = ("</answer>", "<|eot_id|>", "<|endoftext|>")
# An opened box up to its first digit. Neither pattern runs on into the next opening, so no text is scanned twice.
_BOX_IN_LINE = re.compile(r"\\boxed\{(?:[^}\n\\\d]++|\\++(?!boxed\{))*+\d")
_BOX = re.compile(r"\\boxed\{(?:[^}\\\d]++|\\++(?!boxed\{))*+\d")
_UNCLOSED = 10_000  # boxes without an end after which the search for one is given up
_NUMBER = re.compile(r"-?\d+\.?\d*")
_PLAIN = re.compile(r"([+-]?)\$?([+-]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)


def last_answer(text: str) -> str | None:
    """What stands after the last `<answer>`, up to its end tag, a special token or the end; None without `<answer>`."""
    start = text.rfind("<answer>")
    if start < 0:
        return None
    start += len("<answer>")
    return text[start : _first(text, _ENDS, start, default=len(text))]


def first_closed_answer(text: str) -> str | None:
    """Between the first `<answer>` and the first `</answer>` after it; None when either is missing."""
    start = text.find("<answer>")
    end = text.find("</answer>", start + len("<answer>"))
    return text[start + len("<answer>") : end] if 0 <= start < end else None


def last_closed_answer(text: str) -> str | None:
    """The last of the non-overlapping `<answer>...</answer>` pairs, read from the left; None without one."""
    for piece in reversed(text.split("</answer>")[:-1]):
        start = piece.find("<answer>")
        if start >= 0:
            return piece[start + len("<answer>") :]
    return None


def last_box(text: str, *, names: tuple[str, ...] = ("\\boxed", "\\fbox")) -> str | None:
    """The content of the last `\\boxed{...}`, or failing that of the last `\\fbox{...}`, with balanced braces."""
    for name in names:
        start = text.rfind(name + "{")
        if start >= 0:
            return _balanced(text, start + len(name) + 1)
    return None


def final_answer(text: str) -> str | None:
    """The strict reading: the last box inside the last `<answer>` block, else the block, else the text's last box."""
    block = last_answer(text)
    box = last_box(text if block is None else block)
    found = block if box is None else box
    return None if found is None or len(found) > LONGEST else found.strip()


def first_boxed_number(text: str) -> float | None:
    """The first `\\boxed{...}`, up to its first closing brace, with a digit: as a float, else its first number.

    Boxes within one line come first; only without any are those read that a line break cuts.
    """
    for pattern, border in ((_BOX_IN_LINE, "\n"), (_BOX, "")):
        start = 0
        for _ in range(_UNCLOSED):
            found = pattern.search(text, start)
            if found is None:
                break
            end = text.find(border, found.end()) if border else -1
            end = len(text) if end < 0 else end
            closing = text.find("}", found.end(), end)
            if closing >= 0 and closing - found.start() <= LONGEST:
                return _number(text[found.start() + len("\\boxed{") : closing], last=False)
            start = end if closing < 0 else closing
    return None


def last_number(text: str) -> float | None:
    """The text as a float, else its last number; None when there is none or the text is too long."""
    return _number(text, last=True)


def exact_number(text: str) -> Fraction | None:
    """The text as one decimal number: a sign, a dollar sign, commas between thousands and a final point may stand."""
    if len(text) > LONGEST:
        return None
    text = text.strip().replace("\\$", "$").removesuffix(".")
    found = _PLAIN.fullmatch(text) if len(text) <= 100 else None
    if not found or (found[1] and found[2]):
        return None
    value = Fraction(found[3].replace(",", ""))
    return -value if "-" in found[1] + found[2] else value


def standalone_digits(text: str, count: int) -> str | None:
    """The first run of exactly `count` digits that touches no letter, digit or underscore."""
    found = re.search(rf"(?<!\w)\d{{{count}}}(?!\w)", text)
    return found[0] if found else None


def until_special(text: str, start: int) -> str:
    """The text from `start` up to the first `<|eot_id|>` or `<|endoftext|>`, or to the end."""
    return text[start : _first(text, _ENDS[1:], start, default=len(text))]


def until_end(text: str, start: int) -> str | None:
    """The text from `start` up to the first special token or `</answer>`; None when none of them follows."""
    end = _first(text, _ENDS, start, default=-1)
    return None if end < 0 else text[start:end]


def _first(text: str, ends: tuple[str, ...], start: int, *, default: int) -> int:
    return min((at for end in ends if (at := text.find(end, start)) >= 0), default=default)


def _balanced(text: str, start: int) -> str | None:
    depth = 1
    for length, character in enumerate(text[start : start + LONGEST]):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start : start + length]
    return None


def _number(text: str, *, last: bool) -> float | None:
    if len(text) > LONGEST:
        return None
    try:
        return float(text)
    except ValueError:
        numbers = _NUMBER.findall(text)
        return float(numbers[-1 if last else 0]) if numbers else None
