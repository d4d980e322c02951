"""What a step is said to be on the screen."""

import re
from functools import partial

import pytest
from run_outputs import metrics_of
from tiny_recipe import tiny_recipe, with_changes

from dllm_rl import grpo, tiny_masked_lm
from dllm_rl.algorithms.losses import PPOClip
from dllm_rl.likelihoods.estimators import OneStep
from dllm_rl.monitoring.health import health
from dllm_rl.monitoring.record import RunRecord
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")

GOOD = {
    "rollout_corr/ess": 0.95,
    "off_policy/old/contribution_positive": -0.004,
    "off_policy/rollout/contribution_negative/iteration_0": 0.005,
    "off_policy/rollout/m2": 2.0,
}


def line_of(*rows, exact=True):
    return RunRecord(rows, exact=exact).line()


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
        ({"update/direction": -1.0}, "healthy", "ESS 0.95"),  # one value says little
    ],
)
def test_health(changes, word, reason):
    said = health(GOOD | changes)
    assert said[0] == word and said[1].startswith(reason)
    shown = "healthy" if word == "healthy" else f"mismatch {word} ({said[1]})"
    before, row = [GOOD] * 19, {"reward": 0.5} | GOOD | changes
    assert line_of(*before, row) == f"reward 0.5  {shown}"
    assert line_of(*before[1:], row) == f"reward 0.5  {shown}".removesuffix("  healthy"), (
        "whether it learns is not known yet"
    )


def test_updates_that_go_backwards_come_before_any_mismatch():
    for metrics in (GOOD, {"loss": 1.0}):
        assert health(metrics, direction=-0.26)[0] == "backwards" != (health(metrics, direction=-0.25) or "none")[0]
    assert line_of(*[GOOD | {"update/direction": -0.5}] * 3).startswith("updates backwards (worse answers")


def test_estimated_ratios_have_no_bounds():
    """Segments, `one_step` and ELBOs compare two estimates: only the change within the run says something."""
    for ess in (0.99, 0.9, 0.1):
        metrics = GOOD | {"rollout_corr/ess": ess}
        assert health(metrics, first_ess=0.7) == ("estimated", f"ESS {ess}, 0.7 in the first step")
    assert health(GOOD | {"off_policy/old/contribution_positive": 1.0}, first_ess=0.7)[0] == "backfiring"


def test_the_mismatch_stands_in_the_line_and_the_ess_once():
    row = {"reward": 1.0, "rollout_corr/ess": 0.99853, "rollout_corr/abs_log_ratio_mean": 0.01234}
    assert line_of(row) == "reward 1  mismatch 0.012 nats, ESS 0.9985"
    for ess, shown in [(0.94, "mild (ESS 0.94 below 0.95)"), (0.5, "strong (ESS 0.5 below 0.7)")]:
        assert line_of(row | {"rollout_corr/ess": ess}) == f"reward 1  mismatch 0.012 nats, {shown}"
    assert line_of(row, exact=False) == "reward 1  mismatch 0.012 nats, ESS 0.999, 0.999 in the first step"
    backwards = line_of(*[row | {"update/direction": -0.5}] * 3)
    assert backwards.startswith("reward 1  mismatch 0.012 nats, ESS 0.9985  updates backwards (")
    for none in (0.0, 6e-8):  # the rounding of two forwards
        row |= {"rollout_corr/ess": 1.0, "rollout_corr/abs_log_ratio_mean": none}
        for exact in (True, False):
            assert line_of(*[row] * 20, exact=exact) == "reward 1  healthy"


def test_without_mismatch_metrics_nothing_is_said():
    assert health({"loss": 1.0}) is None and line_of(*[{"reward": 1.0}] * 30) == "reward 1"
    assert health({"rollout_corr/ess": 1.0}) == ("healthy", "ESS 1")


def test_a_resumed_run_compares_with_its_first_step(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path, num_steps=1, logging_steps=1, likelihood=OneStep())
    train(recipe)
    resumed = {"num_steps": 2, "lr_schedule_steps": 1, "resume_from_checkpoint": "latest"}
    train(with_changes(recipe, **resumed))
    first = f"{metrics_of(tmp_path)[0]['rollout_corr/ess']:.3g}"
    assert re.findall(r" ESS [\d.]+, ([\d.]+) in the first step", capsys.readouterr().out) == [first] * 2


def of_the_wrong_sign(log_ratio, advantages, mask):
    return -PPOClip()(log_ratio, advantages, mask)


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("loss", [of_the_wrong_sign, PPOClip()])
def test_a_loss_of_the_wrong_sign_is_seen_with_one_update_a_rollout(loss, tmp_path, capsys, monkeypatch):
    assert [tiny_recipe("x").update_settings(step).measure for step in range(6)] == [False] * 4 + [
        True,
        False,
    ]
    monkeypatch.setattr("dllm_rl.step.settings.MEASURE_STEPS", 1)
    rows = [{"prompt": f"{a}{b}=", "answer": f"{b}{a}"} for a in "12345678" for b in "12345678"]

    def right(completions, answer, **columns):
        return [sum(map(str.__eq__, *pair)) / 2 for pair in zip(completions, answer, strict=True)]

    model = partial(tiny_masked_lm, characters="12345678=", hidden_size=32, num_layers=1, num_attention_heads=2)
    sizes = {"max_new_tokens": 2, "train_batch_size": 8, "num_generations": 8, "learning_rate": 1e-2}
    grpo(model, rows, right, loss=loss, num_steps=4, logging_steps=1, output_dir=str(tmp_path), **sizes)
    measured = [row["update/direction"] for row in metrics_of(tmp_path)]
    wrong = loss is of_the_wrong_sign
    assert (sum(measured[:3]) / 3 < -0.25) == wrong == (sum(measured[1:]) / 3 < -0.25), measured
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training ")]
    assert ["  updates backwards (worse answers" in line for line in lines] == [False, False, wrong, wrong]
    assert "mismatch" not in lines[0], "ratios are 1 where they are measured before the update"
