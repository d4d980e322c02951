"""Scanners of answers, on texts on which two of them differ."""

from fractions import Fraction

import pytest
from linear import linear_time

from dllm_rl.tasks.answers import (
    MAX_ANSWER_LENGTH,
    MAX_BOXES,
    MAX_SEARCH_LENGTH,
    d1_box,
    exact_number,
    first_boxed_number,
    first_closed_answer,
    last_answer,
    last_box,
    last_closed_answer,
    number_in,
)


@pytest.mark.parametrize(
    ("find", "found"), [(first_closed_answer, "a<answer>b"), (last_closed_answer, "a<answer>b"), (last_answer, "b")]
)
def test_a_nested_answer(find, found):
    """A pair begins at its first tag; what has no end tag to find begins at the last."""
    assert find("<answer>a<answer>b</answer>") == found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", Fraction(42)),
        ("-42", Fraction(-42)),
        ("+1,234.50.", Fraction(2469, 2)),
        ("$-5", Fraction(-5)),
        ("-$5", Fraction(-5)),
        ("\\$5", Fraction(5)),
        (".5", Fraction(1, 2)),
        ("-$-5", None),
        ("12,34", None),
        ("1,2345", None),
        ("1e3", None),
        ("5 %", None),
        ("\u0665", None),
        ("", None),
        ("nan", None),
        ("1" * 101, None),
    ],
)
def test_exact_numbers(text: str, value: Fraction | None) -> None:
    assert exact_number(text) == value


def test_numbers_in_text() -> None:
    assert number_in("12 and -7.", -1) == -7.0 and number_in("1.2.3", -1) == 3.0 and number_in("1e2", -1) == 100.0
    assert number_in("12 and -7.", 0) == 12.0 and number_in("1.2.3", 0) == 1.2
    assert number_in("none", -1) is None and number_in("1 2" + " " * MAX_SEARCH_LENGTH, -1) is None
    assert first_boxed_number("\\boxed{3 \\boxed{4}") == 3.0
    assert first_boxed_number("\\boxed{x \\boxed{4}") == 4.0
    assert first_boxed_number("\\boxed{3\n\\boxed{4}") == 4.0  # the first is not closed within its line
    assert first_boxed_number("\\boxed{3\n} \\boxed{x}") is None
    assert first_boxed_number("\\boxed{3") is None and first_boxed_number("") is None
    assert first_boxed_number("\\boxed{" + "x" * MAX_SEARCH_LENGTH + "1} \\boxed{2}") == 2.0
    for skipped in ("\\boxed{}", "\\boxed{x}", "\\boxed{\n"):
        assert first_boxed_number(skipped * (MAX_BOXES - 1) + "\\boxed{2}") == 2.0
        assert first_boxed_number(skipped * MAX_BOXES + "\\boxed{2}") is None


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("no box", "no box"),
        ("", ""),
        ("\\boxed{1} \\boxed{2}", "2"),
        ("\\boxed{a{b}c} d}", "a{b}c"),
        ("\\boxed{1} \\boxed{2", None),
        ("\\boxed", None),
        ("\\boxed{}", ""),
        ("\\boxed 1$ \\boxed{2} \\boxed 3$4$", "3"),
        ("\\boxed{2} \\boxed", None),
        ("\\boxed\n{2} 3", "\\boxed\n{2}"),
        ("\\boxed }{2} {{3}}", "}{2} {{3}}"),  # a space behind the command: all of it
        ("\\boxed}{2} {{3}}", "\\boxed}{2} {{3}"),  # -1, 0, -1, 0, 1, 0: zero at a closing brace
        ("\\fbox{1}", "\\fbox{1}"),
        ("\\fbox{1} \\boxed{2}", "2"),
        ("\\boxed{" + "x" * MAX_SEARCH_LENGTH + "}", None),
    ],
)
def test_d1s_last_box(text: str, content: str | None) -> None:
    assert d1_box(text) == content


def test_boxes_are_balanced() -> None:
    assert last_box("\\boxed{a{b}c} d}") == "a{b}c"
    assert last_box("\\boxed{1} \\boxed{2") is None
    assert last_box("\\fbox{1}") == "1"
    assert last_box("\\boxed{" + "x" * MAX_ANSWER_LENGTH + "}") is None


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{12}, no: \\boxed {11}", "11"),
        ("\\boxed{12}, no: \\boxed\n  {1{1}}", "1{1}"),
        ("\\fbox{12}, no: \\fbox\t{11}", "11"),
        ("\\boxed {12} \\fbox{11}", "12"),
        ("\\boxed{12}, no: $\\boxed 11$.", "11"),
        ("\\boxed{12}, no: \\boxed -1,100. That is it.", "-1,100"),
        ("\\boxed{12}, no: \\(\\boxed\\frac12\\)", "\\frac12"),
        ("\\boxed{12}, no: \\boxed x", "x"),
        ("\\boxed{12}, no: \\boxed {11", None),
        ("\\boxed{12} (I used \\boxed as asked.)", "12"),  # a mention of the command is no box
        ("\\boxed{12} in `\\boxed`.", "12"),
        ("\\boxed{12} \\boxedtext {11}", "12"),  # another command
    ],
)
def test_a_box_is_read_as_tex_reads_it(text: str, content: str | None) -> None:
    assert last_box(text) == content


@pytest.mark.parametrize("piece", ["\\boxed", "\\boxed" + " " * 300, "\\boxed 1.", "\\boxed x" + " " * 300 + "."])
def test_boxes_are_found_in_linear_time(piece: str) -> None:
    with linear_time():
        last_box(piece * (10**5 // len(piece)))
