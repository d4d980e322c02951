"""The mean over all draws of denoising steps is the gradient of every step: enumerated, through the step's own code."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from likelihood_toys import TablePolicy
from repetitions import slow
from tiny_recipe import tiny_recipe
from torch.nn.functional import one_hot

from dllm_rl import AIS, MIS, TIS, IcePop, NoCorrection, PPOClip, SequenceMean, TokenMean, Trajectory
from dllm_rl.algorithms.losses import CISPO, K2, K3
from dllm_rl.algorithms.prompt_sources import RewardHistory
from dllm_rl.likelihoods import drawn_steps
from dllm_rl.step import correct
from dllm_rl.step.context import StepContext
from dllm_rl.step.correct import drawn_step_metrics, make_batches
from dllm_rl.step.samples import Samples
from dllm_rl.step.score import score_samples
from dllm_rl.step.update import forward_backward

# Two prompts with two completions each; the tokens and the steps that wrote them, -1: part of the prompt. A and B share
# their first step, which is one row of a forward; C has two tokens, D one.
TOKENS = [[0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]]
STEPS = [[0, 0, 1, 1], [1, 0, 1, 0], [-1, 0, -1, 1], [-1, -1, -1, 0]]
ADVANTAGES = torch.tensor([1.0, -0.5, 0.3, -0.7])


def half(*statistics, tau):
    return 0.5


@pytest.fixture
def learner():
    policy = TablePolicy(length=4, words=2, seed=0)
    policy.table.requires_grad_()
    torch.set_default_dtype(torch.float64)
    yield policy
    torch.set_default_dtype(torch.float32)


def moved(policy, size, seed):
    other = TablePolicy(length=4, words=2, seed=0)
    noise = torch.randn(policy.table.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    other.table = (policy.table.detach() + size * noise).requires_grad_()
    return other


def sampled(sampler):
    steps = torch.tensor([[-1, *row] for row in STEPS])
    rollout = sampler.rollout(TOKENS, num_generations=2, unmask_step=steps, completion_mask=steps >= 0)
    exact = Trajectory()
    logprobs = exact.logprobs(sampler, rollout, exact.draw_views(rollout, torch.Generator()))
    return replace(rollout, logprobs=logprobs)


class Draws:
    """Draws that are given instead of random. `flags` says which rows of a forward are drawn in a set of views; in the
    sets that it does not name all are."""

    def __init__(self, monkeypatch):
        self.chances = []  # of the rows of a forward, in each set of views that was drawn
        self.flags = {}
        monkeypatch.setattr(drawn_steps, "uniforms_at", lambda exists, generators: exists.double())
        original = drawn_steps.with_drawn_steps

        def given(views, step, drawn, chance):
            exists = one_hot(step + 1, chance.shape[1] + 1).any(1)[:, 1:]
            unit = drawn_steps.alike_rows(self.rollout, views).T.masked_fill(~exists, -1)
            names = unit[exists].unique()
            flags = self.flags.get(len(self.chances), (True,) * len(names))
            self.chances.append([float(chance[unit == name].unique()) for name in names])
            return original(views, step, torch.isin(unit, names[torch.tensor(flags)]), chance)

        monkeypatch.setattr(drawn_steps, "with_drawn_steps", given)


# Metrics of the mismatch that are means over tokens: those of drawn steps estimate those of all.
MEANS = [f"{prefix}/{name}" for prefix in ("rollout_corr", "trained") for name in (
    "kl", "k3_kl", "abs_log_ratio_mean", "chi2_token", "rollout_is_mean", "rollout_is_ratio_fraction_high",
    "contribution_positive", "contribution_negative", "nonfinite_fraction",
)]  # fmt: skip


class Step:
    """An update of a step of one process: `gradient()` is the table's, with the metrics."""

    def __init__(self, learner, update, **changes):
        self.learner, self.update = learner, update
        self.current = moved(learner, 0.3, seed=2) if update else learner
        self.recipe = tiny_recipe("x", max_retained_graphs=0, num_iterations=update + 1, **changes)
        sampler = moved(learner, 0.3, seed=1)
        self.rollout = rollout = sampled(sampler)
        self.samples = Samples(rollout, rollout.group, ADVANTAGES.clone(), ADVANTAGES, torch.ones(4), (4,))
        self.context = StepContext(
            settings=self.recipe, accelerator=Accelerator(cpu=True), policy=learner, rollout_policy=sampler,
            history=RewardHistory(1), reference=moved(learner, 0.5, seed=3),
        )  # fmt: skip

    def gradient(self):
        """The gradient; the means over tokens that a step logs; the sums and the numbers of tokens of an update."""
        batches, metrics = make_batches(self.context, score_samples(self.context, self.samples, 1))
        batch, table, likelihood = batches[self.update % len(batches)], self.current.table, self.recipe.likelihood
        scores = batch.old_view_logprobs
        if self.update:
            scores = likelihood.view_logprobs(self.current, batch.rollout, batch.views)
        table.grad = torch.zeros_like(table)
        pairs = forward_backward(self.current, batch, scores, loss=self.recipe.policy_loss, likelihood=likelihood)
        # Without a drawn step nothing is logged, which stands for ratios of 1.
        numbers = {name: metrics.get(name, float(name.endswith("is_mean"))) for name in MEANS}
        for name, (total, count) in pairs.items():
            if not name.endswith("/max"):  # of whole rows
                numbers |= {f"{name}, sum": float(total), f"{name}, tokens": float(count)}
        return table.grad.clone(), numbers

    def mean(self, draws):
        """The mean over all draws of this update's views of the gradient, and of the numbers; and the chances of the
        rows of a forward."""
        draws.rollout, draws.chances = self.rollout, []
        self.gradient()
        chances = draws.chances[self.update]
        gradient, means = torch.zeros_like(self.current.table), {}
        for flags in itertools.product((True, False), repeat=len(chances)):
            likely = math.prod(chance if flag else 1 - chance for flag, chance in zip(flags, chances, strict=True))
            if likely:
                draws.flags, draws.chances = {self.update: flags}, []
                found, numbers = self.gradient()
                gradient += likely * found
                for name, number in numbers.items():
                    means[name] = means.get(name, 0.0) + likely * number
        return gradient, means, chances


CASES = {
    "none": {},
    "tis": {"corrector": TIS(cap=1.1)},
    "mis": {"corrector": MIS(min_ratio=0.9, max_ratio=1.1)},
    "icepop": {"corrector": IcePop(min_ratio=0.8, max_ratio=1.2)},
    "ais": {"corrector": AIS(lambda_fn=half, pool="geometric", cap=1.1)},
    "means of rows": {"corrector": TIS(cap=1.1), "loss_reduction": SequenceMean()},
    "kl": {"beta": 0.3, "kl": K2()},
    "corrected kl": {"beta": 0.3, "kl": K3(bias_correction=True)},
    "cispo": {"loss": CISPO(max_ratio=1.1)},
    "rollout": {"old_logprobs": "rollout", "loss": PPOClip(epsilon=0.1)},
    "dual clip": {"old_logprobs": "rollout", "loss": PPOClip(epsilon=0.1, delta=1.15)},
}


BY_DEFAULT = (("tis", 0), ("means of rows", 1), ("dual clip", 1))
BOTH = [(name, update) for name in CASES for update in (0, 1)]


@pytest.mark.parametrize(("name", "update"), [*BY_DEFAULT, *(slow(*each) for each in BOTH if each not in BY_DEFAULT)])
def test_the_mean_over_all_draws_is_every_steps_gradient(name, update, learner, monkeypatch):
    changes = {"corrector": NoCorrection(), "loss_reduction": TokenMean()} | CASES[name]
    every, numbers = Step(learner, update, likelihood=Trajectory(), **changes).gradient()
    drawn = Step(learner, update, likelihood=Trajectory(variance_growth=3.0), **changes)
    mean, means, chances = drawn.mean(Draws(monkeypatch))
    # A and B: one first step of both, two second ones; C: two; D: one.
    assert len(chances) == 6 and sum(chance < 0.9 for chance in chances) >= 4
    assert (mean - every).norm() <= 1e-6 * every.norm() > 0
    for name in numbers:
        if name not in MEANS or not update:  # a step logs the metrics of its first views
            assert means[name] == pytest.approx(numbers[name], rel=1e-6, abs=1e-6), name


def test_the_growth_of_the_variance_is_estimated_from_the_learners_probabilities(learner, monkeypatch):
    """The sums over all tokens of (1 / c - 1) (A w (1 - p))^2, and of (A w (1 - p))^2, are those of drawn tokens in the
    mean over draws."""
    given = {"corrector": TIS(cap=1.1), "loss_reduction": TokenMean()}
    sums = []

    def kept(*arguments):
        found = drawn_step_metrics(*arguments)
        sums.append(found["drawn_steps/variance_growth"])
        return found

    step = Step(learner, 0, likelihood=Trajectory(variance_growth=3.0), **given)
    monkeypatch.setattr(correct, "drawn_step_metrics", kept)
    draws = Draws(monkeypatch)
    draws.rollout = step.rollout
    step.gradient()
    chances, means = draws.chances[0], torch.zeros(2)
    for flags in itertools.product((True, False), repeat=len(chances)):
        draws.flags, draws.chances, sums[:] = {0: flags}, [], []
        step.gradient()
        likely = math.prod(chance if flag else 1 - chance for flag, chance in zip(flags, chances, strict=True))
        means += likely * torch.stack(sums[0])
    every = Step(learner, 0, likelihood=Trajectory(), **given)
    (batch, *_), _ = make_batches(every.context, score_samples(every.context, every.samples, 1))
    draws.flags, draws.chances = {}, []  # all are drawn, each with its chance
    (drawn, *_), _ = make_batches(step.context, score_samples(step.context, step.samples, 1))
    squares = (ADVANTAGES[:, None] * batch.importance_weights * (1 - batch.old_logprobs.exp())).square()
    squares = torch.where(batch.loss_mask, squares, 0)
    growth = (torch.where(batch.loss_mask, drawn.inverse_chances - 1, 0) * squares).sum()
    torch.testing.assert_close(means, torch.stack([growth, squares.sum()]), rtol=1e-6, atol=1e-9)
    assert growth > 0.1 * squares.sum()
