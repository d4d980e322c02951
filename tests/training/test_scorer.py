"""Which groups are scored, where the log-probs of both sides come from, and the arithmetic of forwards."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from rows import NO_ROWS
from tiny_recipe import tiny_recipe
from torch.overrides import _get_current_function_mode_stack

from dllm_rl.algorithms import correctors
from dllm_rl.algorithms.correctors import TIS, NoCorrection, QaRL
from dllm_rl.decoding.prompts import encode
from dllm_rl.likelihoods.estimators import Coupled, Trajectory, recorded
from dllm_rl.models.forward.batch_invariance import BatchInvariantOps
from dllm_rl.rng import generator_for
from dllm_rl.step import context as context_module
from dllm_rl.step.samples import Samples
from dllm_rl.step.score import (
    active_rows,
    draw_view_sets,
    inverse_sampling_weights,
    metric_weights,
    rollout_logprob_source,
)
from dllm_rl.training.make_step import make_step

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def arithmetic(recipe):
    policy = recipe.model()
    return make_step(recipe, accelerator=Accelerator(cpu=True), policy=policy, rollout_policy=policy).arithmetic()


EXACT = {"zero_mismatch": True, "rollout_quantization": None, "corrector": NoCorrection()}


@pytest.mark.parametrize(("changes", "modes"), [({}, []), ({"bf16": True}, []), (EXACT, [BatchInvariantOps])])
def test_the_mode_that_a_recipe_asks_for_holds_inside_the_block_alone(changes, modes, tmp_path):
    recipe = tiny_recipe(tmp_path, **changes)
    before = _get_current_function_mode_stack()
    with arithmetic(recipe):
        inside = [type(each) for each in _get_current_function_mode_stack()[len(before) :]]
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert inside == modes
    assert product.dtype == (torch.bfloat16 if recipe.bf16 else torch.float32)
    assert _get_current_function_mode_stack() == before and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("size", [1, 2])
def test_sharded_weights_are_not_kept_in_bf16(size, tmp_path):
    """Autocast's cache would hold what no process has room for."""
    with arithmetic(tiny_recipe(tmp_path, bf16=True, shard_size=size)):
        assert torch.is_autocast_cache_enabled() == (size == 1)


@pytest.mark.parametrize("changes", [{"bf16": True}, {}, {"dtype": "bfloat16"}])
@pytest.mark.usefixtures("exact_arithmetic")
def test_the_samplers_record_is_the_learners_own_score_in_any_arithmetic(tmp_path, changes):
    """Bit for bit: attention rounds alike with a graph and without one."""
    recipe = tiny_recipe(tmp_path, rollout_quantization=None, **changes)
    policy = recipe.model()
    if "dtype" in changes:
        policy.module.bfloat16()
    with arithmetic(recipe):
        rollout = recipe.sampler(policy, encode(policy, [recipe.task[i] for i in range(4)]), generator_for(0))
        noise = recipe.likelihood.draw_views(rollout, generator_for(1))
        scores = recipe.likelihood.view_logprobs(policy, rollout, noise, retain_graphs=True)
        torch.testing.assert_close(recipe.likelihood.combine(scores, noise), recorded(rollout, noise), rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{"beta": 0.1}, {"entropy_coeff": 0.1}])
def test_a_term_of_every_row_learns_from_groups_of_equal_rewards_too(tmp_path, changes):
    advantages = torch.tensor([1.0, -1.0, 1.0, 0.0, 0.0])  # groups of three rows and of two
    samples = Samples(NO_ROWS, torch.tensor([0, 0, 0, 1, 1]), advantages, advantages, advantages, (5,))
    assert active_rows(tiny_recipe(tmp_path), samples).tolist() == [True] * 3 + [False] * 2
    assert active_rows(tiny_recipe(tmp_path, **changes), samples).tolist() == [True] * 5


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize(
    ("changes", "copied", "rollout", "aligned"),
    [
        ({"likelihood": Trajectory()}, True, "recorded", False),
        ({"likelihood": Trajectory()}, False, "recorded", False),
        ({"likelihood": Trajectory(num_segments=2)}, True, "scored", False),
        ({"likelihood": Coupled()}, True, "scored", False),
        ({"likelihood": Coupled()}, False, "learner", False),
        ({"corrector": TIS()}, True, "recorded", False),
        ({"corrector": correctors.Aligned()}, True, "recorded", True),
        ({"corrector": QaRL()}, False, "recorded", False),  # without a copy there is nothing to align with
    ],
)
def test_where_log_probs_come_from(changes, copied, rollout, aligned, tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, **changes)
    policy = recipe.model()
    rollout_policy = recipe.model() if copied else policy
    assert rollout_logprob_source(recipe.likelihood, learner_samples=not copied) == rollout
    step = make_step(recipe, accelerator=Accelerator(cpu=True), policy=policy, rollout_policy=rollout_policy)
    entered = []
    monkeypatch.setattr(context_module, "aligned_forward", lambda *policies: nullcontext(entered.append(policies)))
    for learner in (False, True):
        with step.arithmetic(learner=learner):
            assert entered == [(policy, rollout_policy)] * (aligned and learner)


def test_weights_of_groups():
    def weights(learned, sample, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return inverse_sampling_weights(torch.tensor(learned, dtype=torch.bool), sample, generator).tolist()

    found = weights([1, 0, 0, 0, 1], 2)
    assert found[0] == found[4] == 1 and sorted(found[1:4]) == [0, 1.5, 1.5]
    assert weights([1, 0, 0, 1], 2) == weights([1, 0, 0, 1], 9) == [1, 1, 1, 1]
    assert sorted(weights([0, 0, 0, 0, 0], 1)) == [0, 0, 0, 0, 5]
    assert weights([1, 1], 2) == [1, 1]
    # Each of the 6 pairs of 4 others a sixth of the time: 100 expected of 600, standard deviation 9.
    pairs = Counter(tuple(weights([0, 1, 0, 0, 0], 2, seed)) for seed in range(600))
    assert len(pairs) == 6 and all(60 < n < 140 for n in pairs.values())


def test_each_step_measures_other_groups(tmp_path):
    """The same groups at each step would hide the mismatch of all others for the whole run."""
    recipe, zeros = tiny_recipe(tmp_path, num_mismatch_groups=2), torch.zeros(32)
    still = Samples(NO_ROWS, torch.arange(32) // 4, zeros, zeros, zeros, (32,))
    drawn = [metric_weights(recipe, still, step)[::4].tolist() for step in range(20)]
    assert drawn == [metric_weights(recipe, still, step)[3::4].tolist() for step in range(20)]
    assert all(sorted(weights) == [0] * 6 + [4, 4] for weights in drawn)
    assert all(any(weights[group] for weights in drawn) for group in range(8))


@pytest.mark.parametrize("changes", [{"beta": 0.1}, {}])
def test_a_row_without_a_reward_is_never_trained(tmp_path, changes):
    rewards = torch.tensor([1.0, torch.nan, 0.0, torch.nan, torch.nan])
    advantages = torch.tensor([1.0, 0.0, -1.0, 0.0, 0.0])
    samples = Samples(NO_ROWS, torch.tensor([0, 0, 0, 1, 1]), rewards, advantages, advantages, (5,))
    recipe = tiny_recipe(tmp_path, **changes)
    for all_groups in (False, True):
        found = active_rows(recipe, samples, all_groups=all_groups)
        assert found.tolist() == [True, False, True, False, False]


def test_later_sets_of_masks_score_all_groups_if_a_feature_trains_them(tmp_path):
    recipe = tiny_recipe(tmp_path, num_iterations=2, likelihood=Coupled())
    policy = recipe.model()
    rollout = recipe.sampler(policy, encode(policy, [recipe.task[i] for i in range(2)]), generator_for(0))
    advantages = torch.tensor([1.0, 0.0], dtype=torch.float64)
    samples = Samples(rollout, torch.arange(2), advantages, advantages, torch.ones(2), (2,))
    for all_groups in (False, True):
        sets = draw_view_sets(recipe, samples, 0, Accelerator(cpu=True), all_groups=all_groups)
        scored = [(views.coefficients != 0).any(-1).any(0).tolist() for views in sets]
        assert scored == [[True, True], [True, all_groups]]
