"""Exact answers to Countdown: is there an expression that uses every number once and equals the target?"""

from collections.abc import Iterator, Sequence
from fractions import Fraction

from dllm_rl.tasks.countdown.task import Expression, write

# Subsets up to this size are tabulated whole (a few thousand values); larger ones are split into two parts and met in
# the middle, so that six numbers take some hundredths of a second, with or without a solution.
_TABULATED = 4


def solve(numbers: Sequence[int], target: int, operators: str = "+-*/") -> str | None:
    """An expression for the target that uses each of the numbers exactly once, or None when there is none.

    Exact and complete over rational intermediate values. Unary minus would reach no further positive target: a
    negative value's opposite is reachable too, by exchanging the sides of a difference inside it.
    Errors: ValueError unless there are 1 to 6 positive numbers and only the operators + - * /.
    """
    if not 1 <= len(numbers) <= 6 or min(numbers) < 1:
        raise ValueError(f"numbers={list(numbers)} must be 1 to 6 positive integers")
    if not operators or not set(operators) <= set("+-*/"):
        raise ValueError(f"operators={operators!r} must be some of + - * /")
    found = _Solver(tuple(numbers), operators).reach((1 << len(numbers)) - 1, Fraction(target))
    return None if found is None else found[0]


class _Solver:
    """One problem's tables: for each subset of the numbers, the values it can give and an expression for each."""

    def __init__(self, numbers: tuple[int, ...], operators: str) -> None:
        self.numbers = numbers
        self.operators = operators
        self.tables: dict[int, dict[Fraction, Expression]] = {}
        self.reached: dict[tuple[int, Fraction], Expression | None] = {}

    def table(self, subset: int) -> dict[Fraction, Expression]:
        if subset not in self.tables:
            table: dict[Fraction, Expression] = {}
            if subset.bit_count() == 1:
                number = self.numbers[subset.bit_length() - 1]
                table[Fraction(number)] = (str(number), "")
            for part in _parts(subset):
                for a, left in self.table(part).items():
                    for b, right in self.table(subset ^ part).items():
                        for operator, value, in_order in self._values(a, b):
                            if value not in table:
                                table[value] = (
                                    write(left, operator, right) if in_order else write(right, operator, left)
                                )
            self.tables[subset] = table
        return self.tables[subset]

    def _values(self, a: Fraction, b: Fraction) -> Iterator[tuple[str, Fraction, bool]]:
        """(operator, value, whether a stands first) for all that two values can be joined to."""
        for operator in self.operators:
            if operator == "+":
                yield "+", a + b, True
            elif operator == "*":
                yield "*", a * b, True
            elif operator == "-":
                yield "-", a - b, True
                yield "-", b - a, False
            else:
                if b:
                    yield "/", a / b, True
                if a:
                    yield "/", b / a, False

    def reach(self, subset: int, target: Fraction) -> Expression | None:
        if subset.bit_count() <= _TABULATED:
            return self.table(subset).get(target)
        key = (subset, target)
        if key not in self.reached:
            self.reached[key] = next(self._meetings(subset, target), None)
        return self.reached[key]

    def _meetings(self, subset: int, target: Fraction) -> Iterator[Expression]:
        """Expressions for the target: a value of the smaller part, and what the larger part must then be."""
        for part in _parts(subset):
            rest = subset ^ part
            for a, left in self.table(part).items():
                for operator, b, part_first in self._needed(a, target):
                    right = self.reach(rest, b)
                    if right is not None:
                        yield write(left, operator, right) if part_first else write(right, operator, left)

    def _needed(self, a: Fraction, target: Fraction) -> Iterator[tuple[str, Fraction, bool]]:
        """(operator, b, whether a stands first) for every b with a operator b, or b operator a, equal to the target.

        A zero needs no case of its own: 0 * b and 0 / b are also reached by joining b's numbers to the 0 one by one,
        and a number is never 0.
        """
        for operator in self.operators:
            if operator == "+":
                yield "+", target - a, True
            elif operator == "-":
                yield "-", a - target, True
                yield "-", target + a, False
            elif operator == "*" and a:
                yield "*", target / a, True
            elif operator == "/" and a:
                yield "/", target * a, False
                if target:
                    yield "/", a / target, True


def _parts(subset: int) -> Iterator[int]:
    """Each way to cut a subset in two, once: the smaller part (of two equals, the one with the highest member)."""
    part = (subset - 1) & subset
    while part:
        rest = subset ^ part
        if (part.bit_count(), rest) < (rest.bit_count(), part):
            yield part
        part = (part - 1) & subset
