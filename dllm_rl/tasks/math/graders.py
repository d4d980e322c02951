"""GSM8K and MATH500 graders by protocol. Field: `answer`, the reference. If it is None, every completion is wrong."""

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from dllm_rl.tasks import answers
from dllm_rl.tasks.answers import d1_box, exact_number, final_answer, first_closed_answer, without_delimiters
from dllm_rl.tasks.base import Grader, Reward
from dllm_rl.tasks.math import math_verify as math_check
from dllm_rl.tasks.math.latex import TEXT, d1_spelling, hedged, normalize, rational, same_in_d1
from dllm_rl.tasks.rows import require_field

_STATED = re.compile(r"The answer is (-?[0-9.,]+)"), re.compile(r"#### (-?[0-9.,]+)")
_DELIMITER = re.compile(r"(?<!\\)\$[^$]*(?<!\\)\$|\\\(|(?<!\\)\\\[")  # two dollar signs, \\( or \\[
_REASONED = re.compile(r"</reasoning>\s*+<answer>")  # *+ does not backtrack: linear time on any text


def gsm8k_strict(fields: Mapping[str, Any], completion: str) -> Reward:
    """Check that the strict answer (`final_answer`) is one number (`exact_number`), equal to the reference [ours]."""
    answer = _strict_answer(completion)
    return _compared(None if answer is None else exact_number(answer), fields)


def gsm8k_d1(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade as in d1's evaluation [paper].

    The answer is the first boxed number, else the first answer block as a float, else the last number in that block.
    """
    number = answers.first_boxed_number(completion)
    if number is None:
        number = answers.number_in((first_closed_answer(completion) or "").strip(), -1)
    return _compared(number, fields)


def gsm8k_spg(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade as in SPG's evaluation [paper].

    If d1's evaluation reads no number, the answer is the last number in the last answer block, or in a text without
    blocks.
    """
    graded = gsm8k_d1(fields, completion)
    if graded.parsed:
        return graded
    return _compared(answers.number_in(_after_last_tag(completion), -1), fields)


def gsm8k_espo(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade by ESPO's binary reward [paper].

    The answer is the number after "The answer is", else after "####", else the last integer.
    """
    match = _STATED[0].search(completion) or _STATED[1].search(completion)
    if match:
        number_text = match[1]
    else:
        reversed_match = re.search("[0-9]+-?", completion[::-1])  # reversed, to find the last integer in linear time
        number_text = reversed_match[0][::-1] if reversed_match else ""
    number = exact_number(number_text.rstrip(".,"))  # numbers are compared instead of strings [ours]
    return _compared(number, fields)


def gsm8k_d1_training(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade by d1's training reward [paper]: a sum of up to 4."""
    # d1 also subtracts 0.001 per character after the end; this unbounded term is left out [ours].
    answer = _after_last_tag(completion).strip()
    correct = fields["answer"] is not None and answer == _after_hashes(fields["answer"])
    layout = _REASONED.search(completion) if completion.startswith("<reasoning>") else None
    tags = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    terms = {
        "correct": 2.0 * correct,
        "integer": 0.5 * answer.isdigit(),
        "strict": 0.5 * _strict_layout(completion),
        "soft": 0.5 * (layout is not None and completion.find("</answer>", layout.end()) >= 0),
        "tags": 0.125 * sum(completion.count(tag) == 1 for tag in tags),
    }
    return Reward(sum(terms.values()), "<answer>" in completion, {"accuracy": float(correct), **terms})


def math500_strict(fields: Mapping[str, Any], completion: str) -> Reward:
    """Check that the strict answer equals the reference after normalization, or as a rational number [ours]."""
    answer = _strict_answer(completion)
    reference = fields["answer"]
    spelling = _spelling(answer or "")
    return _graded(bool(answer), bool(answer) and reference is not None and spelling == _spelling(reference), spelling)


def math500_d1(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade as in d1's evaluation [paper].

    The answer is `d1_box`, or the first answer block if the box is empty. It is compared by `same_in_d1`.
    """
    answer = d1_box(completion) or (first_closed_answer(completion) or "").strip()
    correct = fields["answer"] is not None and same_in_d1(answer, fields["answer"])
    # parsed: the completion marks an answer, or all of it is the right answer [ours]
    parsed = correct or bool(answer and answer != completion)
    return _graded(parsed, correct, d1_spelling(answer) if parsed and len(answer) <= answers.MAX_ANSWER_LENGTH else "")


def math500_math_verify(fields: Mapping[str, Any], completion: str) -> Reward:
    """Check that the strict answer equals the reference by math-verify [library], and is not `hedged` [ours]."""
    answer = _strict_answer(completion)
    is_comparable = answer and fields["answer"] is not None and not hedged(answer, fields["answer"])
    equal = math_check.equal(fields["answer"], answer) if answer and is_comparable else False
    # undecided: beyond math-verify's limits. No answer for maj@k: equal wrong answers have no common spelling.
    return _graded(bool(answer), equal is True, None, undecided=float(equal is None))


def compare_all(fields: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> None:
    """Make the comparisons of math500_math_verify in parallel; `math_check` caches the verdicts for it."""
    references = [problem_fields["answer"] for problem_fields in fields]
    pairs = zip(references, map(_strict_answer, completions), strict=True)
    math_check.equal_all([(reference, answer) for reference, answer in pairs if answer and reference is not None])


GSM8K_GRADERS: dict[str, Grader] = {"strict": gsm8k_strict, "d1": gsm8k_d1, "spg": gsm8k_spg, "espo": gsm8k_espo}
_BY_MATH_VERIFY = ("espo", "math-verify")
MATH500_GRADERS: dict[str, Grader] = {"strict": math500_strict, "d1": math500_d1, "spg": math500_d1}
MATH500_GRADERS |= dict.fromkeys(_BY_MATH_VERIFY, math500_math_verify)
MATH500_REQUIRE = dict.fromkeys(_BY_MATH_VERIFY, math_check.require)
MATH500_PREPARE = dict.fromkeys(_BY_MATH_VERIFY, compare_all)


def read_gsm8k(row: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """Read `answer` of a stored row: a number, also as text or after "####", or null. Raises ValueError if it is
    malformed.
    """
    answer = row.get("answer")
    fields = read_math500({**row, "answer": _after_hashes(answer)} if isinstance(answer, str) else row, protocol)
    if fields["answer"] is not None:
        reference_number(fields["answer"])  # raises here, where the error names the row's line
    return fields


def read_math500(row: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """Read `answer` of a stored row: LaTeX, a number or null. Raises ValueError if it is malformed."""
    answer = require_field(row, "answer")
    infinite = isinstance(answer, float) and not math.isfinite(answer)
    if answer is not None and (type(answer) not in (str, int, float) or infinite or not str(answer).strip()):
        raise ValueError(f"answer={answer!r} must be a number or a text that is not empty")
    return {"answer": None if answer is None else reference_answer(str(answer))}


def reference_answer(text: str) -> str:
    r"""Return a reference `without_delimiters`.

    Raises:
        ValueError: Delimiters remain, as in "between $1$ and $2$": no answer would equal the text.
    """
    answer = without_delimiters(text)
    if not answer or _DELIMITER.search(TEXT.sub("", answer)):
        raise ValueError(f"answer={text!r} has text around $...$, \\(...\\) or \\[...\\]; give the answer alone")
    return answer


def reference_number(answer: str | int | float) -> Fraction:
    """Return the number of a GSM8K reference: the text after "####", or the whole text. Raises ValueError."""
    number = exact_number(without_delimiters(_after_hashes(str(answer))))
    if number is None:
        raise ValueError(f"answer={answer!r} is not a number, and has none after ####")
    return number


def _strict_answer(completion: str) -> str | None:
    """Return the strict answer (`final_answer`) `without_delimiters`; None if there is none."""
    answer = final_answer(completion)
    return None if answer is None else without_delimiters(answer)


def _after_hashes(answer: str) -> str:
    return str(answer).rpartition("####")[2].strip()


def _after_last_tag(text: str) -> str:
    return text[text.rfind("<answer>") + len("<answer>") if "<answer>" in text else 0 :].partition("</answer>")[0]


def _strict_layout(text: str) -> bool:
    """Return whether the text is a reasoning block and an answer block, with each tag on a separate line."""
    text = text.removesuffix("\n") if text.endswith("\n\n") else text
    if not text.startswith("<reasoning>\n") or not text.endswith("\n</answer>\n"):
        return False
    separator = "\n</reasoning>\n<answer>\n"
    start = text.find(separator, len("<reasoning>\n"))
    return start >= 0 and start + len(separator) <= len(text) - len("\n</answer>\n")


def _compared(number: Fraction | float | None, fields: Mapping[str, Any]) -> Reward:
    if number is None:
        return _graded(False, False, "")
    reference: Any = None if fields["answer"] is None else reference_number(fields["answer"])
    if reference is not None and isinstance(number, float):  # equal if the reference rounds to this float
        reference = float(reference)
    return _graded(True, number == reference, str(number + 0))  # + 0: a float's -0.0 is 0.0


def _spelling(answer: str) -> str:
    value = rational(answer)
    return normalize(answer) if value is None else str(value)


def _graded(parsed: bool, correct: bool, answer: str | None, **more: float) -> Reward:
    return Reward(float(correct), parsed, {"accuracy": float(correct), **more}, answer)
