"""Countdown's rewards, worked by hand."""

import pytest

from dllm_rl.tasks.base import Problem
from dllm_rl.tasks.countdown import Countdown
from dllm_rl.tasks.countdown.graders import countdown_strict

ASKED = Problem(prompt="", fields={"numbers": [3, 4, 5], "target": 17})


@pytest.mark.parametrize(
    ("completion", "value", "parsed"),
    [
        ("3*4+5    ", 1.2, True),
        ("(4*3) + 5", 1.2, True),
        ("5+4*3", 1.2, True),
        ("3+4+5", 0.2, True),  # each number once, worth 12
        ("3*4", 0.2 * 2 / 3, True),  # two of the three
        ("3*4+5+0", 0.2 * 3 / 4, True),  # three of the three, and one too many
        ("17", 0.0, True),
        ("3*4+5=17", 0.0, False),
        ("$3*4+5$", 1.2, True),
        ("<answer>\\(3 \\times 4 + 5\\)</answer>", 1.2, True),
        ("\\boxed{$3\\cdot 4+5$}", 1.2, True),
        ("\uff13\u22174\uff0b5", 1.2, True),
        ("$3*4+5$ or $1$", 0.0, False),
        ("3 4 5", 0.0, False),
        ("3**4+5", 0.0, False),
        ("", 0.0, False),
    ],
)
def test_reward_worked_by_hand(completion: str, value: float, parsed: bool) -> None:
    graded = Countdown().reward(ASKED, completion)
    assert graded.value == pytest.approx(value) and graded.parsed == parsed


@pytest.mark.parametrize("dash", "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d")
@pytest.mark.parametrize("slash", "/\u00f7\u2215\u2044\uff0f")
def test_operators_as_they_are_printed(dash: str, slash: str) -> None:
    fields = {"numbers": [50, 20, 7, 1], "target": 23}
    assert countdown_strict(fields, f"<answer>50{dash}20 {dash} 7{slash}1</answer>").value == 1.0


def test_a_number_given_twice_must_stand_twice() -> None:
    twice = Problem(prompt="", fields={"numbers": [5, 5, 2], "target": 7})
    assert Countdown().reward(twice, "5+2").breakdown == {"accuracy": 0.0, "valid": 0.0, "numbers_used": 2 / 3}
    once = Problem(prompt="", fields={"numbers": [5, 2], "target": 7})
    assert Countdown().reward(once, "5+2+5-5").breakdown == {"accuracy": 0.0, "valid": 0.0, "numbers_used": 1 / 2}


def test_reward_by_d1s_rule() -> None:
    task = Countdown(reward_rule="d1", prompt_format="text")
    for completion, value in [
        ("3*4+5", 0.0),
        ("<answer>3*4+5", 0.0),
        ("<answer>nonsense</answer>", 0.1),
        ("<answer>3+4+5</answer>", 0.1),
        ("<answer>3*4+5</answer>", 1.0),
        ("<answer>\u2003\n3*4+5\u00a0</answer>", 1.0),
        ("<answer>3*4+5</answer><answer>5</answer>", 0.1),
        ("<answer>5</answer><answer>3*4+5</answer>", 1.0),
    ]:
        assert task.reward(ASKED, completion).value == value, completion
