"""Evaluate arithmetic that a model wrote, without Python's `eval`. The result is exact, or Python's value for d1.

Grammar:
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

# Limits of `evaluate`
MAX_EXPRESSION_LENGTH = 500  # characters
LARGEST = 10**40  # largest intermediate numerator or denominator
# Limits of `python_value`
LONGEST_PYTHON = 2_000  # characters
LARGEST_PYTHON = 100_000  # bits of an intermediate integer
# Limit of both
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
    """Return the exact value of an expression; None for any other text, a division by zero, or a limit exceeded."""
    # As in Python, an integer has no leading zero. ** and // are not operators; 2(3) is not a product.
    if len(text) > MAX_EXPRESSION_LENGTH:
        return None
    try:
        tokens = _tokens(text.strip(" \t\n\r\f"), _TOKEN)
        value = Parser(tokens, signs=("-",), number=_exact_integer, apply=apply).value()
    except (SyntaxError, ZeroDivisionError, OutOfBounds):
        return None
    return Value(value, tuple(int(token) for token in tokens if token.isdigit()))


def python_value(text: str) -> Number | None:
    """Return the value that Python's `eval` gives for the text; None if it raises. Raises OutOfBounds at the limits."""
    # d1 passes digits, + - * / ( ) . and spaces to `eval`. It accepts 2(3), () and ..., but they never give a number.
    text = text.strip()
    if len(text) > LONGEST_PYTHON:
        raise OutOfBounds
    try:
        tokens = _tokens(text, _PYTHON_TOKEN, allow_breaks=False)
        return Parser(tokens, signs=("+", "-"), number=_python_number, apply=_python_apply).value()
    except (SyntaxError, ArithmeticError, TypeError, ValueError):  # errors that `eval` may raise
        return None


def _tokens(text: str, token: re.Pattern[str], *, allow_breaks: bool = True) -> list[str]:
    """Return the tokens and a final "". Without `allow_breaks`, a line break outside parentheses is an error."""
    tokens: list[str] = []
    position = 0
    depth = 0
    while position < len(text):
        match = token.match(text, position)
        if match is None or (not allow_breaks and depth == 0 and re.search(r"[\n\r]", match[0])):
            raise SyntaxError(text)
        depth += (match[1] == "(") - (match[1] == ")")
        tokens.append(match[1])
        position = match.end()
    return [*tokens, ""]


@dataclass
class Parser:
    """Evaluates tokens that end with "". The methods sum, product, factor and atom each parse the rule of that name.

    `depth` is the number of parentheses, signs and powers around the rule.
    """

    tokens: list[str]
    signs: tuple[str, ...]  # signs that a factor may have
    number: Callable[[str], Any]  # token -> value, for each token that is not an operator or parenthesis
    apply: Callable[..., Any]  # (operator, left, right) -> value
    position: int = 0  # of the next token

    def value(self) -> Any:
        """Evaluate all tokens. Raises SyntaxError, OutOfBounds beyond DEEPEST, and errors of `number` and `apply`."""
        value = self.sum(0)
        self.take("")
        return value

    def take_if(self, *wanted: str) -> str | None:
        """Consume and return the next token if it is one of `wanted`, else return None."""
        if self.tokens[self.position] in wanted:
            self.position += 1
            return self.tokens[self.position - 1]
        return None

    def take(self, wanted: str) -> None:
        """Consume the next token. Raises SyntaxError if it is not `wanted`."""
        if self.take_if(wanted) is None:
            raise SyntaxError(self.tokens[self.position])

    def sum(self, depth: int) -> Any:
        value = self.product(depth)
        while operator := self.take_if("+", "-"):
            value = self.apply(operator, value, self.product(depth))
        return value

    def product(self, depth: int) -> Any:
        value = self.factor(depth)
        while operator := self.take_if("*", "/", "//"):
            value = self.apply(operator, value, self.factor(depth))
        return value

    def factor(self, depth: int) -> Any:
        if depth > DEEPEST:  # otherwise a hostile text could exhaust the stack
            raise OutOfBounds
        if sign := self.take_if(*self.signs):
            value = self.factor(depth + 1)
            return -value if sign == "-" else value
        base = self.atom(depth)
        return self.apply("**", base, self.factor(depth + 1)) if self.take_if("**") else base

    def atom(self, depth: int) -> Any:
        if self.take_if("("):
            value = self.sum(depth + 1)
            self.take(")")
            return value
        token = self.tokens[self.position]
        self.position += 1
        if not token or token in "+-*//**()":  # the end, or an operator
            raise SyntaxError(token)
        return self.number(token)


def _exact_integer(digits: str) -> Fraction:
    if len(digits) > 40:  # int() of a long text takes quadratic time
        raise OutOfBounds
    return Fraction(int(digits))


def _python_number(token: str) -> Number:
    return float(token) if "." in token else int(token)


def apply(operator: str, left: Fraction, right: Fraction) -> Fraction:
    """Return `left operator right`. Raises ZeroDivisionError, and OutOfBounds beyond LARGEST."""
    value = OPERATORS[operator](left, right)
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise OutOfBounds
    return value


def _python_apply(symbol: str, left: Number, right: Number) -> Number:
    if isinstance(left, int) and isinstance(right, int):
        # Check the size before computing: a power such as 9**9**9 must never be computed.
        bits = left.bit_length() * right if symbol == "**" else left.bit_length() + right.bit_length()
        if symbol in ("*", "**") and abs(left) > 1 and bits > LARGEST_PYTHON:
            raise OutOfBounds
    return OPERATORS[symbol](left, right)
