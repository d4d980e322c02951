"""The plan's seconds: those that an H200 measured, within what the rates are worth, and counts by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from as_timed import as_timed

from dllm_rl.algorithms.replay import Replay
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.models.checkpoint.loading import load_config
from dllm_rl.quantization.schemes import Float8Dynamic, Float8WeightOnly
from dllm_rl.samplers.cache import PrefixCache
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.training.dry_run import plan
from dllm_rl.training.dry_run.duration import (
    FORWARD_SHARE,
    HOST_SECONDS,
    PEAK_FLOPS,
    host_bound_stages,
    stage_seconds,
)
from dllm_rl.training.dry_run.memory import PlannedStep, token_layers
from dllm_rl.training.dry_run.plan import meta_policy
from recipes.llada_8b import recipe_of

sudoku = as_timed(recipe_of())
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
PARTS = json.loads((RESULTS / "gpu.json").read_text())["parts"]
# The measurements had a row per completion, as a mask of its own gives it; one-step rows of a group are one row since.
ROW_EACH = replace(sudoku, likelihood=lik.ELBO(num_samples=1), micro_batch_size=6)
HEAD = 126464 * 4096
WEIGHTS = 32 * (4 * 4096**2 + 3 * 4096 * 12288) + 126464 * 4096  # the head too; embeddings are looked up


def seconds_of(recipe, policy, prompt_tokens):
    return stage_seconds(PlannedStep(recipe, policy, prompt_tokens))


def count_weights(policy):
    """Numbers of weights that a token is multiplied with, and of layers."""
    layers = list(token_layers(policy))
    return sum(map(math.prod, layers)), len(layers)


@pytest.fixture(scope="module")
def policy():
    """Of low rank, which draws fewer numbers: adapters are in no product that is counted."""
    return meta_policy(replace(sudoku, lora=replace(sudoku.lora, r=1)))


def measured(part, what, **more):
    rows = PARTS[part]["rows"]
    return next(row["seconds"] for row in rows if row["what"] == what and more.items() <= row.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "what", "scheme", "compiled"),
    [
        ("fp8", "bf16, exact", None, False),
        ("fp8", "FP8 weights, eager", Float8WeightOnly(), False),
        ("fp8", "FP8 weights, compiled", Float8WeightOnly(), True),
        ("fp8", "FP8 products, eager", Float8Dynamic(), False),
        ("fp8", "FP8 products, compiled", Float8Dynamic(), True),
    ],
)
def test_a_rollout_takes_what_the_h200_took(policy, part, what, scheme, compiled):
    """8 rows of 64 + 128 tokens in 64 steps, which are a little few for the full rate."""
    sampler = Unmask(max_new_tokens=128, diffusion_steps=64, block_size=32)
    recipe = replace(sudoku, sampler=sampler, train_batch_size=1, num_generations=8, micro_batch_size=8)
    recipe = replace(recipe, rollout_quantization=scheme, torch_compile=compiled)
    assert seconds_of(recipe, policy, 64)["rollout"] == pytest.approx(measured(part, what), rel=0.15)


@pytest.mark.parametrize("rows", [8, 48])
@pytest.mark.parametrize("lora", [sudoku.lora, None])
@pytest.mark.parametrize("likelihood", [lik.OneStep(), lik.Coupled()])
@pytest.mark.repeated(first_only=True)
def test_compiled_bf16_is_planned_at_the_ratio_that_the_h100_measured(policy, rows, lora, likelihood):
    speeds = {
        row["what"]: row["tokens/s"]
        for row in json.loads((RESULTS / "gpu-h100.json").read_text())["parts"]["sampler 8"]["rows"]
    }
    recipe = replace(sudoku, rollout_quantization=None, likelihood=likelihood, lora=lora, train_batch_size=rows // 8)
    recipe = replace(recipe, num_generations=8, torch_compile=False)
    eager, compiled = (seconds_of(each, policy, 64) for each in (recipe, replace(recipe, torch_compile=True)))
    ratio = speeds["exact, compiled"] / speeds["exact"]
    assert eager["rollout"] / compiled["rollout"] == pytest.approx(ratio, rel=0.01)
    assert {**eager, "rollout": 0} == {**compiled, "rollout": 0}  # of which none is counted as compiled


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("adapters", {}),
        ("adapters, checkpointing", {"gradient_checkpointing": True}),
        ("all weights", {"gradient_checkpointing": True, "lora": None}),
    ],
)
def test_an_update_takes_what_the_h200_took(policy, what, changes):
    """8 rows of 128 + 256 tokens; the rate is that of the slowest case."""
    recipe = replace(
        ROW_EACH, train_batch_size=1, num_generations=8, micro_batch_size=8, max_retained_graphs=0, **changes
    )
    recipe = replace(recipe, num_iterations=1)
    assert (
        measured("learner", what) <= 1.02 * seconds_of(recipe, policy, 128)["update"] <= 1.3 * measured("learner", what)
    )


def test_a_step_takes_what_the_h200_took(policy):
    """32 denoising steps of 48 rows. No backward was measured: equal rewards."""
    (row,) = PARTS["step"]["rows"]
    planned = seconds_of(replace(ROW_EACH, sampler=sudoku.sampler.replace(diffusion_steps=32)), policy, 256)
    assert planned["scoring"] == pytest.approx(row["scoring, s"], rel=0.1)
    assert planned["rollout"] == pytest.approx(row["rollout, s"], rel=0.02)


def test_stages_by_hand(policy):
    weights, layers = count_weights(policy)
    assert (weights, layers) == (WEIGHTS, 32 * 7 + 1)
    found = seconds_of(ROW_EACH, policy, 256)
    step = 2 * weights * 48 * 512 / PEAK_FLOPS
    assert found["rollout"] == pytest.approx(128 * step / 1.16)
    eleven = replace(ROW_EACH, train_batch_size=1, num_generations=11)
    assert seconds_of(eleven, policy, 256)["rollout"] == pytest.approx(128 * step * 11 / 48 / 0.84)  # of few tokens
    # Learner, reference and the FP8 copy, under the masks of each of 8 updates.
    assert found["scoring"] == pytest.approx(8 * (2 * step / FORWARD_SHARE + step / 0.84))
    assert found["update"] == pytest.approx(8 * 2 * step / 0.2)
    fields = {"likelihood": lik.Coupled(), "beta": 0.0, "rollout_quantization": None, "resample_masks": False}
    coupled = replace(sudoku, **fields, lora=None)
    found = seconds_of(coupled, policy, 256)
    assert found["scoring"] == pytest.approx(2 * step / FORWARD_SHARE)
    assert found["update"] == pytest.approx(8 * 2 * 3 * step / 0.2)
    once = replace(ROW_EACH, num_iterations=1, lora=None, micro_batch_size=None)
    one = seconds_of(once, meta_policy(once), 256)
    assert one["update"] == pytest.approx(2 * step / 0.2)  # its forward was scoring's
    cached = replace(sudoku, sampler=sudoku.sampler.replace(cache=PrefixCache()))
    assert seconds_of(cached, policy, 256)["rollout"] == pytest.approx(128 * step / 0.84 * 32 / 512)


def test_completions_of_a_prompt_that_share_a_row_by_hand(policy):
    """One step: 48 completions of 8 prompts are 8 rows, and the head scores each completion's 256 tokens."""
    once = replace(sudoku, micro_batch_size=None, beta=0.0, resample_masks=False, rollout_quantization=None)
    copied = 40 * 256 * HEAD
    products = 2 * (WEIGHTS * 8 * 512 + copied) / PEAK_FLOPS
    found = seconds_of(once, policy, 256)
    assert found["scoring"] == pytest.approx(products / FORWARD_SHARE)
    for size, in_one, forwards in ((12, 8, 1), (8, 8, 1), (6, 6, 2), (1, 1, 8)):  # rows of a forward, not completions
        step = PlannedStep(replace(once, micro_batch_size=size), policy, 256)
        assert step.shares_rows and (step.scored_rows, step.forward_rows, step.num_forwards) == (8, in_one, forwards)
    hosts = seconds_of(replace(once, micro_batch_size=1), policy, 256)["scoring"]
    assert hosts == pytest.approx(max(8 * 225 * HOST_SECONDS, products / FORWARD_SHARE))
    apart = (lik.ELBO(num_samples=1), lik.Trajectory(num_segments=2), lik.Coupled())
    changes = [{"likelihood": each} for each in apart]
    for changed in [*changes, {"num_generations": 2, "likelihood": lik.Trajectory()}]:
        step = PlannedStep(replace(once, **changed), policy, 256)
        assert not step.shares_rows and step.scored_rows == step.rows
    replay = Replay(min_reward=1.0, num_updates=1, batch_size=16)  # a row per stored answer
    assert PlannedStep(replace(once, micro_batch_size=12, replay=replay), policy, 256).forward_rows == 12


def test_replay_by_hand(policy):
    """Three updates on 16 rows, of which a forward takes 6; without a policy gradient, these alone."""
    changes = {
        "lora": None,
        "gradient_checkpointing": False,
        "replay": Replay(min_reward=1.0, num_updates=3, batch_size=16),
    }
    with_both = replace(sudoku, **changes)
    alone = replace(with_both, num_iterations=0, beta=0.0)
    replayed = 3 * 3 * 2 * WEIGHTS * 16 * 512 / PEAK_FLOPS / 0.2
    assert seconds_of(alone, policy, 256)["update"] == pytest.approx(replayed)
    updates = seconds_of(replace(with_both, replay=None), policy, 256)["update"]
    assert seconds_of(with_both, policy, 256)["update"] == pytest.approx(updates + replayed)
    step = PlannedStep(replace(alone, micro_batch_size=None, train_batch_size=1), policy, 256)
    assert (step.micro_rows, step.rows) == (16, alone.num_generations)


def test_the_host_limits_forwards_of_few_tokens(monkeypatch):
    monkeypatch.setattr(
        plan, "load_config", lambda name: load_config(name) | {"num_hidden_layers": 8}
    )  # for time's sake
    qwen = recipe_of("gsm8k", "Qwen/Qwen3-8B")
    found = seconds_of(qwen, meta_policy(qwen), 256)
    step = PlannedStep(qwen, meta_policy(qwen), 256)
    assert host_bound_stages(step) == {"rollout"}
    said = {line.split()[0] for line in plan.time_lines(step) if line.endswith("but the host is the limit")}
    assert said == {"rollout"}
    turns = qwen.train_batch_size * qwen.num_generations / (qwen.rollout_batch_size or 1e9)
    assert found["rollout"] == pytest.approx(max(1, turns) * qwen.max_new_tokens * (8 * 7 + 1) * HOST_SECONDS)


def test_a_token_passes_the_experts_that_it_takes():
    moe = meta_policy(recipe_of(model="inclusionAI/LLaDA-MoE-7B-A1B-Instruct"))
    weights, _ = count_weights(moe)
    assert weights == pytest.approx(157184 * 2048 + 16 * (4 * 2048**2 + 8 * 3 * 2048 * 1024), rel=0.005)


@pytest.mark.parametrize(
    ("estimator", "views"),
    [
        (lik.OneStep(), 1),
        (lik.Coupled(num_samples=2), 4),
        (lik.Trajectory(), 128),
        (lik.Trajectory(num_segments=4), 4),
    ],
)
def test_views_are_those_that_the_likelihood_draws(estimator, views):
    sampler = sudoku.sampler.replace(max_new_tokens=256, diffusion_steps=128)
    assert PlannedStep(replace(sudoku, likelihood=estimator, sampler=sampler), None, 256).num_views == views
