"""GSM8K and MATH500 graders by protocol. Field: `answer`, the reference; if it is None every completion is wrong."""

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from dllm_rl.tasks import answers
from dllm_rl.tasks.answers import d1_box, exact_number, final_answer, first_closed_answer
from dllm_rl.tasks.base import Grader, Reward
from dllm_rl.tasks.math import math_verify as math_check
from dllm_rl.tasks.math.latex import d1_spelling, hedged, normalize, rational, same_in_d1
from dllm_rl.tasks.rows import present

_STATED = re.compile(r"The answer is (-?[0-9.,]+)"), re.compile(r"#### (-?[0-9.,]+)")
_REASONED = re.compile(r"</reasoning>\s*+<answer>")  # *+ does not backtrack: linear time on any text


def gsm8k_strict(fields: Mapping[str, Any], completion: str) -> Reward:
    """Check that the strict answer (see `final_answer`) is one number (see `exact_number`), exactly the reference
    [ours].
    """
    answer = final_answer(completion)
    return _compared(None if answer is None else exact_number(answer), fields)


def gsm8k_d1(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade as in d1's evaluation [paper]: the first boxed number, else the first answer block as a float or its LAST
    number.
    """
    number = answers.first_boxed_number(completion)
    if number is None:
        number = answers.last_number((first_closed_answer(completion) or "").strip())
    return _compared(number, fields)


def gsm8k_spg(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade as in SPG's evaluation [paper]: d1's, else the last number in the last answer block, or in a text without
    one.
    """
    graded = gsm8k_d1(fields, completion)
    if graded.parsed:
        return graded
    return _compared(answers.last_number(_after_last_tag(completion)), fields)


def gsm8k_espo(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade by ESPO's binary reward [paper]: the number after "The answer is", else after "####", else the last
    integer.
    """
    found = _STATED[0].search(completion) or _STATED[1].search(completion)
    if found:
        stated = found[1]
    else:
        last = re.search("[0-9]+-?", completion[::-1])  # reversed, to find the last integer in linear time
        stated = last[0][::-1] if last else ""
    number = exact_number(stated.rstrip(".,"))  # numbers are compared instead of strings [ours]
    return _compared(number, fields)


def gsm8k_d1_training(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade by d1's training reward [paper]: a sum of up to 4."""
    # d1 also subtracts 0.001 per character after the end; this unbounded term is left out [ours].
    answer = _after_last_tag(completion).strip()
    correct = fields["answer"] is not None and answer == _after_hashes(fields["answer"])
    turn = _REASONED.search(completion) if completion.startswith("<reasoning>") else None
    tags = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    terms = {
        "correct": 2.0 * correct,
        "integer": 0.5 * answer.isdigit(),
        "strict": 0.5 * _strict_layout(completion),  # both blocks, each tag on a separate line, and nothing else
        "soft": 0.5 * (turn is not None and completion.find("</answer>", turn.end()) >= 0),
        "tags": 0.125 * sum(completion.count(tag) == 1 for tag in tags),
    }
    return Reward(sum(terms.values()), "<answer>" in completion, {"accuracy": float(correct), **terms})


def math500_strict(fields: Mapping[str, Any], completion: str) -> Reward:
    """Check that the strict answer equals the reference after normalization, or as a rational number [ours]."""
    answer = final_answer(completion)
    reference = fields["answer"]
    spelt = _spelling(answer or "")
    return _graded(bool(answer), bool(answer) and reference is not None and spelt == _spelling(reference), spelt)


def math500_d1(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade as in d1's evaluation [paper]: `d1_box`, or the first answer block if it is empty; compared by
    `same_in_d1`.
    """
    answer = d1_box(completion) or (first_closed_answer(completion) or "").strip()
    correct = fields["answer"] is not None and same_in_d1(answer, fields["answer"])
    # parsed: the completion marks an answer, or all of it is the right answer [ours]
    parsed = correct or bool(answer and answer != completion)
    return _graded(parsed, correct, d1_spelling(answer) if parsed and len(answer) <= answers.MAX_ANSWER_LENGTH else "")


def math500_math_verify(fields: Mapping[str, Any], completion: str) -> Reward:
    """Check that the strict answer equals the reference symbolically, by math-verify [library], and is not `hedged`
    [ours].
    """
    answer = final_answer(completion)
    graded = answer and fields["answer"] is not None and not hedged(answer, fields["answer"])
    equal = math_check.equal(fields["answer"], answer) if answer and graded else False
    # undecided: beyond math-verify's bounds. Wrong answers that math-verify finds equal have no common spelling.
    return _graded(bool(answer), equal is True, None, undecided=float(equal is None))


def compare_all(fields: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> None:
    """Make the comparisons of math500_math_verify in parallel; math_check caches the verdicts."""
    found = zip(fields, map(final_answer, completions), strict=True)
    math_check.equal_all([(each["answer"], answer) for each, answer in found if answer and each["answer"] is not None])


GSM8K_GRADERS: dict[str, Grader] = {"strict": gsm8k_strict, "d1": gsm8k_d1, "spg": gsm8k_spg, "espo": gsm8k_espo}
_BY_MATH_VERIFY = ("espo", "math-verify")
MATH500_GRADERS: dict[str, Grader] = {"strict": math500_strict, "d1": math500_d1, "spg": math500_d1}
MATH500_GRADERS |= dict.fromkeys(_BY_MATH_VERIFY, math500_math_verify)
MATH500_NEEDS = dict.fromkeys(_BY_MATH_VERIFY, math_check.require)
MATH500_AT_ONCE = dict.fromkeys(_BY_MATH_VERIFY, compare_all)


def read_gsm8k(row: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """Read `answer` of a stored row: a number, also as text, or null. Raises ValueError if it is malformed."""
    fields = read_math500(row, protocol)
    if fields["answer"] is not None:
        reference_number(fields["answer"])  # raises now, with the row's line, not while grading
    return fields


def read_math500(row: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """Read `answer` of a stored row: LaTeX, a number or null. Raises ValueError if it is malformed."""
    answer = present(row, "answer")
    infinite = isinstance(answer, float) and not math.isfinite(answer)
    if answer is not None and (type(answer) not in (str, int, float) or infinite or not str(answer).strip()):
        raise ValueError(f"answer={answer!r} must be a number or a text that is not empty")
    return {"answer": None if answer is None else str(answer)}


def reference_number(answer: str | int | float) -> Fraction:
    """Return the number of a GSM8K reference: the text after "####", or all of it. Raises ValueError if none."""
    number = exact_number(_after_hashes(str(answer)))
    if number is None:
        raise ValueError(f"answer={answer!r} is no number, and has none behind ####")
    return number


def _after_hashes(answer: str) -> str:
    return str(answer).rpartition("####")[2].strip()


def _after_last_tag(text: str) -> str:
    return text[text.rfind("<answer>") + len("<answer>") if "<answer>" in text else 0 :].partition("</answer>")[0]


def _strict_layout(text: str) -> bool:
    text = text.removesuffix("\n") if text.endswith("\n\n") else text
    if not text.startswith("<reasoning>\n") or not text.endswith("\n</answer>\n"):
        return False
    turn = text.find("\n</reasoning>\n<answer>\n", len("<reasoning>\n"))
    return turn >= 0 and turn + len("\n</reasoning>\n<answer>\n") <= len(text) - len("\n</answer>\n")


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
