"""The law of confidence-ranked unmasking against the enumeration of every draw, in fp64."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from likelihood_toys import TablePolicy
from order_toys import as_rollout, missing_order, outcomes, stayed_of, total
from repetitions import slow

from dllm_rl.algorithms.losses import K2, FixedLengthMean, PPOClip, policy_loss
from dllm_rl.decoding.order import MIN_LOGPROB, stay_masked_logprobs
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.likelihoods.views import each_view
from dllm_rl.samplers import rules
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.update import forward_backward
from dllm_rl.types.rollouts import Prompts, SamplingParams
from dllm_rl.types.scoring import Batch

GENERATOR = torch.Generator()


@pytest.fixture
def fp64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def some_toy(seed: int):
    """A toy of random size, blocks, steps, temperature and filters; every fifth has equal logits at all positions, with
    ties between words, so that confidences tie too."""
    pick = random.Random(seed)
    length, words = pick.choice([(3, 3), (4, 2), (4, 3), (3, 4), (5, 2)])
    size = pick.choice([length, 2, 3])
    blocks = [list(range(start, min(start + size, length))) for start in range(0, length, size)]
    options = {"temperature": pick.choice([1.0, 0.6, 1.7])}
    options |= pick.choice([{}, {}, {"top_k": 2}, {"top_p": 0.8}, {"top_k": 3, "top_p": 0.9}])
    policy = TablePolicy(length=length, words=words, seed=seed, scale=pick.choice([0.7, 1.5, 2.5]))
    if seed % 5 == 0:
        policy.table = policy.table[:, :1].expand(-1, length, -1).clone()
        policy.table[..., 1] = policy.table[..., 0]
        options = {"temperature": options["temperature"]}  # which of two equal words a filter keeps is a matter of rule
    return policy, blocks, pick.choice([1, 2, 3]), options


@pytest.mark.parametrize(
    "part", [*range(2), slow(2), *(pytest.param(n, marks=pytest.mark.nightly) for n in range(3, 10))]
)
def test_the_law_is_the_enumeration_of_all_draws(fp64, part):
    """A hundred toys: every outcome's log-prob to 1e-12, and all of them together are 1."""
    missing = []
    for seed in range(10 * part, 10 * part + 10):
        policy, blocks, diffusion_steps, options = some_toy(seed)
        found = outcomes(policy, blocks, diffusion_steps, **options)
        rollout = as_rollout(policy, found, **options)
        missing.append(missing_order(policy, rollout, found, atol=1e-12))
    assert max(missing) > 0.5, "without the order's part the product of token probabilities is another number"


@pytest.mark.parametrize(
    ("diffusion_steps", "size", "options"),
    [(2, 4, {}), (3, 4, {"temperature": 0.7}), (2, 2, {}), (2, 4, {"temperature": 1.3, "top_k": 2})],
    ids=str,
)
@pytest.mark.repeated
def test_the_gradient_through_the_learner_is_that_of_the_expected_reward(fp64, diffusion_steps, size, options):
    """sum over all outcomes of P A grad log P, as `forward_backward` makes it, is grad E[A] by enumeration, to
    1e-10 of its norm; that of the tokens given the order is another vector."""
    policy = TablePolicy(length=4, words=3, seed=1, scale=1.0)
    policy.table.requires_grad_()
    blocks = [list(range(start, start + size)) for start in range(0, 4, size)]
    found = outcomes(policy, blocks, diffusion_steps, differentiable=True, **options)
    chances, rewards = torch.stack(list(found.values())), torch.randn(len(found), generator=GENERATOR.manual_seed(0))
    (expected,) = torch.autograd.grad((chances * rewards).sum(), policy.table)

    def through_the_learner(estimator):
        rollout = as_rollout(policy, found, **options)
        noise = estimator.draw_views(rollout, GENERATOR)
        scores = estimator.view_logprobs(policy, rollout, noise)
        old, mask = estimator.combine(scores, noise), rollout.completion_mask
        weights = chances.detach()[:, None].expand(mask.shape)
        batch = Batch(rollout, noise, rewards, old, scores, weights, mask, None, num_tokens=1, num_sequences=1)
        surrogate, aggregate = PPOClip(epsilon=0.2), FixedLengthMean(length=1)
        loss = partial(policy_loss, surrogate=surrogate, loss_reduction=aggregate, beta=0.0, kl=K2())
        policy.table.grad = None
        forward_backward(policy, batch, scores, loss=loss, likelihood=estimator, micro_batch_size=64)
        return -policy.table.grad

    exact, given = through_the_learner(lik.Trajectory()), through_the_learner(lik.Trajectory(include_order=False))
    assert (exact - expected).norm() <= 1e-10 * expected.norm()
    assert (given - expected).norm() >= 0.05 * expected.norm()


def test_only_what_moves_is_scored_again(fp64):
    """The gradient of some of the contributions is autograd's, though what a step committed says what it left."""
    policy = TablePolicy(length=4, words=3, seed=2)
    policy.table.requires_grad_()
    found = outcomes(policy, [[0, 1, 2, 3]], 2)
    rollout, estimator = as_rollout(policy, list(found)[:40]), lik.Trajectory()
    noise = estimator.draw_views(rollout, GENERATOR)
    vectors = torch.randn(noise.coefficients.shape, generator=GENERATOR.manual_seed(3)) * (noise.coefficients != 0)
    vectors = vectors * (torch.rand(vectors.shape, generator=GENERATOR) < 0.3)
    scores = [view.logprobs(policy, rollout) for view in each_view(noise)]
    (expected,) = torch.autograd.grad((torch.stack(scores) * vectors).sum(), policy.table)
    policy.table.grad = None
    for view, vector in zip(each_view(noise), vectors, strict=True):
        view.backward(policy, rollout, vector)
    torch.testing.assert_close(policy.table.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"block_size": 2}, {"temperature": 0.6, "top_k": 2}], ids=str)
def test_a_sampler_records_what_scoring_finds(options):
    """A sampler's own rollouts: its record is the law's, bit for bit, and the enumeration's numbers."""
    policy = TablePolicy(length=4, words=3, seed=5)
    settings = {"temperature": 1.0, "diffusion_steps": 4 if "block_size" in options else 2} | options
    rows = 1000
    suppress = (policy.words + 1, policy.words + 2)
    prompts = Prompts.from_ids([[policy.words + 1]], pad_id=policy.pad_id, num_generations=rows)
    sampler = Unmask(max_new_tokens=4, suppress=suppress, **settings)
    rollout = sampler.replace(rank=rules.Confidence())(policy, prompts, torch.Generator().manual_seed(0))
    estimator = lik.Trajectory()
    noise = estimator.draw_views(rollout, GENERATOR)
    contributions = estimator.logprobs(policy, rollout, noise)
    assert torch.equal(contributions, recorded(rollout, noise)) and rollout.order.rank_name == "Confidence"
    blocks = [[0, 1], [2, 3]] if "block_size" in options else [[0, 1, 2, 3]]
    law = {k: v for k, v in settings.items() if k in ("temperature", "top_k")}
    found = outcomes(policy, blocks, 2, **law)
    keys = zip(
        *(x[:, 1:].tolist() for x in (rollout.tokens, rollout.unmask_step, rollout.order.block_first_step)), strict=True
    )
    chances = torch.tensor([found[tuple(tuple(part) for part in key)] for key in keys])
    torch.testing.assert_close(contributions.sum(-1), chances.log(), rtol=0, atol=3e-5)
    for rank in (rules.MaxProb(), rules.RandomOrder()):
        other = sampler.replace(rank=rank)(policy, prompts, torch.Generator().manual_seed(0))
        assert other.order.logprobs is None and other.order.rank_name == rank.name
    greedy = Unmask(max_new_tokens=4, suppress=suppress, rank=rules.Confidence(), diffusion_steps=2)
    greedy = greedy(policy, prompts, torch.Generator())
    assert greedy.order.logprobs is None, "without a temperature nothing is left to chance"


def test_the_mean_ratio_to_another_policy_is_its_mass_on_what_the_rollout_can_do(fp64):
    """Off-policy, tokens and order together are importance weights: their mean under the rollout policy is the share of
    the other policy's own outcomes that the rollout can have, 1 where it can have all. Tokens alone are not."""
    policy, near = (TablePolicy(length=4, words=3, seed=7, scale=0.8) for _ in range(2))
    near.table = near.table + 0.1 * torch.randn(near.table.shape, generator=GENERATOR.manual_seed(1))
    for other, least in ((near, 0.8), (TablePolicy(length=4, words=3, seed=8, scale=0.8), 0.3)):
        found, theirs = (outcomes(each, [[0, 1, 2, 3]], 2) for each in (policy, other))
        rollout, p = as_rollout(policy, found), torch.tensor(list(found.values()))
        mean = {}
        for order in (True, False):
            ours, new = (total(each, rollout, include_order=order) for each in (policy, other))
            mean[order] = float((p * (new - ours).exp()).sum())
        shared = sum(theirs.get(key, 0.0) for key in found)
        # Where the other policy cannot choose the order, MIN_LOGPROB stands for log 0.
        assert mean[True] == pytest.approx(shared, abs=1e-6) and shared > least
        assert abs(mean[False] - shared) > 0.01


def test_an_order_that_cannot_be_chosen_has_a_floor_and_no_gradient(fp64):
    policy = TablePolicy(length=3, words=3, seed=0)
    hidden = policy.table[0, :2].clone().requires_grad_()
    params = SamplingParams(suppress=(3, 4, 5))
    bounds = torch.tensor([-99.0, 0.0])  # nothing is less confident than that; everything is
    found = stay_masked_logprobs(policy, hidden, bounds, torch.tensor([True, False]), params)
    assert found.tolist() == [MIN_LOGPROB, 0.0]
    found.sum().backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[0].any()


def test_what_has_no_law_is_left_out_and_said(fp64):
    policy = TablePolicy(length=4, words=3, seed=2)
    rollout = as_rollout(policy, outcomes(policy, [[0, 1, 2, 3]], 2, top_k=2), top_k=2)
    for other in (replace(rollout, order=replace(rollout.order, logprobs=None)), rollout):
        merged = lik.Trajectory(num_segments=1).draw_views(other, GENERATOR)
        assert stayed_of(merged) is None and recorded(other, merged) is other.logprobs
    unlawful = replace(rollout, sampling_params=replace(rollout.sampling_params, support="rollout"))
    with pytest.raises(ValueError, match=r"sampling_support='rollout'.*Trajectory\(include_order=False\)"):
        lik.Trajectory().draw_views(unlawful, GENERATOR)
