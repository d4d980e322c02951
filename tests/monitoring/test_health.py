"""What a step is said to be on the screen."""

import pytest
from tiny_recipe import tiny_recipe

from dllm_rl.monitoring.health import health
from dllm_rl.monitoring.progress import one_line
from dllm_rl.training.trainer import train

GOOD = {
    "rollout_corr/ess": 0.95,
    "off_policy/old/contribution_positive": -0.004,
    "off_policy/rollout/contribution_negative/iteration_0": 0.005,
    "off_policy/rollout/m2": 2.0,
}


@pytest.mark.parametrize(
    ("changes", "word", "reason"),
    [
        ({}, "healthy", "ESS 0.95, C at most +0.005 (A<0, against the rollout)"),
        ({"rollout_corr/ess": 0.949}, "mild", "ESS 0.949 below 0.95, C at most"),
        ({"rollout_corr/ess": 0.7}, "mild", "ESS 0.7 below 0.95"),
        ({"rollout_corr/ess": 0.699}, "strong", "ESS 0.699 below 0.7"),
        (
            {"off_policy/old/contribution_positive": 0.0051},
            "backfiring",
            "C +0.0051 (A>0, against the step's start) above 0.005, ESS 0.95",
        ),
        (
            {"off_policy/rollout/contribution_negative/iteration_0": 0.0051},
            "backfiring",
            "C +0.0051 (A<0, against the r",
        ),
        (
            {"rollout_corr/ess": 0.5, "off_policy/rollout/contribution_negative": 1.0},
            "backfiring",
            "C +1 (A<0, against the rollout) above 0.005, ESS 0.5 below 0.7",
        ),
    ],
)
def test_health(changes, word, reason):
    said = health(GOOD | changes)
    assert said[0] == word and said[1].startswith(reason)
    shown = "healthy" if word == "healthy" else f"mismatch {word} ({said[1]})"
    assert one_line(GOOD | changes | {"reward": 0.5}) == f"reward 0.5  {shown}"


def test_without_mismatch_metrics_nothing_is_said():
    assert health({"loss": 1.0}) is None and one_line({"reward": 1.0}) == "reward 1"
    assert health({"rollout_corr/ess": 1.0}) == ("healthy", "ESS 1")


def test_a_run_says_how_it_is(tmp_path, capsys):
    train(tiny_recipe(tmp_path, num_steps=1, rollout_quantization=None))
    assert "  healthy" in capsys.readouterr().out
