"""What a step is said to be on the screen."""

import pytest
from tiny_recipe import tiny_recipe

from dllm_rl.training.log import health, one_line
from dllm_rl.training.loop import train

GOOD = {
    "rollout_corr/ess": 0.95,
    "off_policy/old/contribution_positive": -0.004,
    "off_policy/rollout/contribution_negative/iteration_0": 0.005,
    "off_policy/rollout/m2": 2.0,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "healthy"),
        ({"rollout_corr/ess": 0.949}, "mismatch"),
        ({"rollout_corr/ess": 0.7}, "mismatch"),
        ({"rollout_corr/ess": 0.699}, "strong mismatch"),
        ({"off_policy/old/contribution_positive": 0.0051}, "updates backfire"),
        ({"off_policy/rollout/contribution_negative/iteration_0": 0.0051}, "updates backfire"),
        (
            {"rollout_corr/ess": 0.5, "off_policy/rollout/contribution_negative": 1.0},
            "strong mismatch, updates backfire",
        ),
    ],
)
def test_health(changes, said):
    assert health(GOOD | changes) == said
    assert one_line(GOOD | changes | {"loss": 0.5}) == f"loss 0.5  {said}"


def test_without_mismatch_metrics_nothing_is_said():
    assert health({"loss": 1.0}) == "" and one_line({"loss": 1.0}) == "loss 1"


def test_a_run_says_how_it_is(tmp_path, capsys):
    train(tiny_recipe(tmp_path, num_steps=1, rollout_quantization=None))
    assert "  healthy" in capsys.readouterr().out
