"""Countdown: reach a target with given numbers, using each number exactly once."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from dllm_rl.tasks.base import Problem, Reward
from dllm_rl.tasks.countdown.graders import countdown_d1_training, countdown_strict, read_fields
from dllm_rl.tasks.prompt_texts import Prompt, Prompted
from dllm_rl.tasks.rows import (
    Row,
    Split,
    as_range,
    check_settings,
    check_split,
    draw_number,
    hashed_split,
    load_rows,
    parse_rows,
)

RULES = """Write an arithmetic expression that is worth exactly {target}. It must use each of the numbers {numbers} \
exactly once and no other number; you may add, subtract, multiply, divide and use parentheses.

"""
ALONE = RULES + "Think it through first if you like, then write the expression alone, without an equals sign, "
TEXT = ALONE + "between <answer> and </answer>."
# The prompts of the protocols that read another form.
PROMPTS = dict.fromkeys(("d1", "spg", "espo"), ALONE + "in \\boxed{}, between <answer> and </answer>.")
PROMPTS["dream"] = RULES + (
    "Write only its steps, each with two numbers, in one line without spaces, such as 86+28=114,114-18=96."
)

# The text of an expression and its top-level operator, "" for a single number.
Expression = tuple[str, str]
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "": 3}


@dataclass(frozen=True)
class Countdown(Prompted):
    """Countdown problems; problem i is a pure function of (seed, split, i) and the settings.

    Use it for arithmetic with many right answers, without downloads. Metrics: accuracy (expressions that use each
    number once and reach the target), valid (each number used once) and numbers_used (share of the numbers in common).

    Args:
        split: "train" (default), "validation" or "test". Splits share no set of numbers: 70, 10 and 20 in 100, by a
            hash.
        count: How many numbers, 3 to 6, or an inclusive range. Default: 3.
        max_number: Largest number of a problem; the smallest is 1. Default: 99.
        max_target: Largest target; the smallest is 1. Default: 99.
        operators: Operators that a solution may need; every problem has a solution. Default: "+-*/".
        size: Number of problems; fewer if a file has fewer. Default: 10000.
        seed: Seed of the problems. Default: 0.
        path: JSONL file of problems: {"input": "30,100,93", "output": "23"} (d1's), {"input": "30,7,37", "output":
            "30+7=37"} (Dream's, with the target last), or numbers and target. None (default): generated problems.
        prompt_format: "compact" (default): " 3,25, 7>82=", answered by an expression padded with spaces to `width`
            characters. "text": an instruction, answered between <answer> tags. Otherwise a template with {numbers} and
            {target}, or the path of its file.
        chat: Whether "text" and templates are one user message; False: plain text. Default: True.
        opening: Text that begins the assistant's turn, such as "<reasoning>"; needs chat. Default: none.
        reward_rule: "own" (default): solved_weight * accuracy + numbers_weight * numbers_used, read strictly [ours];
            "d1": 0, 0.1 or 1 [paper].
        solved_weight: Weight of accuracy under "own". Default: 1.
        numbers_weight: Weight of numbers_used under "own". Default: 0.2.

    Raises:
        ValueError: A setting is out of its range, or the file is malformed.
    """

    name: ClassVar[str] = "countdown"
    version: ClassVar[str] = "4"
    text: ClassVar[str] = TEXT
    placeholders: ClassVar[tuple[str, ...]] = ("numbers", "target")
    has_compact: ClassVar[bool] = True

    split: Split = "train"
    count: int | tuple[int, int] = 3
    max_number: int = 99
    max_target: int = 99
    operators: str = "+-*/"
    size: int = 10_000
    seed: int = 0
    path: str | Path | None = None
    prompt_format: str | Path = "compact"
    chat: bool = True
    opening: str = ""
    reward_rule: Literal["own", "d1"] = "own"
    solved_weight: float = 1.0
    numbers_weight: float = 0.2

    def __post_init__(self) -> None:
        check_split(self.split)
        low, high = as_range(self.count)
        operators = set(self.operators)
        limit = min(self.max_number, self.max_target)
        check_settings(
            (not 3 <= low <= high <= 6, f"count={self.count} must lie in 3..6"),
            (not operators or not operators <= set("+-*/"), f"operators={self.operators!r} must be some of '+-*/'"),
            (limit < 10, f"max_number={self.max_number} and max_target={self.max_target} must be at least 10"),
            (self.size < 1, f"size={self.size} must be at least 1"),
            (self.reward_rule not in ("own", "d1"), f"reward_rule={self.reward_rule!r} must be 'own' or 'd1'"),
        )
        self.check_prompt()

    def __len__(self) -> int:
        return self.size if self.path is None else min(self.size, len(self._stored))

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        numbers, target, expression = self._generate(index) if self.path is None else (*self._stored[index], None)
        fields = {"numbers": list(numbers), "target": target}
        prompt = self._prompt(numbers, target)
        if expression is not None:
            expression = expression.ljust(self.width) if self.compact else f"<answer>{expression}</answer>"
            expression = expression.removeprefix(self.opened_layout(prompt))
        return Problem(prompt, fields, expression)

    @property
    def content(self) -> tuple[object, ...]:
        return (*super().content, self._stored)

    @cached_property  # a new task reads its file again
    def _stored(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        return () if self.path is None else parse_rows(load_rows(self.path), _problem_of)

    def reward(self, problem: Problem, completion: str) -> Reward:
        completion = self.opened_layout(problem.prompt) + completion
        if self.reward_rule == "d1":
            return countdown_d1_training(problem.fields, completion)
        graded = countdown_strict(problem.fields, completion)
        share = graded.breakdown["numbers_used"]
        return Reward(
            self.solved_weight * graded.breakdown["accuracy"] + self.numbers_weight * share,
            graded.parsed,
            graded.breakdown,
        )

    @property
    def width(self) -> int:
        """Number of characters of the longest solution: numbers, operators and parentheses."""
        _, count = as_range(self.count)
        return count * len(str(self.max_number)) + (count - 1) + 2 * (count - 2)

    def _generate(self, index: int) -> tuple[tuple[int, ...], int, str]:
        """Return (numbers, target, solution): draw expressions until one fits the split and the settings."""
        # Only random() is used: Python promises its sequence for a seed, in every version.
        rng = Random(f"countdown/{self.seed}/{self.split}/{index}")
        count = draw_number(self.count, rng)
        while True:
            numbers = tuple(1 + int(rng.random() * self.max_number) for _ in range(count))
            if hashed_split(repr(sorted(numbers))) != self.split:  # sorted: splits share no set of numbers in any order
                continue
            target, expression = _random_expression(numbers, self.operators, rng)
            if 1 <= target <= self.max_target:
                return numbers, target, expression

    def _prompt(self, numbers: tuple[int, ...], target: int) -> Prompt:
        if self.compact:
            # Aligned, so that each token position has the same meaning in all problems.
            padded_numbers = ",".join(str(number).rjust(len(str(self.max_number))) for number in numbers)
            return f"{padded_numbers}>{str(target).rjust(len(str(self.max_target)))}="
        return self.render_prompt(numbers=", ".join(map(str, numbers)), target=str(target))


def _random_expression(numbers: tuple[int, ...], operators: str, rng: Random) -> tuple[int, str]:
    """Return (value, text) of a random expression, or (0, "") if a value on the way is invalid.

    It joins two random operands by a random operator until one operand is left.
    """
    operands = [(number, (str(number), "")) for number in numbers]
    while len(operands) > 1:
        a, left = operands.pop(int(rng.random() * len(operands)))
        b, right = operands.pop(int(rng.random() * len(operands)))
        operator = operators[int(rng.random() * len(operators))]
        if operator in "-/" and a < b:  # larger operand first, so that the value stays positive
            (a, left), (b, right) = (b, right), (a, left)
        if (operator == "-" and a == b) or (operator == "/" and a % b):
            return 0, ""
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]
        if value > 10**6:  # each intermediate value is a positive integer up to a million
            return 0, ""
        operands.append((value, write(left, operator, right)))
    return operands[0][0], operands[0][1][0]


def write(left: Expression, operator: str, right: Expression) -> Expression:
    """Write `left operator right`, with parentheses only where they are needed."""
    first, first_operator = left
    second, second_operator = right
    if _PRECEDENCE[first_operator] < _PRECEDENCE[operator]:
        first = f"({first})"
    # To the right of - and /, an operator of equal precedence needs parentheses too: a-(b-c) is not a-b-c.
    required = _PRECEDENCE[operator] + (operator in "-/" and second_operator != "")
    if _PRECEDENCE[second_operator] < required:
        second = f"({second})"
    return f"{first}{operator}{second}", operator


def _problem_of(row: Row) -> tuple[tuple[int, ...], int]:
    try:
        fields = read_fields(row, "strict")
    except ValueError as error:
        raise ValueError(f"{error}; a Countdown problem needs numbers and target, or input and output") from None
    return tuple(fields["numbers"]), fields["target"]
