"""The strict grader of MATH500 compares numbers as fractions, without a tolerance."""

import pytest

from dllm_rl.tasks.math.graders import math500_strict


@pytest.mark.parametrize(
    ("reference", "answer", "value"),
    [
        (r"\frac{1}{3}", "0.3333333", 0.0),
        (r"\frac{1}{3}", "0.33333333333333333333", 0.0),
        ("0.3333333", "1/3", 0.0),
        (r"\frac{1}{3}", "1/3", 1.0),
        (r"\frac{1}{2}", "0.50", 1.0),
    ],
)
def test_strict_compares_rational_numbers_exactly(reference, answer, value) -> None:
    """A third is no decimal, however many threes: a tolerance would let 0.3333333 through."""
    graded = math500_strict({"answer": reference}, rf"so \boxed{{{answer}}}")
    assert (graded.parsed, graded.value) == (True, value)
