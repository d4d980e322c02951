"""Arithmetic as Python evaluates it, against a walk over Python's own syntax tree: no text is evaluated here either."""

import ast
import math
import operator
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_rl.tasks.countdown.expressions import DEEPEST, LARGEST_PYTHON, LONGEST_PYTHON, OutOfBounds, python_value

BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


def reference(text: str) -> int | float | complex | None:
    """The value by walking ast.parse's tree; None where d1 or Python refuses the text or evaluating it would raise."""
    if not re.fullmatch(r"[\d+\-*/().\s]+", text):  # d1's own check
        return None

    def walk(node: ast.expr) -> int | float | complex:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.UnaryOp):
            return -walk(node.operand) if isinstance(node.op, ast.USub) else +walk(node.operand)
        if isinstance(node, ast.BinOp):
            return BINARY[type(node.op)](walk(node.left), walk(node.right))
        raise TypeError(node)

    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text.strip().lstrip(" \t"), mode="eval").body
        return walk(tree)
    except (SyntaxError, ArithmeticError, TypeError, ValueError):
        return None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("1+2*3", 7),
        ("8-3-2", 3),
        ("2**3**2", 512),  # from the right
        ("-2**2", -4),  # the power binds tighter than the sign before it
        ("2**-1", 0.5),
        ("2*-3", -6),
        ("--5", 5),
        ("+-+5", -5),
        ("7//2", 3),
        ("-7//2", -4),
        ("7.5//2", 3.0),
        ("6/3", 2.0),
        ("1/3*3", 1.0),
        ("5.", 5.0),
        (".5", 0.5),
        ("03.5", 3.5),
        ("00", 0),
        ("0*5", 0),
        (" \u2003( 10 )\r\n", 10),
        ("(1\n+\n2)", 3),
        ("(\t1\f+2)", 3),
        ("10**10/10**9", 10.0),
        ("1" * 400 + ".", math.inf),
    ],
)
def test_values_worked_by_hand(text: str, value: float) -> None:
    found = python_value(text)
    assert found == value and type(found) is type(value)


def test_a_root_of_a_negative_number_is_complex() -> None:
    found = python_value("(-8)**(1/3)")
    assert isinstance(found, complex) and abs(found - complex(1, math.sqrt(3))) < 1e-12


REFUSED = [
    *["", " ", "()", "(1", "1)", "1 2", "2(3)", "(2)(3)", "2()", "3+", "*3", "(*3)", "1++", "1.2.3", "1 .5"],
    *[".", "...", "***", "03", "007+1", "1_000", "1e3", "0x10", "5%3", "1=1", "2^3", "x", "1,2", "~1"],
    *["1\n+2", "1+\n2", "(1)\r\n*2", "\uff13+1", "\u0663", "1\x0b+2", "(1\u00a0+2)", "1\x00", "3***2", "7///2"],
    *["1/0", "0**-1", "1.0//0", "10.0**999", "9**999/9.0**2", "(-8)**.5//2", "9" * 500 + "*1.0"],
    *["__import__('os').abort()", "(lambda:1)()"],
]


@pytest.mark.parametrize("text", REFUSED)
def test_where_python_raises_there_is_no_value(text: str) -> None:
    assert python_value(text) is None
    assert reference(text) is None


def test_bounds() -> None:
    half = LARGEST_PYTHON // 2
    for fits, beyond in [
        ("1" + " " * (LONGEST_PYTHON - 2) + "1", "1" + " " * LONGEST_PYTHON + "1"),
        ("(" * DEEPEST + "1" + ")" * DEEPEST, "(" * (DEEPEST + 1) + "1" + ")" * (DEEPEST + 1)),
        ("-" * DEEPEST + "1", "-" * (DEEPEST + 1) + "1"),
        (
            f"2**{half}",
            f"2**{half + 1}",
        ),  # two bits to a power of 2: the bound counts both
        (
            f"2**{half - 1}*2**{half - 1}",
            f"2**{half}*2**{half}",
        ),
        (f"1**{10**100}", "9**9**9"),
        ("2.0**1023", "9**9**9**9"),
    ]:
        python_value(fits)
        with pytest.raises(OutOfBounds):
            python_value(beyond)
    assert python_value("1**" + "9" * 100) == 1 and python_value("(0-1)**" + "9" * 99) == -1


TEXTS = st.text(alphabet="0123456789+-*/(). \n", max_size=14)
TREES = st.recursive(
    st.one_of(st.integers(0, 12).map(str), st.sampled_from(["0.5", "3.", ".25", "00", "1.75"])),
    lambda inner: st.one_of(
        st.builds("({}{}{})".format, inner, st.sampled_from(["+", "-", "*", "/", "//"]), inner),
        st.builds("{} {} {}".format, inner, st.sampled_from(["+", "-", "*", "/", "//"]), inner),
        st.builds("{}**{}".format, inner, st.sampled_from(["2", "-1", ".5", "(1/3)", "0"])),
        st.builds("{}{}".format, st.sampled_from("+-"), inner),
    ),
    max_leaves=7,
)


@given(st.one_of(TEXTS, TREES))
@settings(max_examples=120, deadline=None)
def test_agrees_with_pythons_syntax_tree(text: str) -> None:
    try:
        found = python_value(text)
    except OutOfBounds:  # what the walk must not compute
        return
    expected = reference(text)
    assert type(found) is type(expected)
    assert found == expected or (found != found and expected != expected)
