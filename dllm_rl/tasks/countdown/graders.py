"""Countdown graders by protocol. Fields: `numbers`, a list of integers, and `target`, an integer."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dllm_rl.tasks.answers import LONGEST, final_answer, first_closed_answer, last_box, last_closed_answer
from dllm_rl.tasks.base import Grader, Reward
from dllm_rl.tasks.countdown.expressions import Value, evaluate
from dllm_rl.tasks.loading import present

_RUN = "0123456789+-*/() "
_EQUALS = re.compile(r"[0-9+\-*/() ]=[0-9. ]")


def countdown_strict(fields: Mapping[str, Any], completion: str) -> Reward:
    """The rules of the game: one expression, each number exactly once, exactly the target [ours].

    The expression is all of the strict answer (box inside answer block, block, box), or all of a completion that has
    none of these. The signs of print and LaTeX for times, divided and minus are read as operators. No "= 24" behind.
    """
    answer = final_answer(completion)
    return grade_expression(fields, _operators(completion if answer is None else answer))


def countdown_d1(fields: Mapping[str, Any], completion: str) -> Reward:
    """d1's evaluation [paper]: last box, else first answer block, else the whole text; within 1e-5 of the target.

    Where digits, operators, parentheses and spaces run up to an equals sign with a digit, point or space behind, the
    first such run is the expression. d1 evaluates with Python; here ** and // do not count, nor do decimals [ours].
    """
    box = last_box(completion, names=("\\boxed",))
    block = first_closed_answer(completion)
    text = box if box is not None else completion if block is None else block
    text = text.replace("\\div", "/").replace("\\times", "*").replace("\\cdot", "*")
    return grade_expression(fields, left_of_equals(text).strip(), tolerance=1e-5, lines=False)


def countdown_d1_training(fields: Mapping[str, Any], completion: str) -> Reward:
    """d1's training reward [paper]: 0 without a closed answer block, 0.1 when it is wrong, 1 when it is correct."""
    block = last_closed_answer(completion)
    if block is None:
        return Reward(0.0, False, dict.fromkeys(("accuracy", "valid", "numbers_used"), 0.0))
    graded = grade_expression(fields, block.strip(), tolerance=1e-5, lines=False)
    return Reward(1.0 if graded.value else 0.1, True, graded.breakdown)


GRADERS: dict[str, Grader] = {
    "strict": countdown_strict,
    "d1": countdown_d1,
    "spg": countdown_d1,
    "espo": countdown_d1,
}


def read_fields(row: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """`numbers` and `target` of a stored row. Errors: ValueError saying what is wrong."""
    numbers, target = present(row, "numbers"), present(row, "target")
    if not isinstance(numbers, list) or not numbers or not all(type(number) is int for number in numbers):
        raise ValueError(f"numbers={numbers!r} must be a list of integers")
    if type(target) is not int:
        raise ValueError(f"target={target!r} must be an integer")
    return {"numbers": numbers, "target": target}


def grade_expression(fields: Mapping[str, Any], text: str, *, tolerance: float = 0.0, lines: bool = True) -> Reward:
    """Grades a text that must be one expression; value 1 when correct, else 0; parsed when it is an expression at all.

    accuracy      1 when each number stands exactly once and the value is the target.
    valid         1 when each number stands exactly once.
    numbers_used  given numbers that stand in it, and given that it has no others than these, as a share: the size of
                  the multiset intersection over that of the larger multiset.
    """
    found = evaluate(text, lines=lines)
    if found is None:
        return Reward(0.0, False, dict.fromkeys(("accuracy", "valid", "numbers_used"), 0.0))
    valid = sorted(found.numbers) == sorted(fields["numbers"])
    correct = valid and _close(found, fields["target"], tolerance)
    breakdown = {"accuracy": float(correct), "valid": float(valid), "numbers_used": _shared(found, fields["numbers"])}
    return Reward(float(correct), True, breakdown)


def left_of_equals(text: str) -> str:
    """The first run of digits, operators, parentheses and spaces before "=" and a digit, point or space; else all."""
    found = _EQUALS.search(text)
    if found is None:
        return text
    before = text[: found.start() + 1]
    return before[len(before.rstrip(_RUN)) :]


def _close(found: Value, target: int, tolerance: float) -> bool:
    return abs(found.value - target) < tolerance if tolerance else found.value == target


def _shared(found: Value, numbers: list[int]) -> float:
    common = sum((Counter(found.numbers) & Counter(numbers)).values())
    return common / max(len(found.numbers), len(numbers))


def _operators(text: str) -> str:
    if len(text) > LONGEST:
        return text
    for sign, operator in (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\u00d7", "*"), ("\u00b7", "*")):
        text = text.replace(sign, operator)
    return text.replace("\u00f7", "/").replace("\u2212", "-")
