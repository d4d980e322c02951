"""Equality of LaTeX answers: spellings by hand, ours and d1's."""

from fractions import Fraction

import pytest

from dllm_rl.tasks.answers import (
    MAX_ANSWER_LENGTH,
)
from dllm_rl.tasks.math.latex import as_list, normalize, rational, same_in_d1


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("\\frac12", "\\frac{1}{2}", True),
        ("\\frac1{23}", "\\frac{1}{23}", True),
        ("\\frac12+\\frac3", "\\frac12+\\frac3", True),
        ("\\frac12+\\frac3", "\\frac{1}{2}+\\frac3", False),  # a short \\frac leaves every \\frac as it is
        ("\\sqrt2\\sqrt{3}", "\\sqrt{2}\\sqrt{3}", True),
        ("\\sqrt 3", "\\sqrt{3}", False),  # the space goes into the root
        ("3/4", "\\frac{3}{4}", True),
        ("3/04", "\\frac{3}{4}", False),
        ("x/4 ", "x/4 ", True),  # no integers: as they are
        ("x/4 ", "x/4", False),
        ("1/2/3", " 1/2/3", True),  # two slashes: no fraction
        ("5\\text{ cm}", "5", True),
        ("5\\text{ cm}\\text{ or}", "5", False),
        ("x=.5", ".5", False),  # ".5" behind a name gets no zero
        (".5", "0.5", True),
        ("", "\\!", True),
        ("1" + " " * MAX_ANSWER_LENGTH, "1", False),
    ],
)
def test_sameness_in_d1(answer: str, reference: str, same: bool) -> None:
    assert same_in_d1(answer, reference) == same


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("\\frac{a}12", "\\frac{a}12"),  # a braced numerator is left alone
        ("\\frac1{23}", "\\frac{1}{23}"),
        ("\\frac12+\\frac34", "\\frac{1}{2}+\\frac{3}{4}"),
        ("\\sqrt2\\sqrt{3}", "\\sqrt{2}\\sqrt{3}"),
        ("3/4", "\\frac{3}{4}"),
        ("-3/4", "\\frac{-3}{4}"),
        ("03/4", "03/4"),
        ("a/4", "a/4"),
        ("x=0.5", "\\frac{1}{2}"),
        ("x=.5", ".5"),
        ("xy=5", "5"),
        ("xyz=5", "xyz=5"),  # no name is so long
        ("AB = 5", "5"),
        ("x  =5", "5"),
        ("xyz = 5", "xyz=5"),
        ("11,\\! 111,\\!  111", "11,111,111"),  # TeX ignores blanks after the command
        ("\\tfrac34", "\\frac{3}{4}"),
        ("\\dfrac{3}4", "\\frac{3}4"),
        ("a=b=c", "a=b=c"),
        ("10\\\\text{ m}", "10"),
        ("", ""),
        ("\\frac", "\\frac"),
        ("\\sqrt", "\\sqrt"),
    ],
)
def test_normalization(answer: str, same: str) -> None:
    assert normalize(answer) == same


def test_rationals() -> None:
    assert rational("-\\frac{3}{6}") == Fraction(-1, 2) == rational("-0.5") == rational("\\frac{-1}{2}")
    assert rational("\\frac{1}{0}") is None and rational("\\pi") is None
    assert rational("1/3") == Fraction(1, 3)
    assert rational("11,\\! 111,\\!111") == 11111111 == rational("11,111,111")
    assert rational("11, 111") is None, "a list"


def test_a_joint_before_the_end_of_a_sentence_joins_nothing() -> None:
    assert as_list("5\\text{ or }6.") == "5, 6."
    for answer in ("5 \\text{ or } .", "5 \\text{ and } ", "\\text{ or } 5"):
        assert as_list(answer) == answer
