"""Evaluation of arithmetic from a model, without Python's evaluator: exact within bounds, or with Python's value for
d1.

sum     = product (("+" | "-") product)*
product = factor (("*" | "/" | "//") factor)*
factor  = ("+" | "-") factor | power
power   = atom ["**" factor]
atom    = "(" sum ")" | number
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

MAX_EXPRESSION_LENGTH = 500  # characters of an exact expression
LARGEST = 10**40  # largest intermediate numerator or denominator
LONGEST_PYTHON = 2_000  # characters of an expression with Python's value
LARGEST_PYTHON = 100_000  # bits of an intermediate integer
DEEPEST = 40  # nested parentheses, signs and powers

Number = int | float | complex

_TOKEN = re.compile(r"[ \t\n\r\f]*(0(?![0-9])|[1-9][0-9]*|[-+*/()])")
_PYTHON_TOKEN = re.compile(r"[ \t\f\n\r]*(\d+\.\d*|\.\d+|0+(?!\d)|[1-9]\d*|\*\*|//|[-+*/()])", re.ASCII)
OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "**": operator.pow,
}


class OutOfBounds(Exception):
    """The text is too long or too deeply nested, or an intermediate integer is too large."""


@dataclass(frozen=True)
class Value:
    """The value of an expression, and its integers from left to right."""

    value: Fraction
    numbers: tuple[int, ...]


def evaluate(text: str) -> Value | None:
    """Return the exact value of an expression; None for any other text, a division by zero, or beyond the bounds."""
    # As in Python, an integer has no leading zero. ** and // are not operators; 2(3) is not a product.
    if len(text) > MAX_EXPRESSION_LENGTH:
        return None
    try:
        tokens = _tokens(text.strip(" \t\n\r\f"), _TOKEN)
        value = Reader(tokens, signs=("-",), number=_integer, apply=apply).value()
    except (SyntaxError, ZeroDivisionError, OutOfBounds):
        return None
    return Value(value, tuple(int(token) for token in tokens if token.isdigit()))


def python_value(text: str) -> Number | None:
    """Return Python's value of the stripped text, or None if Python raises. Raises OutOfBounds."""
    # d1 passes digits, + - * / ( ) . and spaces to Python. 2(3), () and ... are accepted, but never have a number.
    text = text.strip()
    if len(text) > LONGEST_PYTHON:
        raise OutOfBounds
    try:
        tokens = _tokens(text, _PYTHON_TOKEN, breaks=False)
        return Reader(tokens, signs=("+", "-"), number=_number, apply=_python_apply).value()
    except (SyntaxError, ArithmeticError, TypeError, ValueError):  # the errors of Python's evaluation
        return None


def _tokens(text: str, token: re.Pattern[str], *, breaks: bool = True) -> list[str]:
    """Return the tokens and a final "". Without `breaks`, a line break outside parentheses is an error."""
    tokens: list[str] = []
    at = 0
    depth = 0
    while at < len(text):
        found = token.match(text, at)
        if found is None or (not breaks and depth == 0 and re.search(r"[\n\r]", found[0])):
            raise SyntaxError(text)
        depth += (found[1] == "(") - (found[1] == ")")
        tokens.append(found[1])
        at = found.end()
    return [*tokens, ""]


@dataclass
class Reader:
    """Evaluates a list of tokens that ends with "". Each method reads the rule of its name, nested `depth` deep."""

    tokens: list[str]
    signs: tuple[str, ...]  # signs that a factor may have
    number: Callable[[str], Any]  # token -> value, for each token that is not an operator or parenthesis
    apply: Callable[..., Any]  # (operator, left, right) -> value
    at: int = 0

    def value(self) -> Any:
        """Evaluate all tokens. Raises SyntaxError, OutOfBounds beyond DEEPEST, and errors of `number` and `apply`."""
        value = self.sum(0)
        self.take("")
        return value

    def next_of(self, *wanted: str) -> str | None:
        if self.tokens[self.at] in wanted:
            self.at += 1
            return self.tokens[self.at - 1]
        return None

    def take(self, wanted: str) -> None:
        if self.next_of(wanted) is None:
            raise SyntaxError(self.tokens[self.at])

    def sum(self, depth: int) -> Any:
        value = self.product(depth)
        while operator := self.next_of("+", "-"):
            value = self.apply(operator, value, self.product(depth))
        return value

    def product(self, depth: int) -> Any:
        value = self.factor(depth)
        while operator := self.next_of("*", "/", "//"):
            value = self.apply(operator, value, self.factor(depth))
        return value

    def factor(self, depth: int) -> Any:
        if depth > DEEPEST:  # otherwise a hostile text could end the process by recursion
            raise OutOfBounds
        if sign := self.next_of(*self.signs):
            value = self.factor(depth + 1)
            return -value if sign == "-" else value
        base = self.atom(depth)
        return self.apply("**", base, self.factor(depth + 1)) if self.next_of("**") else base

    def atom(self, depth: int) -> Any:
        if self.next_of("("):
            value = self.sum(depth + 1)
            self.take(")")
            return value
        token = self.tokens[self.at]
        self.at += 1
        if not token or token in "+-*//**()":  # the end, or an operator
            raise SyntaxError(token)
        return self.number(token)


def _integer(digits: str) -> Fraction:
    if len(digits) > 40:  # int() of a long text takes quadratic time
        raise OutOfBounds
    return Fraction(int(digits))


def _number(token: str) -> Number:
    return float(token) if "." in token else int(token)


def apply(operator: str, left: Fraction, right: Fraction) -> Fraction:
    """Return `left operator right`. Raises ZeroDivisionError, and OutOfBounds beyond LARGEST."""
    value = OPERATORS[operator](left, right)
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise OutOfBounds
    return value


def _python_apply(sign: str, left: Number, right: Number) -> Number:
    if isinstance(left, int) and isinstance(right, int):
        # The size is bounded before the work: a power such as 9**9**9 must be refused without computing it.
        bits = left.bit_length() * right if sign == "**" else left.bit_length() + right.bit_length()
        if sign in ("*", "**") and abs(left) > 1 and bits > LARGEST_PYTHON:
            raise OutOfBounds
    return OPERATORS[sign](left, right)
