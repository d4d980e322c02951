"""Arithmetic as Python evaluates it, without Python's evaluator: for d1's protocol.

d1 passes digits, + - * / ( ) . and white space to Python. The value here is the one that Python gives. The grammar:

    sum     = product (("+" | "-") product)*
    product = factor (("*" | "/" | "//") factor)*
    factor  = ("+" | "-") factor | power
    power   = atom ["**" factor]
    atom    = "(" sum ")" | number

Python accepts other texts, such as 2(3), () and ..., but they never have a number as their value.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LONGEST = 2_000  # characters of the stripped text
DEEPEST = 40  # parentheses, signs and powers within one another
LARGEST = 100_000  # bits of an integer on the way

Number = int | float | complex

_TOKEN = re.compile(r"[ \t\f\n\r]*(?:(\d+\.\d*|\.\d+)|(0+(?!\d)|[1-9]\d*)|(\*\*|//|[-+*/()]))", re.ASCII)
OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "**": operator.pow,
}


class OutOfBounds(Exception):
    """The text is too long or too deep, or an integer on the way is too large."""


def python_value(text: str) -> Number | None:
    """The value that Python gives to the stripped text; None where Python raises. Errors: OutOfBounds."""
    text = text.strip()
    if len(text) > LONGEST:
        raise OutOfBounds
    try:
        return Reader(_tokens(text), signs=("+", "-"), number=_number, apply=_apply).value()
    except (SyntaxError, ArithmeticError, TypeError, ValueError):  # the errors of Python's evaluation
        return None


def _tokens(text: str) -> list[str]:
    """The tokens, then "". A line break outside parentheses ends an expression in Python, so it is an error here."""
    tokens: list[str] = []
    at = 0
    depth = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or (depth == 0 and re.search(r"[\n\r]", found[0])):
            raise SyntaxError(text)
        token = found[1] or found[2] or found[3]
        depth += (token == "(") - (token == ")")
        tokens.append(token)
        at = found.end()
    return [*tokens, ""]


@dataclass
class Reader:
    """Evaluates a list of tokens that ends with "". Each method reads what it is named after, at `depth`.

    signs   the signs that a factor may have.
    number  token -> its value, for each token that is no operator and no parenthesis.
    apply   (operator, left, right) -> value.
    """

    tokens: list[str]
    signs: tuple[str, ...]
    number: Callable[[str], Any]
    apply: Callable[..., Any]
    at: int = 0

    def value(self) -> Any:
        """Errors: SyntaxError; OutOfBounds beyond DEEPEST; what `number` and `apply` raise."""
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
        if depth > DEEPEST:  # or a hostile text could end the process by recursion
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


def _number(token: str) -> Number:
    return float(token) if "." in token else int(token)


def _apply(sign: str, left: Number, right: Number) -> Number:
    if isinstance(left, int) and isinstance(right, int):
        # The size is known before the work: a power of text such as 9**9**9 must not be computed to be refused.
        bits = left.bit_length() * right if sign == "**" else left.bit_length() + right.bit_length()
        if sign in ("*", "**") and abs(left) > 1 and bits > LARGEST:
            raise OutOfBounds
    return OPERATORS[sign](left, right)
