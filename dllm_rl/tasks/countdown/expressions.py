"""Evaluate arithmetic that a model wrote, without Python's `eval`. The result is exact, or Python's value for d1.

Python's own parser reads the text; only numbers and operators are evaluated.
"""

import ast
import operator
import re
import warnings
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate
from typing import Any

# Limits of `evaluate`
MAX_EXPRESSION_LENGTH = 500  # characters
LARGEST = 10**40  # largest intermediate numerator or denominator
# Limits of `python_value`
LONGEST_PYTHON = 2_000  # characters
LARGEST_PYTHON = 100_000  # bits of an intermediate integer
# Limit of both
DEEPEST = 40  # nested parentheses, and consecutive signs

Number = int | float | complex

_EXACT = re.compile(r"[-0-9+*/() ]+")
_TOO_LONG_OR_ZERO_FIRST = re.compile(r"[0-9]{41}|(?<![0-9])0[0-9]")
_PYTHON = re.compile(r"[-0-9+*/(). \t\f\n\r]+")
_SIGNS = re.compile(rf"(?:[-+]\s*){{{DEEPEST + 2}}}")  # the first may be an operator
OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
EXACT_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub)


class OutOfBounds(Exception):
    """The text is too long or too deeply nested, or an intermediate integer is too large."""


def evaluate(text: str) -> Fraction | None:
    """Return the exact value of an expression; None for any other text, a division by zero, or a limit exceeded."""
    # As in Python, an integer has no leading zero. ** and // are not operators; 2(3) is not a product.
    if len(text) > MAX_EXPRESSION_LENGTH:
        return None
    text = re.sub(r"[\t\n\r\f]", " ", text).strip(" ")
    if not _EXACT.fullmatch(text) or _TOO_LONG_OR_ZERO_FIRST.search(text):
        return None
    try:
        return Fraction(_evaluated(text, apply))
    except (SyntaxError, ZeroDivisionError, OutOfBounds):
        return None


def python_value(text: str) -> Number | None:
    """Return the value that Python's `eval` gives for the text; None if it raises. Raises OutOfBounds at the limits."""
    # d1 passes digits, + - * / ( ) . and spaces to `eval`. It accepts 2(3), () and ..., but they never give a number.
    text = text.strip()
    if len(text) > LONGEST_PYTHON:
        raise OutOfBounds
    try:
        return _evaluated(text, _python_apply) if _PYTHON.fullmatch(text) else None
    except (SyntaxError, ArithmeticError, TypeError, ValueError):  # errors that `eval` may raise
        return None


def _evaluated(text: str, apply: Callable[..., Any]) -> Any:
    """Evaluate a text of numbers, operators, parentheses and white space by apply(class of an operator, *operands).

    Raises:
        SyntaxError: The text is not an expression, or has other parts than numbers and operators.
        OutOfBounds: Nested deeper than DEEPEST. Otherwise a hostile text could exhaust the stack of Python's parser.
    """
    nesting = accumulate((character == "(") - (character == ")") for character in text)
    if max(nesting, default=0) > DEEPEST or _SIGNS.search(f"+{text}"):
        raise OutOfBounds
    with warnings.catch_warnings(action="ignore"):
        waiting: list[ast.AST] = [ast.parse(text, mode="eval").body]
    # A list in place of recursion, because 1+1+1+... is as deep as it is long.
    nodes: list[ast.AST] = []
    while waiting:
        nodes.append(node := waiting.pop())
        match node:
            case ast.UnaryOp(_, operand):
                waiting.append(operand)
            case ast.BinOp(left, _, right):
                waiting += (left, right)
    values: list[Any] = []  # of the operands that no operator has taken yet
    for node in reversed(nodes):  # operands before operators, and left before right
        match node:
            case ast.Constant(int() | float() as number):
                values.append(number)
            case ast.UnaryOp(sign, _):
                values.append(apply(type(sign), values.pop()))
            case ast.BinOp(_, symbol, _):
                right = values.pop()
                values.append(apply(type(symbol), values.pop(), right))
            case _:
                raise SyntaxError(text)
    return values.pop()


def apply(symbol: type[ast.AST], *operands: int | Fraction) -> Fraction:
    """Return the exact value of an operator. Raises SyntaxError if it is not one of EXACT_OPERATORS,
    ZeroDivisionError, and OutOfBounds beyond LARGEST.
    """
    if symbol not in EXACT_OPERATORS:
        raise SyntaxError(symbol.__name__)
    value: Fraction = OPERATORS[symbol](*map(Fraction, operands))
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise OutOfBounds
    return value


def _python_apply(symbol: type[ast.AST], *operands: Any) -> Number:
    if symbol in (ast.Mult, ast.Pow) and all(isinstance(operand, int) for operand in operands):
        # Check the size before computing: a power such as 9**9**9 must never be computed.
        left, right = operands
        bits = left.bit_length() * right if symbol is ast.Pow else left.bit_length() + right.bit_length()
        if abs(left) > 1 and bits > LARGEST_PYTHON:
            raise OutOfBounds
    value: Number = OPERATORS[symbol](*operands)
    return value
