"""Arithmetic from a model, evaluated exactly and within bounds: + - * /, unary minus, parentheses and integers.

Nothing is ever passed to Python's own evaluator. The text is cut into tokens and read by a small recursive parser:

    sum     = product (("+" | "-") product)*
    product = factor (("*" | "/") factor)*
    factor  = "-" factor | "(" sum ")" | integer
"""

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 500  # characters
DEEPEST = 40  # parentheses and signs within one another
LARGEST = 10**40  # of any numerator or denominator on the way

_TOKEN = re.compile(r"[ \t\n\r\f]*(?:([0-9]+)|([-+*/()]))")
_SPACE = " \t\n\r\f"


@dataclass(frozen=True)
class Value:
    """What an expression is worth, and the integers that stand in it, from left to right."""

    value: Fraction
    numbers: tuple[int, ...]


def evaluate(text: str) -> Value | None:
    """The exact value of an expression; None for anything else, for a division by zero, and beyond the bounds.

    As in Python an integer has no leading zero, ** and // are no operators here, and juxtaposition is no product.
    """
    tokens = _tokens(text)
    if not tokens:
        return None
    reader = _Reader(tokens)
    value = reader.sum(0)
    if value is None or reader.at != len(tokens):
        return None
    return Value(value, tuple(int(token) for token in tokens if token.isdigit()))


def _tokens(text: str) -> list[str] | None:
    if len(text) > LONGEST:
        return None
    text = text.strip(_SPACE)
    tokens, at = [], 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            return None
        token = found[1] or found[2]
        if found[1] and token != "0" and token[0] == "0":
            return None
        tokens.append(token)
        at = found.end()
    return tokens


class _Reader:
    """A place in a list of tokens. Its methods return None as soon as the text is no expression."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def take(self, *wanted: str) -> str | None:
        if self.at < len(self.tokens) and self.tokens[self.at] in wanted:
            self.at += 1
            return self.tokens[self.at - 1]
        return None

    def sum(self, depth: int) -> Fraction | None:
        value = self.product(depth)
        while value is not None and (operator := self.take("+", "-")):
            value = apply(operator, value, self.product(depth))
        return value

    def product(self, depth: int) -> Fraction | None:
        value = self.factor(depth)
        while value is not None and (operator := self.take("*", "/")):
            value = apply(operator, value, self.factor(depth))
        return value

    def factor(self, depth: int) -> Fraction | None:
        if depth > DEEPEST or self.at == len(self.tokens):
            return None
        if self.take("-"):
            value = self.factor(depth + 1)
            return None if value is None else -value
        if self.take("("):
            value = self.sum(depth + 1)
            return value if self.take(")") else None
        token = self.tokens[self.at]
        self.at += 1
        return Fraction(int(token)) if token.isdigit() and len(token) <= 40 else None


def apply(operator: str, left: Fraction, right: Fraction | None) -> Fraction | None:
    """left operator right; None without a right, for a division by zero, and beyond LARGEST."""
    if right is None or (operator == "/" and right == 0):
        return None
    if operator == "+":
        value = left + right
    elif operator == "-":
        value = left - right
    elif operator == "*":
        value = left * right
    else:
        value = left / right
    return value if max(abs(value.numerator), value.denominator) <= LARGEST else None
