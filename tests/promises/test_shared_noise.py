"""One training step end to end: every policy is scored under the same masks, and no global random state moves."""

import random
import sys
from contextlib import contextmanager
from functools import partial
from operator import attrgetter

import numpy as np
import pytest
import torch
from repetitions import few
from run_outputs import assert_same_weights, metrics_of
from tiny_recipe import with_changes

from dllm_rl.algorithms.correctors import TIS, NoCorrection
from dllm_rl.algorithms.losses import Reinforce
from dllm_rl.groups import Log, Warmup
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.estimators import LikelihoodEstimator
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.schemes import Int8WeightOnly
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for
from dllm_rl.samplers.rules import MaxProb
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step import update
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.late_rollouts.schedule import InProcessPool
from dllm_rl.training.trainer import train
from dllm_rl.types.rollouts import Prompts
from recipes.examples import bounds

pytestmark = pytest.mark.usefixtures("no_rehearsal")

SMALL = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def recipe(tmp_path, likelihood, **changes) -> Recipe:
    sampler = Unmask(max_new_tokens=16, diffusion_steps=4, rank=MaxProb())
    problems = partial(Sudoku, clues=(10, 12), size=4)
    base = Recipe(
        name="shared-noise",
        model=partial(tiny_masked_lm, characters="1234.=", **SMALL),
        task=problems(split="train"),
        validation_task=problems(split="validation", size=1),
        eval_task=problems(split="test", size=1),
        sampler=sampler.replace(temperature=1.0),
        eval_sampler=sampler.replace(temperature=0.0),
        likelihood=likelihood,
        corrector=TIS(),
        rollout_quantization=Int8WeightOnly(),
        train_batch_size=4,
        num_generations=4,
        num_iterations=2,
        num_steps=1,
        beta=0.05,
        warmup=Warmup(steps=0),
        log=Log(completions_steps=0, report_to=None),
        output_dir=str(tmp_path / "run"),
    )
    return with_changes(base, **changes)


MASKED = [lik.Coupled(num_samples=2), bounds.Sandwich()]


@contextmanager
def global_generators_unmoved():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    if "beartype" not in sys.modules:  # whose checks draw from it themselves
        assert random.getstate() == before[2]


@pytest.mark.parametrize("estimator", few(MASKED, MASKED[1:]), ids=["coupled", "sandwich"])
@pytest.mark.parametrize("fresh", [True, False])
def test_old_rollout_reference_and_current_share_one_noise_object(estimator, fresh, tmp_path, monkeypatch):
    seen, advantages = [], []
    scores, accumulate = LikelihoodEstimator.view_logprobs, update.forward_backward

    def spied_scores(self, policy, rollout, noise, **options):
        seen.append((policy, noise))
        return scores(self, policy, rollout, noise, **options)

    def spied_accumulate(policy, batch, *rest, **settings):
        seen.append((policy, batch.views))
        advantages.append(batch.advantages)
        return accumulate(policy, batch, *rest, **settings)

    monkeypatch.setattr(LikelihoodEstimator, "view_logprobs", spied_scores)
    monkeypatch.setattr(update, "forward_backward", spied_accumulate)
    with global_generators_unmoved():
        train(recipe(tmp_path, estimator, resample_masks=fresh, sft_warmup_steps=1))
    # Each set of masks is scored by reference, rollout policy and learner, the last set first; then come the updates: a
    # gradient, and for the second one scores and a gradient.
    second, first = (seen[:3], seen[3:]) if fresh else ([], seen)
    order = [noise for _, noise in first]
    assert all(noise is order[0] for noise in order[:4]) and len(order) == 6
    assert order[4] is order[5] is (second[0][1] if fresh else order[0])
    assert all(noise is second[0][1] for _, noise in second)
    assert not (fresh and torch.equal(order[4].masked, order[0].masked))
    assert len({id(policy) for policy, _ in seen}) == 3
    if isinstance(estimator, bounds.Sandwich):
        assert (advantages[-1] < 0).any() and (advantages[-1] > 0).any() and len(order[4].features[-1].weight) == 16
        assert torch.equal(order[4].features[-1].weight, torch.where(advantages[-1] < 0, 0.5, 0.0))


@pytest.mark.parametrize(
    "estimator",
    few([*MASKED, lik.OneStep(), lik.Trajectory()], [MASKED[1]]),
    ids=["coupled", "sandwich", "one_step", "all"],
)
def test_ratios_of_every_inner_update_divide_by_the_same_masks(estimator, tmp_path):
    """Weights that do not move have ratio 1 under any masks, if both sides have them."""
    given = {"num_iterations": 3, "learning_rate": 1e-30, "beta": 0.0}
    train(recipe(tmp_path, estimator, **given))
    (row,) = metrics_of(tmp_path / "run")
    assert row["ratio/mean"] == pytest.approx(1, abs=1e-6)  # of the last update
    norms = {row[f"grad_norm/iteration_{iteration}"] for iteration in range(3)}
    assert len(norms) == (1 if isinstance(estimator, lik.Trajectory) else 3)


class ReadsRatio(Reinforce):
    """The same objective, declared to read the old log-probs."""

    reads_ratio = True


LATE = {"rollout_workers": 1, "max_staleness": 1, "num_steps": 2}


@pytest.mark.parametrize("late", [{}, LATE], ids=["same_step", "late"])
@pytest.mark.repeated(first_only=True)
def test_a_loss_without_a_ratio_scores_no_masks_of_later_updates(late, tmp_path, monkeypatch):
    """It learns the same, to the bit, from fewer forwards, and logs no ratio that it did not measure."""
    settings = {"corrector": NoCorrection(), "beta": 0.0, "num_iterations": 3, **late}
    made, scored = [], []
    scores = LikelihoodEstimator.logprobs
    monkeypatch.setattr(LikelihoodEstimator, "logprobs", lambda *a, **k: (scored.append(0), scores(*a, **k))[1])
    for name, loss in (("scored", ReadsRatio()), ("not", Reinforce())):
        scored.clear()
        pool = InProcessPool() if late else None
        made.append(train(recipe(tmp_path / name, lik.OneStep(), loss=loss, **settings), pool))
        made.append(len(scored))
        made.append(metrics_of(tmp_path / name / "run")[-1])
    (first, sets, row), (second, one_set, less) = made[:3], made[3:]
    assert_same_weights(first, second)
    assert sets - one_set == (4 if late else 2), "two sets of the rollout policy, in every step"
    lacking = row.keys() - less.keys()
    assert {name.split("/")[0] for name in lacking} == {"off_policy", "ratio"} and "ratio/mean" in lacking
    assert not any(name.endswith(("iteration_1", "iteration_2")) for name in less if "off_policy" in name)
    assert all(row[name] == less[name] for name in less if name.startswith(("grad_norm", "rollout_corr")))


def test_updates_on_fresh_masks_may_have_nothing_to_learn_from(tmp_path):
    still = {"advantages": lambda rewards, group: 0 * rewards, "beta": 0.0, "num_iterations": 3}
    train(recipe(tmp_path, lik.Coupled(), **still))
    (row,) = metrics_of(tmp_path / "run")
    assert [row[f"grad_norm/iteration_{iteration}"] for iteration in range(3)] == [0, 0, 0]
    assert row["rollout_corr/abs_log_ratio_mean"] > 0  # of the groups that are measured alone


ESTIMATORS = [
    *(lik.OneStep(), lik.ELBO(), lik.Coupled(), lik.Trajectory()),
    *(lik.OneStep(prompt_mask=0.0), lik.Causal()),
    *(lik.Trajectory(num_segments=2), lik.Trajectory(variance_growth=0.5)),
]


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=attrgetter("name"))
def test_random_says_whether_two_draws_differ(estimator):
    policy = tiny_masked_lm(characters="1234.=", **SMALL)
    prompts = Prompts.from_ids([[3, 4, 5, 6]] * 4, pad_id=policy.pad_id)
    rollout = Unmask(max_new_tokens=16, diffusion_steps=4, rank=MaxProb())(policy, prompts, generator_for(0))
    one, other = (estimator.draw_views(rollout, generator_for(0, "noise", i)) for i in range(2))
    differ = not (torch.equal(one.masked, other.masked) and torch.equal(one.coefficients, other.coefficients))
    assert differ == estimator.is_random


@pytest.mark.slow
@pytest.mark.parametrize("kind", [lik.OneStep, lik.ELBO, lik.Coupled, lik.Trajectory])
def test_training_leaves_the_global_generators_alone(kind, tmp_path):
    with global_generators_unmoved():
        train(recipe(tmp_path, kind(), sft_warmup_steps=2, log_completions_steps=1, report_to="tensorboard"))
