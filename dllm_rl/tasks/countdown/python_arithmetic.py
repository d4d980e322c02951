"""Arithmetic as Python evaluates it, read from a text without running any: for d1's protocol.

d1 passes digits, + - * / ( ) . and white space to Python. The value here is the one that Python gives, with its
integers, floats and complex numbers, `**`, `//`, signs and rounding; where Python raises there is none. The grammar:

    sum     = product (("+" | "-") product)*
    product = factor (("*" | "/" | "//") factor)*
    factor  = ("+" | "-") factor | power
    power   = atom ["**" factor]
    atom    = "(" sum ")" | number

The other texts that Python accepts, calls such as 2(3), () and ..., are never worth a number.
"""

import operator
import re

LONGEST = 2_000  # characters, of a text that is stripped
DEEPEST = 40  # parentheses, signs and powers within one another
LARGEST = 100_000  # bits of an integer on the way

Number = int | float | complex

_TOKEN = re.compile(r"[ \t\f\n\r]*(?:(\d+\.\d*|\.\d+)|(0+(?!\d)|[1-9]\d*)|(\*\*|//|[-+*/()]))", re.ASCII)
_APPLY = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "**": operator.pow,
}


class OutOfBounds(Exception):
    """The text is too long or too deep, or an integer on the way too large, to be evaluated."""


def python_value(text: str) -> Number | None:
    """What Python makes of the text, stripped; None where it raises. Errors: OutOfBounds."""
    text = text.strip()
    if len(text) > LONGEST:
        raise OutOfBounds
    try:
        reader = _Reader(_tokens(text))
        value = reader.sum(0)
        reader.take("")
    except (SyntaxError, ArithmeticError, TypeError, ValueError):  # as Python's evaluation of such a text raises them
        return None
    return value


def _tokens(text: str) -> list[str]:
    """The tokens, and "" for the end. A line break outside parentheses ends an expression of Python's."""
    tokens, at, depth = [], 0, 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or (depth == 0 and re.search(r"[\n\r]", found[0])):
            raise SyntaxError(text)
        token = found[1] or found[2] or found[3]
        depth += (token == "(") - (token == ")")
        tokens.append(token)
        at = found.end()
    return [*tokens, ""]


class _Reader:
    """A place in a list of tokens; its methods read what they are named after, and evaluate it."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def next_of(self, *wanted: str) -> str | None:
        if self.tokens[self.at] in wanted:
            self.at += 1
            return self.tokens[self.at - 1]
        return None

    def take(self, wanted: str) -> None:
        if self.next_of(wanted) is None:
            raise SyntaxError(self.tokens[self.at])

    def sum(self, depth: int) -> Number:
        value = self.product(depth)
        while sign := self.next_of("+", "-"):
            value = _apply(sign, value, self.product(depth))
        return value

    def product(self, depth: int) -> Number:
        value = self.factor(depth)
        while sign := self.next_of("*", "/", "//"):
            value = _apply(sign, value, self.factor(depth))
        return value

    def factor(self, depth: int) -> Number:
        if depth > DEEPEST:
            raise OutOfBounds
        if sign := self.next_of("+", "-"):
            value = self.factor(depth + 1)
            return -value if sign == "-" else value
        base = self.atom(depth)
        return _apply("**", base, self.factor(depth + 1)) if self.next_of("**") else base

    def atom(self, depth: int) -> Number:
        if self.next_of("("):
            value = self.sum(depth + 1)
            self.take(")")
            return value
        token = self.tokens[self.at]
        self.at += 1
        if not token or token in "+-*//**()":
            raise SyntaxError(token)
        return float(token) if "." in token else int(token)


def _apply(sign: str, left: Number, right: Number) -> Number:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if sign == "**" else left.bit_length() + right.bit_length()
        if sign in ("*", "**") and abs(left) > 1 and bits > LARGEST:
            raise OutOfBounds
    return _APPLY[sign](left, right)
