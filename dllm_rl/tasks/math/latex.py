"""Equality of LaTeX answers, by the string normalization of the MATH data set [paper] or by d1's."""

import re
from fractions import Fraction

from dllm_rl.tasks.answers import MAX_ANSWER_LENGTH, exact_number, to_plain_characters

_REMOVED_FIRST = ("\n", "\\!")  # removed first, because they may be inside the marks below
_REMOVED_MARKS = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")
_DEGREES = re.compile(r"\^\s*+(?:\{\s*+\\circ\s*+\}|\\circ)")  # with or without white space
_SQRT = re.compile(r"\\sqrt([^{])")
_FRAC = re.compile(r"\\frac([^{])(.)")
_FRAC_HEAD = re.compile(r"\A([^{])(.)", re.DOTALL)  # the text after \\frac
_QUOTIENT = re.compile(r"(-?[0-9]+)/(-?[0-9]+)")
_TEXT = r"\\(?:text(?:rm|bf|it|sf|tt|normal)?|math(?:FONTS)|[mh]box)\s*\{([^{}]*)\}"
_UPRIGHT = _TEXT.replace("FONTS", "rm")  # \\mathbf{a} is a vector, no unit
_ANY_TEXT = _TEXT.replace("FONTS", "rm|bf|it|sf")
TEXT = re.compile(_ANY_TEXT)
_JOINT = re.compile(rf"(?:,\s*)?{_ANY_TEXT.replace('([^{}]*)', '[, ~]*(?:and|or)[, ~]*')}(?:\s*,)?")
_RELATION = re.compile(r"[<>\u2264\u2265\u2260\u2208]|\\(?:[lg]eq?|[lg]eqslant|neq?|lt|gt|in)(?![a-zA-Z])")
_UNIT = re.compile(rf"\s*{_UPRIGHT}(?:\^(?:[0-9]|\{{[0-9]\}}))?\.?\s*\Z")
_WORD = re.compile(r"[a-z]+|[^\sa-z.\-/'()]")
# Words that are not units: they change the number before them, or offer a second answer.
_NON_UNIT_TEXT = """
and but either else except from if maybe neither nor not or otherwise perhaps possibly through to unless
until versus vs minus plus times over squared cubed factorial negative positive even odd half zero one two three four
five six seven eight nine ten eleven twelve twenty thirty forty fifty dozen hundred thousand million billion trillion
mod modulo base"""
_NON_UNIT_WORDS = frozenset(_NON_UNIT_TEXT.split())
_NAME = re.compile(r"\A[^=0-9+\-*/ <>!:]{1,2} *=(?=[^=]*\Z)")
_SPACED_ARGUMENTS = re.compile(r"\\frac\s*([0-9])\s*([0-9])(?![0-9])")
_LEADING_POINT = re.compile(r"(?:\A|(?<=[ {]))\.(?=[0-9])")
# All spaces, except between digits, which would become one number.
_REMOVED_SPACE = re.compile(r" +(?![0-9.])|(?<![0-9.]) +")
_PLAIN_FRAC = re.compile(r"(-?)\\frac\{(-?[0-9]{1,100})\}\{(-?[0-9]{1,100})\}")


def normalize(answer: str) -> str:
    r"""Return a canonical spelling. Two answers are equal if their spellings are.

    Removed: \!, \left, \right, degrees, \$, percent signs, one unit "\text{ cm}" at the end, a name of one or two
    letters before a single "=", all spaces except between two digits. Replaced: typographic characters (see
    `to_plain_characters`); "and" and "or" between values become commas (`as_list`); tfrac and dfrac become frac; .5
    becomes 0.5; \sqrt3 becomes \sqrt{3}; \frac12, 1/2 and a complete answer 0.5 become \frac{1}{2}. This differs from
    the original [ours], which removes everything after "\text{ " and all spaces, so that "5 \text{ or } 6" becomes 5
    and "2 2/3" becomes 22/3.
    """
    if len(answer) > MAX_ANSWER_LENGTH:
        return answer
    answer = as_list(to_plain_characters(answer))
    answer = answer.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    answer = _DEGREES.sub(" ", answer)
    for mark in (*_REMOVED_MARKS, "\\%", "%"):
        answer = answer.replace(mark, " ")  # two digits around a mark stay separate
    answer = without_unit(answer)
    answer = _NAME.sub("", _LEADING_POINT.sub("0.", " ".join(answer.split())))
    # Spaces are removed first, so that "\\sqrt 3" is a root; the original turns it into "\\sqrt{}3" [ours].
    answer = _REMOVED_SPACE.sub("", _SPACED_ARGUMENTS.sub(r"\\frac{\1}{\2}", answer))
    answer = _SQRT.sub(r"\\sqrt{\1}", answer)
    answer = _FRAC.sub(lambda match: "\\frac" + _braced(match), answer)
    if answer == "0.5":
        return "\\frac{1}{2}"
    quotient = _QUOTIENT.fullmatch(answer)
    if quotient and all(part == "0" or not part.removeprefix("-").startswith("0") for part in quotient.groups()):
        return f"\\frac{{{quotient[1]}}}{{{quotient[2]}}}"
    return answer


def as_list(answer: str) -> str:
    r"""Return the answer with commas in place of "\text{ and }" and "\text{ or }" between its values.

    So "3 \text{ and } 5" is the list "3, 5", while "5 \text{ or } 6" is a list that does not equal 5. Inequalities stay
    as they are: "and" and "or" between them differ.
    """
    if len(answer) > MAX_ANSWER_LENGTH or _RELATION.search(answer):
        return answer

    def comma(match: re.Match[str]) -> str:
        is_between = answer[: match.start()].strip() and answer[match.end() :].strip(" .")
        return ", " if is_between else match[0]

    return _JOINT.sub(comma, answer)


def without_unit(answer: str) -> str:
    r"""Remove a unit such as "\text{ cm}" that ends the answer, after a number. A unit has no _NON_UNIT_WORDS."""
    start = max(answer.rfind("\\text"), answer.rfind("\\math"), answer.rfind("\\mbox"), answer.rfind("\\hbox"))
    unit = _UNIT.match(answer, start) if start > 0 else None
    number = answer[:start]
    if unit is None or TEXT.search(number) or not re.search(r"[0-9]|\\pi", number) or not _is_unit(unit[1]):
        return answer
    return number.rstrip()


def _is_unit(text: str) -> bool:
    words = _WORD.findall(text.lower())
    if "".join(words) in ("am", "pm", "i", "e"):  # half of a day, and constants
        return False
    return all(word.isalpha() and word not in _NON_UNIT_WORDS for word in words)


def hedged(answer: str, reference: str) -> bool:
    r"""Return whether a text in the answer offers a second answer or has a digit, as "\text{ or 6}" does.

    False if a text in the reference does so, too. Lists of values offer none (`as_list`).
    """

    def has_choice(latex: str) -> bool:
        words = [
            word
            for text in TEXT.findall(latex[:MAX_ANSWER_LENGTH])
            for word in re.findall(r"[a-z]+|[0-9]", text.lower())
        ]
        return any(word in _NON_UNIT_WORDS or word.isdigit() for word in words)

    return has_choice(as_list(answer)) and not has_choice(as_list(reference))


def same_in_d1(answer: str, reference: str) -> bool:
    """Return whether `d1_spelling` is equal for both; False for long answers [ours]."""
    return max(len(answer), len(reference)) <= MAX_ANSWER_LENGTH and d1_spelling(answer) == d1_spelling(reference)


def d1_spelling(answer: str) -> str:
    """Return d1's spelling. If d1's code raises, return a line break, which no spelling contains, and the answer."""
    try:
        return _normalized_in_d1(answer)
    except (IndexError, ValueError):
        return "\n" + answer


def _normalized_in_d1(answer: str) -> str:
    """Normalize with d1's bugs. Raises IndexError or ValueError where d1's code raises them."""
    plain, *units = _without_marks(answer).split("\\text{ ")
    if len(units) > 1:
        raise ValueError(answer)
    answer, *roots = _without_name(plain).split("\\sqrt")
    for root in roots:
        answer += "\\sqrt" + (root if root[0] == "{" else f"{{{root[0]}}}{root[1:]}")
    answer = answer.replace(" ", "")  # after the roots; `normalize` removes spaces before
    first, *fractions = answer.split("\\frac")
    # If one \frac has too few characters, all stay unchanged.
    if all(fraction[0] == "{" or len(fraction) > 1 for fraction in fractions):
        answer = first
        for fraction in fractions:
            answer += "\\frac" + _FRAC_HEAD.sub(_braced, fraction)
    if answer == "0.5":
        return "\\frac{1}{2}"
    if answer.count("/") == 1:
        above, below = map(int, answer.split("/"))
        return f"\\frac{{{above}}}{{{below}}}" if answer == f"{above}/{below}" else answer
    return answer


def _without_marks(answer: str) -> str:
    for mark in _REMOVED_FIRST:
        answer = answer.replace(mark, "")
    answer = answer.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for mark in _REMOVED_MARKS:
        answer = answer.replace(mark, "")
    return answer


def _without_name(answer: str) -> str:
    """Remove percent signs and a short name before "=", and add a zero before a leading point."""
    answer = answer.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if answer.startswith("."):
        answer = "0" + answer
    name, *rest = answer.split("=")
    return rest[0] if len(rest) == 1 and len(name) <= 2 else answer


def rational(answer: str) -> Fraction | None:
    """Return the value of a decimal number or a fraction of integers; None for anything else."""
    if re.search(r"[0-9] *,\s+[0-9]|[0-9]\s+,", as_list(to_plain_characters(answer[: MAX_ANSWER_LENGTH + 1]))):
        return None  # a list such as 12, 345, which would be normalized to 12,345
    answer = normalize(answer)
    match = _PLAIN_FRAC.fullmatch(answer)
    if match is None:
        return exact_number(answer)
    denominator = int(match[3])
    return Fraction(int(match[2]), -denominator if match[1] else denominator) if denominator else None


def _braced(match: re.Match[str]) -> str:
    return f"{{{match[1]}}}" + (match[2] if match[2] == "{" else f"{{{match[2]}}}")
