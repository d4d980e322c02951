"""Runs of a mixture of experts: what replay asks for, what it changes, and what it says."""

from dataclasses import replace
from functools import partial

import pytest
from emulated import int3_emulated
from mixtures import sharp_moe
from repetitions import slow
from run_outputs import metrics_of
from tiny_recipe import MOE_SIZES, tiny_recipe, tiny_recipe_ar

from dllm_rl.likelihoods.estimators import ELBO
from dllm_rl.recipe import Recipe
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.dry_run.memory import PlannedStep, step_memory
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")

MOE = partial(sharp_moe, num_experts=4, head_std=0.3, **MOE_SIZES)


def moe_recipe(directory, **changes):
    settings = {"model": MOE, "rollout_quantization": int3_emulated, "eval_task": Sudoku(split="test", size=1)}
    return tiny_recipe(directory, **settings | changes)


def run(directory, make=moe_recipe, **changes):
    train(make(directory, **changes))
    return metrics_of(directory)


ONE = {"model": partial(MOE, num_layers=1)}  # whose states depend on no other position's experts


@pytest.mark.parametrize(
    "changes", [ONE, slow({"likelihood": ELBO(num_samples=2)}), slow(ONE | {"gradient_checkpointing": True})]
)
def test_replay_lowers_the_mismatch_of_the_first_step(tmp_path, changes):
    """Three bits send some tokens elsewhere. The rollout is the same, and so are the learner's weights."""
    changes = {"num_steps": 1, "train_batch_size": 2} | changes
    plain = run(tmp_path / "plain", **changes)[0]
    replayed = run(tmp_path / "R3", router_replay="R3", **changes)[0]
    key = "rollout_corr/abs_log_ratio_mean"
    assert plain["reward"] == replayed["reward"] and plain["routing/agreement"] == replayed["routing/agreement"] < 1
    assert replayed[key] < plain[key] and replayed["grad_norm"] != plain["grad_norm"]


@pytest.mark.slow
def test_autoregressive_runs_replay_what_the_rollouts_scoring_took(tmp_path):
    settings = {"make": tiny_recipe_ar, "num_steps": 1, "rollout_quantization": int3_emulated}
    make = lambda folder, **changes: replace(tiny_recipe_ar(folder, **changes), model=partial(MOE, causal=True))  # noqa: E731
    plain, replayed = (
        run(tmp_path / str(mode), **(settings | {"make": make}), router_replay=mode)[0] for mode in (None, "R3")
    )
    key = "rollout_corr/abs_log_ratio_mean"
    assert replayed[key] < plain[key]


def test_every_run_of_a_mixture_says_how_it_routes(tmp_path):
    row = run(tmp_path / "moe", num_steps=1, train_batch_size=1)[0]
    assert 0 < row["routing/agreement"] < 1
    assert row["routing/agreement"] == pytest.approx(
        sum(row[f"routing/agreement/layer_{i}"] for i in (0, 1)) / 2
    )  # as many tokens in each
    assert {"routing/max_violation/learner/layer_1", "routing/idle", "routing/idle/learner"} <= row.keys()
    unquantized = run(tmp_path / "plain", num_steps=1, train_batch_size=1, rollout_quantization=None, **ONE)[0]
    assert not any(name.startswith("routing/") for name in unquantized)


@pytest.mark.slow
def test_a_run_with_replay_resumes_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole", router_replay="R3", num_steps=2)
    run(tmp_path / "parts", router_replay="R3", num_steps=1, lr_schedule_steps=2)
    recipe = moe_recipe(tmp_path / "parts", router_replay="R3", lr_schedule_steps=2)
    train(replace(recipe, resume_from_checkpoint="latest"))
    resumed = metrics_of(tmp_path / "parts")
    for name in ("grad_norm", "rollout_corr/abs_log_ratio_mean"):
        assert resumed[-1][name] == whole[-1][name], name


def test_what_cannot_be_replayed_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"router_replay='R3' reuses .* without rollout_quantization"):
        moe_recipe(tmp_path, router_replay="R3", rollout_quantization=None)
    with pytest.raises(ValueError, match=r"torch_compile=True .*'R3', .*: leave out router_replay, or set torch_comp"):
        moe_recipe(tmp_path, router_replay="R3", torch_compile=True)
    with pytest.raises(ValueError, match=r"router_replay='R3' replays experts, and .* has none"):
        train(tiny_recipe(tmp_path / "dense", router_replay="R3"))
    assert not (tmp_path / "dense").exists()
    assert "router_replay" in Recipe.__doc__


def test_a_dry_run_counts_a_mixture_in_fp32(tmp_path):
    recipe = moe_recipe(tmp_path, rollout_quantization=None)
    weights = sum(p.numel() for p in MOE().module.parameters())
    held = step_memory(PlannedStep(recipe, MOE(), prompt_tokens=20)).persistent
    assert held["gradients"] == 4 * weights and held.keys() == {"weights", "gradients", "optimizer"}
    assert held["weights"] == pytest.approx(4 * weights, rel=0.01) and held["optimizer"] == pytest.approx(
        8 * weights, rel=0.01
    )
