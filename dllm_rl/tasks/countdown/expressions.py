"""Arithmetic from a model, evaluated exactly and within bounds: + - * /, unary minus, parentheses and integers."""

import re
from dataclasses import dataclass
from fractions import Fraction

from dllm_rl.tasks.countdown.python_arithmetic import OPERATORS, OutOfBounds, Reader

LONGEST = 500  # characters
LARGEST = 10**40  # of any numerator or denominator on the way

_TOKEN = re.compile(r"[ \t\n\r\f]*(0(?![0-9])|[1-9][0-9]*|[-+*/()])")


@dataclass(frozen=True)
class Value:
    """The value of an expression, and its integers from left to right."""

    value: Fraction
    numbers: tuple[int, ...]


def evaluate(text: str) -> Value | None:
    """The exact value of an expression; None for any other text, a division by zero, and beyond the bounds.

    As in Python, an integer has no leading zero. ** and // are no operators here, and juxtaposition is no product.
    """
    if len(text) > LONGEST:
        return None
    text = text.strip(" \t\n\r\f")
    tokens: list[str] = []
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            return None
        tokens.append(found[1])
        at = found.end()
    try:
        value = Reader([*tokens, ""], signs=("-",), number=_integer, apply=apply).value()
    except (SyntaxError, ZeroDivisionError, OutOfBounds):
        return None
    return Value(value, tuple(int(token) for token in tokens if token.isdigit()))


def _integer(digits: str) -> Fraction:
    if len(digits) > 40:  # int() of a long text takes quadratic time
        raise OutOfBounds
    return Fraction(int(digits))


def apply(operator: str, left: Fraction, right: Fraction) -> Fraction:
    """left operator right. Errors: ZeroDivisionError; OutOfBounds beyond LARGEST."""
    value = OPERATORS[operator](left, right)
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise OutOfBounds
    return value
