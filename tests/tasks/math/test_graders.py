"""Mathematics: rational answers without a tolerance, references, and d1's training reward."""

from fractions import Fraction

import pytest

from dllm_rl.tasks.math.graders import (
    GSM8K_GRADERS,
    MATH500_GRADERS,
    gsm8k_d1_training,
    math500_strict,
    reference_number,
)


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


def test_reference_numbers() -> None:
    assert reference_number("so 3\n#### 1,000") == 1000 and reference_number(18.5) == Fraction(37, 2)
    with pytest.raises(ValueError, match="no number"):
        reference_number("#### x")


LAID_OUT = "<reasoning>\nwork\n</reasoning>\n<answer>\n42\n</answer>\n"


@pytest.mark.parametrize(
    ("completion", "correct", "integer", "strict", "soft", "tags"),
    [
        (LAID_OUT, 2.0, 0.5, 0.5, 0.5, 0.5),
        (LAID_OUT + "\n", 2.0, 0.5, 0.5, 0.5, 0.5),
        (LAID_OUT.replace("42", "41"), 0.0, 0.5, 0.5, 0.5, 0.5),
        (LAID_OUT.replace("42", "42.0"), 0.0, 0.0, 0.5, 0.5, 0.5),
        (LAID_OUT + "x", 2.0, 0.5, 0.0, 0.5, 0.5),
        (LAID_OUT[:-1], 2.0, 0.5, 0.0, 0.5, 0.5),
        ("\n" + LAID_OUT, 2.0, 0.5, 0.0, 0.0, 0.5),
        ("<reasoning>work</reasoning> <answer>42</answer>", 2.0, 0.5, 0.0, 0.5, 0.0),
        ("<reasoning>work</reasoning> so <answer>42</answer>", 2.0, 0.5, 0.0, 0.0, 0.0),
        ("<answer>\n42\n</answer>", 2.0, 0.5, 0.0, 0.0, 0.125),
        ("\n<answer>\n42\n</answer>", 2.0, 0.5, 0.0, 0.0, 0.25),
        (LAID_OUT.replace("42", "41") + "<answer>42</answer>", 2.0, 0.5, 0.0, 0.5, 0.5),
        (LAID_OUT * 2, 2.0, 0.5, 0.5, 0.5, 0.0),
        ("42", 2.0, 0.5, 0.0, 0.0, 0.0),
        ("<reasoning>\n</reasoning>\n<answer>\n</answer>\n", 0.0, 0.0, 0.0, 0.5, 0.5),
        ("", 0.0, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_d1s_gsm8k_training_reward(
    completion: str, correct: float, integer: float, strict: float, soft: float, tags: float
) -> None:
    graded = gsm8k_d1_training({"answer": "#### 42"}, completion)
    terms = {"correct": correct, "integer": integer, "strict": strict, "soft": soft, "tags": tags}
    assert graded.breakdown == {"accuracy": float(correct == 2.0), **terms}
    assert graded.value == sum(terms.values())
    assert graded.parsed == ("<answer>" in completion)


@pytest.mark.parametrize(
    ("graders", "protocol", "groups"),
    [
        (GSM8K_GRADERS, "strict", [["7", "7.0", "$7", "007"], ["0", "-0"], ["8"], ["?", ""]]),
        (GSM8K_GRADERS, "d1", [["7", "7.0", "so 7"], ["0", "-0.0"], ["8"], ["?", ""]]),
        (GSM8K_GRADERS, "espo", [["7", "x 007"], ["8"], ["?", ""]]),
        (MATH500_GRADERS, "strict", [["1/2", "0.50", "\\frac12"], ["x=2\\pi", "2 \\pi"], ["\\pi"], [""]]),
        (MATH500_GRADERS, "d1", [["1/2", "0.5", "\\frac12"], ["0.50"], ["x=2\\pi", "2 \\pi"], ["1/x"], ["1/y"], [""]]),
    ],
)
def test_equal_answers_are_one_vote(graders, protocol, groups) -> None:
    found = []
    for group in groups:
        (spelling,) = {graders[protocol]({"answer": "42"}, f"\\boxed{{{text}}}").answer for text in group}
        found.append(spelling)
    assert len(set(found)) == len(groups)
    assert [spelling == "" for spelling in found] == ["" in group for group in groups]
    assert graders[protocol]({"answer": "42"}, "no answer").answer == ""


def test_math_verify_names_no_equal_answers() -> None:
    assert MATH500_GRADERS["math-verify"]({"answer": "42"}, "").answer is None
