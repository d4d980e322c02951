"""Countdown graders by protocol. Fields: `numbers`, a list of integers, and `target`, an integer."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dllm_rl.tasks.answers import (
    ASCII_CHARACTERS,
    MAX_ANSWER_LENGTH,
    d1_box,
    final_answer,
    first_closed_answer,
    last_closed_answer,
    without_delimiters,
)
from dllm_rl.tasks.base import Grader, Reward
from dllm_rl.tasks.countdown.expressions import Number, OutOfBounds, evaluate, python_value
from dllm_rl.tasks.rows import require_field

_EXPRESSION_CHARACTERS = "0123456789+-*/() "
# Multiplication and division signs, dots and slashes of operators; typographic minus signs and wide characters.
_OPERATORS = ASCII_CHARACTERS | dict.fromkeys((0xB7, 0xD7, 0x2217, 0x22C5), "*") | {0xF7: "/", 0x2215: "/"}
_ZERO_METRICS = dict.fromkeys(("accuracy", "valid", "numbers_used", "undecided"), 0.0)
_DIGITS = re.compile(r"[0-9]{1,300}")
_INTEGER = re.compile(r" *-?[0-9]{1,100} *")
_EQUALS = re.compile(r"[0-9+\-*/() ]=[0-9. ]")


def countdown_strict(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade by the rules of the game: one expression, each number exactly once, exactly the target [ours].

    The expression is the complete strict answer (see `final_answer`), or the complete completion if there is none; no
    "= 24" may follow.
    """
    answer = final_answer(completion)
    expression = _with_ascii_operators(without_delimiters(completion if answer is None else answer))
    value = evaluate(expression)
    if value is None:
        return Reward(0.0, False, dict.fromkeys(("accuracy", "valid", "numbers_used"), 0.0))
    return _graded(fields, expression, value == fields["target"])


def countdown_d1(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade as in d1's evaluation [paper], with a tolerance of 1e-5.

    The expression is `d1_box`, else the first answer block, else the completion; of these, the part `left_of_equals`.
    """
    text = d1_box(completion)
    if text is None:
        block = first_closed_answer(completion)
        text = completion if block is None else block.strip()
    text = text.replace("\\div", "/").replace("\\times", "*").replace("\\cdot", "*")
    return grade_python_expression(fields, left_of_equals(text))


def countdown_d1_training(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade by d1's training reward [paper]: 0 without a closed answer block, 0.1 if it is wrong, 1 if it is right."""
    block = last_closed_answer(completion)
    if block is None:
        return Reward(0.0, False, _ZERO_METRICS)  # every metric is present, so that all means have the same denominator
    graded = grade_python_expression(fields, block)
    return Reward(1.0 if graded.value else 0.1, True, graded.breakdown)


def countdown_dream(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade as in Dream's evaluation of cd3, cd4 and cd5 [code].

    The first line has steps such as 86+28=114,114-18=96. Each step must be right by Python's arithmetic and use numbers
    of the problem or earlier results, once each. The last result must be the target.
    """
    left_over = Counter(map(str, fields["numbers"]))
    result = ""
    for step in completion.partition("\n")[0].split(","):
        left, _, result = step.partition("=")
        try:
            value = python_value(left) if re.match(r"\d+[+\-*/]\d", left) and _DIGITS.fullmatch(result) else None
        except OutOfBounds:  # undecided: beyond the limits of `python_value`
            return Reward(0.0, False, {"accuracy": 0.0, "undecided": 1.0})
        if value is None:
            return Reward(0.0, False, {"accuracy": 0.0, "undecided": 0.0})
        if value != float(result):
            return Reward(0.0, True, {"accuracy": 0.0, "undecided": 0.0})
        left_over.subtract(re.findall(r"\d+(?=[+-/*=])", step))  # as in Dream's code, which misses a number before ")"
        left_over[result] += 1
    left_over[str(fields["target"])] -= 1
    right = float(result == str(fields["target"]) and not any(left_over.values()))
    return Reward(right, True, {"accuracy": right, "undecided": 0.0})


GRADERS: dict[str, Grader] = {
    "strict": countdown_strict,
    **dict.fromkeys(("d1", "spg", "espo"), countdown_d1),
    "dream": countdown_dream,
}


def read_fields(row: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """Read `numbers` and `target` of a row, or the texts that published files have. Raises ValueError if malformed.

    The texts are d1's "30,100,93" and "23", or Dream's, in which the target is the last number of the first text, and
    the second shows steps. They may have the names `input` and `output`.
    """
    names = ("input", "output") if "input" in row and "numbers" not in row else ("numbers", "target")
    numbers, target = (require_field(row, name) for name in names)
    if isinstance(numbers, str) and "," in numbers:
        texts = numbers.split(",")
        texts.append(texts.pop() if "=" in str(target) else str(target))
        for text in texts:
            if not _INTEGER.fullmatch(text):
                raise ValueError(f"{text!r} of {names[0]}={numbers!r}, {names[1]}={target!r} is not an integer")
        *numbers, target = map(int, texts)
    if not isinstance(numbers, list) or not numbers or not all(type(number) is int for number in numbers):
        raise ValueError(f"{names[0]}={numbers!r} must be a list of integers, or a text with commas between them")
    if type(target) is not int:  # not isinstance: True is an int
        raise ValueError(f"{names[1]}={target!r} must be an integer")
    return {"numbers": numbers, "target": target}


def grade_python_expression(fields: Mapping[str, Any], text: str) -> Reward:
    """Grade an expression by d1's rules: the value is Python's, and every run of digits is a number."""
    try:
        value = python_value(text)
    except OutOfBounds:  # undecided: beyond the limits of `python_value`
        return Reward(0.0, False, _ZERO_METRICS | {"undecided": 1.0})
    if value is None:
        return Reward(0.0, False, _ZERO_METRICS)
    graded = _graded(fields, text, _close(value, fields["target"]))
    return Reward(graded.value, True, {**graded.breakdown, "undecided": 0.0})


def _close(value: Number, target: int) -> bool:
    try:
        return abs(value - target) < 1e-5
    except OverflowError:  # the target or the absolute value exceeds a float
        return False


def _graded(fields: Mapping[str, Any], expression: str, on_target: bool) -> Reward:
    """Return a reward of 1 if each number is used once, no other number is used, and the target is reached; else 0."""
    numbers = list(map(int, re.findall("[0-9]+", expression)))
    valid = sorted(numbers) == sorted(fields["numbers"])  # a number that occurs twice in the problem must occur twice
    common = sum((Counter(numbers) & Counter(fields["numbers"])).values())
    # The share of the larger multiset, so that additional numbers lower it.
    share_used = common / max(len(numbers), len(fields["numbers"]))
    value = float(valid and on_target)
    return Reward(value, True, {"accuracy": value, "valid": float(valid), "numbers_used": share_used})


def left_of_equals(text: str) -> str:
    """Return the run of digits, + - * / ( ) and spaces before the first "=" that precedes a digit, point or space.

    Without such a "=", return the text.
    """
    match = _EQUALS.search(text)
    if match is None:
        return text
    left_side = text[: match.start() + 1]
    return left_side[len(left_side.rstrip(_EXPRESSION_CHARACTERS)) :].strip()


def _with_ascii_operators(text: str) -> str:
    """Replace LaTeX and typographic operators by + - * /."""
    if len(text) > MAX_ANSWER_LENGTH:
        return text
    for symbol, operator in (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/")):
        text = text.replace(symbol, operator)
    return text.translate(_OPERATORS)
