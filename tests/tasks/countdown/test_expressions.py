"""The arithmetic evaluator against a walk over Python's syntax tree, with the same few rules."""

import ast
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear import linear_time

from dllm_rl.tasks.countdown.expressions import (
    DEEPEST,
    LARGEST,
    MAX_EXPRESSION_LENGTH,
    OutOfBounds,
    apply,
    evaluate,
)
from dllm_rl.tasks.countdown.graders import countdown_strict

OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def reference(text: str) -> Fraction | None:
    """The value by a recursive walk over the tree of ast.parse."""
    if re.search(r"(?<!\d)0\d", text):  # Python takes "00" for 0
        return None
    try:
        tree = ast.parse(text.strip(" \t\n\r\f"), mode="eval").body
    except (SyntaxError, ValueError, MemoryError):
        return None

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right = walk(node.left), walk(node.right)
            operator = OPERATORS[type(node.op)]
            return (
                {"+": left + right, "-": left - right, "*": left * right}[operator] if operator != "/" else left / right
            )
        raise ZeroDivisionError

    try:
        return walk(tree)
    except ZeroDivisionError:
        return None


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", Fraction(7), (7,)),
        ("1+2*3", Fraction(7), (1, 2, 3)),
        ("(1+2)*3", Fraction(9), (1, 2, 3)),
        ("8-3-2", Fraction(3), (8, 3, 2)),
        ("8/4/2", Fraction(1), (8, 4, 2)),
        ("1/3*3", Fraction(1), (1, 3, 3)),
        ("1/3", Fraction(1, 3), (1, 3)),
        ("-2*3", Fraction(-6), (2, 3)),
        ("2*-3", Fraction(-6), (2, 3)),
        ("-(4-6)", Fraction(2), (4, 6)),
        ("--5", Fraction(5), (5,)),
        (" \t( 10 )\r\n", Fraction(10), (10,)),
        ("(1\n+2)", Fraction(3), (1, 2)),
        ("0*5", Fraction(0), (0, 5)),
    ],
)
def test_values_worked_by_hand(text: str, value: Fraction, numbers: tuple[int, ...]) -> None:
    assert evaluate(text) == value
    graded = countdown_strict({"numbers": list(numbers), "target": value}, text)
    assert graded.value == graded.breakdown["numbers_used"] == 1.0


NOT_EXPRESSIONS = [
    *["", " ", "()", "(1", "1)", "1 2", "2(3)", "(2)(3)", "+3", "3+", "*3", "1++", "3 4+", "1.5", ".5", "1,000", "1e3"],
    *["2**3", "9**9**9", "7//2", "5%3", "1=1", "2^3", "x", "abs(3)", "03+1", "00", "1_000", "0x10", "1/0", "1/(2-2)"],
    *["__import__('os').getcwd()", "[1][0]", "(lambda:1)()", "1 if 1 else 2", "1;2", "\uff13+1", "\u0663", "3\u00d74"],
    *["1\x0b+2", "1\u00a0+2", "1\x00"],
]


@pytest.mark.parametrize("text", NOT_EXPRESSIONS)
def test_everything_else_is_refused(text: str) -> None:
    assert evaluate(text) is None


def test_bounds() -> None:
    assert evaluate("1" * 40) is not None and evaluate("1" * 41) is None
    assert evaluate("+".join("1" * 200)) is not None
    assert (
        evaluate("1" + " " * MAX_EXPRESSION_LENGTH) is None and evaluate("1" + " " * (MAX_EXPRESSION_LENGTH - 1)) == 1
    )
    nested = "(" * DEEPEST + "1" + ")" * DEEPEST
    assert evaluate(nested) is not None and evaluate(f"({nested})") is None
    assert evaluate("-" * DEEPEST + "1") is not None and evaluate("-" * (DEEPEST + 1) + "1") is None
    assert evaluate("*".join(["10"] * 40)) == LARGEST
    assert evaluate("*".join(["10"] * 41)) is None
    assert evaluate("1/" + "/".join(["10"] * 41)) is None


def test_apply_raises_on_zero_and_beyond_its_bound() -> None:
    with pytest.raises(ZeroDivisionError):
        apply(ast.Div, Fraction(1), Fraction(0))
    with pytest.raises(OutOfBounds):
        apply(ast.Mult, Fraction(LARGEST), Fraction(10))


ALPHABET = st.text(alphabet="0123456789+-*/() \n", max_size=14)
TREES = st.recursive(
    st.integers(0, 30).map(str),
    lambda inner: st.one_of(
        st.builds("({}{}{})".format, inner, st.sampled_from("+-*/"), inner),
        st.builds("{} {} {}".format, inner, st.sampled_from("+-*/"), inner),
        st.builds("-{}".format, inner),
    ),
    max_leaves=8,
)


@given(st.one_of(ALPHABET, TREES))
@settings(max_examples=120, deadline=None)
def test_agrees_with_pythons_syntax_tree(text: str) -> None:
    assert evaluate(text) == reference(re.sub("[ \n]+", " ", text))


@pytest.mark.parametrize("piece", ["(", ")", "-", "1+", "9", "9**", "((1)", " ", "\n", "\u0663", "()"])
def test_a_million_characters_take_linear_time(piece: str) -> None:
    with linear_time():
        assert evaluate(piece * (10**6 // len(piece))) is None
