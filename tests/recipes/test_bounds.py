"""The bounds of SPG and GDPO (recipes/examples/bounds.py) against plain-Python enumeration on toys."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from likelihood_toys import (
    COMPLETION,
    LENGTH,
    TOY,
    TablePolicy,
    all_exact,
    elbo_by_hand,
    eubo_by_hand,
    log_any_order,
    orders,
    seeded,
    summed,
)

from dllm_rl.likelihoods import estimators as lik
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.types.scoring import Views
from recipes.examples.bounds import EUBO, BlockELBO, Quadrature, Sandwich, block_view, upper_bound


def test_block_over_all_masks_is_the_sum_of_each_blocks_elbo():
    toy, tokens = TablePolicy(length=3, words=3, seed=4), [1, 2, 0]
    by_hand = elbo_by_hand(toy, tokens, (0, 1), later=(2,)) + elbo_by_hand(toy, tokens, (2,))
    # Two blocks, of 2 and 1 tokens; k has 2 and 1 values: a grid of 2 x 2 uniforms covers both evenly.
    grid = [torch.tensor([[u]], dtype=torch.float64) for u in (0.25, 0.75)]
    completion = torch.tensor([[False, True, True, True]])
    views = [block_view(completion, keys, u, v, block_size=2) for keys in orders(3) for u in grid for v in grid]
    estimate = summed(toy, toy.rollout([tokens]), [(m, w / len(views)) for m, w in views])
    assert estimate == pytest.approx(by_hand, abs=1e-5)
    # One block holds everything: the any-order ELBO. Blocks of one token: the left-to-right factorisation, exactly.
    whole = [torch.tensor([[(j + 0.5) / 3]], dtype=torch.float64) for j in range(3)]
    views = [block_view(completion, keys, grid[0], v, block_size=3) for keys in orders(3) for v in whole]
    estimate = summed(toy, toy.rollout([tokens]), [(m, w / len(views)) for m, w in views])
    assert estimate == pytest.approx(elbo_by_hand(toy, tokens), abs=1e-5)
    views = [block_view(completion, keys, u, grid[0], block_size=1) for keys in orders(3) for u in whole]
    estimate = summed(toy, toy.rollout([tokens]), [(m, w / len(views)) for m, w in views])
    left_to_right = sum(toy.logp(tokens, set(range(i, 3)), i) for i in range(3))
    assert estimate == pytest.approx(left_to_right, abs=1e-5)


@pytest.mark.slow
def test_quadrature_bias_is_what_its_nodes_say():
    """Over all masks of its sizes, two nodes give w_1 g(k_1) + w_2 g(k_2): 0.5 g(1) + 0.5 g(3) at L = 3."""
    rollout = TOY.rollout([COMPLETION] * 6000)

    def g(k):
        terms = [TOY.logp(COMPLETION, m, i) for m in map(set, subsets(k)) for i in m]
        return LENGTH / k * sum(terms) / math.comb(LENGTH, k)

    estimator = Quadrature(nodes=2)
    noise = estimator.draw_views(rollout, seeded(5))
    assert noise.masked.sum(-1).unique(dim=1).tolist() == [[1], [3]]
    totals = estimator.logprobs(TOY, rollout, noise).double().sum(-1)
    expected = 0.5 * g(1) + 0.5 * g(3)
    assert abs(totals.mean() - expected) < 4 * totals.std() / math.sqrt(6000)
    bias = expected - elbo_by_hand(TOY, COMPLETION)
    assert abs(bias) > 0.05  # a bias that more masks do not remove; three nodes hit k = 1, 2, 3 with weights 5/18, 8/18
    three = 5 / 18 * (g(1) + g(3)) + 8 / 18 * g(2)
    totals = Quadrature(nodes=3)
    totals = totals.logprobs(TOY, rollout, totals.draw_views(rollout, seeded(6))).double().sum(-1)
    assert abs(totals.mean() - three) < 4 * totals.std() / math.sqrt(6000)


def subsets(k):
    return [m for m in product(range(LENGTH), repeat=k) if list(m) == sorted(set(m))]


def test_quadrature_is_unbiased_where_the_integrand_is_linear_in_k():
    """l_i(m) = -|m|^2 gives (L/k) sum = -L k^2... so take l_i(m) = -|m|: g(k) = -L k, the mean of it -L (L+1)/2."""
    length = 40
    rollout = TablePolicy(length=1, words=2, seed=0).rollout([[0] * length], prompt=3)
    for nodes in (1, 2, 3):
        noise = Quadrature(nodes=nodes).draw_views(rollout, seeded(0))
        count = noise.masked.sum(-1, keepdim=True)
        estimate = -(noise.coefficients * count).sum().item()
        # Rounding t_n L moves k by up to half a token; the rule itself is exact.
        assert abs(estimate + length * (length + 1) / 2) <= length * 0.5 + 1e-3
        assert not noise.masked[..., :3].any()  # the prompt
        assert ((noise.coefficients != 0) == noise.masked).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 3), st.integers(2, 4), st.floats(0.1, 4))
def test_bounds_hold_on_random_toys(seed, length, words, scale):
    """elbo <= log p <= eubo(beta = L), and elbo <= eubo(beta) for every beta, averaged over ALL masks."""
    toy = TablePolicy(length=length, words=words, seed=seed, scale=scale)
    tokens = torch.randint(words, (length,), generator=seeded(seed)).tolist()
    noise = Views(*(torch.stack(column) for column in zip(*all_exact(length), strict=True)))
    exact = log_any_order(toy, tokens)
    scores = lik.ELBO().view_logprobs(toy, toy.rollout([tokens]), noise)
    lower = lik.ELBO().combine(scores, noise).double().sum().item()
    assert lower == pytest.approx(elbo_by_hand(toy, tokens), abs=1e-4)
    assert lower <= exact + 1e-4
    for beta in (0.5, 1.0, 1.5, float(length)):
        upper = upper_bound(scores, noise, beta=beta).double().sum().item()
        assert upper == pytest.approx(eubo_by_hand(toy, tokens, beta), abs=1e-4)
        assert upper >= lower - 1e-4
    assert upper >= exact - 1e-4


def test_eubo_below_the_token_count_can_miss_an_inconsistent_model():
    """p_1 is 0.9 read first and 0.1 read second, p_2 the reverse: log p = log 0.41, eubo(1) = 2 log 0.5 < log p."""
    toy = TablePolicy(length=2, words=2, seed=0)
    toy.table[:] = 0
    first, second = math.log(9), -math.log(9)
    toy.table[2 * 3 + 2, 0, 0], toy.table[2 * 3 + 2, 1, 0] = first, second  # both masked
    toy.table[2 + 3 * 0, 0, 0], toy.table[0 + 3 * 2, 1, 0] = second, first  # the other one is visible
    assert log_any_order(toy, [0, 0]) == pytest.approx(math.log(0.41))
    views = all_exact(2)
    at = lambda beta: summed(toy, toy.rollout([[0, 0]]), views, EUBO(beta=beta))  # noqa: E731
    assert at(1.0) == pytest.approx(2 * math.log(0.5), abs=1e-6)
    assert at(2.0) == pytest.approx(math.log(0.41), abs=1e-6)  # Hoelder's bound is reached


def test_eubo_by_hand_and_unscored_positions():
    """Two views: 0.5 * 0.2^2 + 1.5 * 0.4^2 = 0.26 at one token, 2 * 0.3^2 at another, nothing at the third."""
    scores = torch.tensor([[[math.log(0.2), math.log(0.3), 0.0]], [[math.log(0.4), 0.0, 0.0]]], requires_grad=True)
    weight = torch.tensor([[[0.5, 2.0, 0.0]], [[1.5, 0.0, 0.0]]])
    out = upper_bound(scores, Views(weight > 0, weight), beta=2.0)
    assert out[0].tolist() == pytest.approx([0.5 * math.log(0.26), 0.5 * math.log(0.18), 0.0], abs=1e-6)
    out.sum().backward()
    # d/ds of (1/beta) log sum w exp(beta s) is the softmax share of each view
    assert scores.grad.flatten().tolist() == pytest.approx([0.02 / 0.26, 1.0, 0.0, 0.24 / 0.26, 0.0, 0.0], abs=1e-6)


def test_sandwich_takes_the_bound_that_the_advantage_calls_for():
    rollout = TOY.rollout([COMPLETION] * 3)
    advantages = torch.tensor([1.0, -2.0, 0.0])
    base = lik.ELBO(num_samples=4)
    both = Sandwich(beta=1.5, mix=0.25, base=base)
    noise = both.draw_views(rollout, seeded(0))
    lower = base.logprobs(TOY, rollout, noise)
    upper = EUBO(beta=1.5, base=base).logprobs(TOY, rollout, noise)
    assert torch.equal(both.logprobs(TOY, rollout, noise), lower)  # no advantages given yet
    told = both.with_advantages(noise, advantages)
    assert torch.equal(told.masked, noise.masked) and torch.equal(told.coefficients, noise.coefficients)
    mixed = both.logprobs(TOY, rollout, told)
    assert torch.equal(mixed[[0, 2]], lower[[0, 2]])
    torch.testing.assert_close(mixed[1], 0.25 * upper[1] + 0.75 * lower[1])
    assert (upper[1] - lower[1]).abs().sum() > 0.05
    assert torch.equal(told.rows(torch.tensor([1])).features[-1].weight, torch.tensor([0.25]))
    assert base.with_advantages(noise, advantages) is noise


@pytest.mark.parametrize("estimator", [BlockELBO(block_size=2), Sandwich(base=BlockELBO(block_size=2))])
def test_blocks_that_begin_in_the_prompt_are_not_those_of_the_estimate(estimator):
    policy = tiny_masked_lm(characters="12")
    estimator.check_policy(policy)
    policy.spec = replace(policy.spec, attention="block_causal", block_size=2)
    with pytest.raises(ValueError, match=r"is for full attention.*use Trajectory"):
        estimator.check_policy(policy)


def test_the_strata_of_blocks_say_nothing_of_how_much_of_each_is_hidden():
    """Block and number hidden are independent: with both in strata of the same sample, an early block would always have
    few hidden, and a late one many."""
    rollout = TablePolicy(length=4, words=2, seed=0).rollout(torch.tensor([[0, 1, 0, 1]]))
    estimator, seen = BlockELBO(block_size=2, num_samples=2), [set(), set()]
    for seed in range(40):
        noise = estimator.draw_views(rollout, seeded(seed))
        for sample, weight in enumerate(noise.coefficients[:, 0]):
            scored = (weight != 0).nonzero()[:, 0] - 1  # after one prompt token
            seen[sample].add((int(scored[0]) // 2, len(scored)))
    assert seen == [{(0, 1), (0, 2)}, {(1, 1), (1, 2)}]


def test_block_view_worked_by_hand():
    """Three blocks of two; the second is chosen, one of its tokens masked: weight 3 blocks * 2 / 1. The first block is
    visible, the third is masked and not scored."""
    keys = torch.tensor([[0.3, 0.2, 0.9, 0.1, 0.5, 0.6]])
    half, low = torch.tensor([[0.5]]), torch.tensor([[0.1]])
    masked, weight = block_view(torch.ones(1, 6, dtype=torch.bool), keys, half, low, block_size=2)
    assert masked.tolist() == [[False, False, False, True, True, True]]
    assert weight.tolist() == [[0.0, 0.0, 0.0, 6.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("estimator", "settings", "message"),
    [
        (Quadrature, {"nodes": 0}, r"nodes=0"),
        (BlockELBO, {"block_size": 0}, r"block_size=0"),
        (EUBO, {"beta": 0.0}, r"beta=0.0 must lie in \[0.01, 1000000\]"),
        (Sandwich, {"mix": 2.0}, r"mix=2.0 must lie in \[0, 1\]"),
    ],
)
def test_bad_settings_are_named(estimator, settings, message):
    with pytest.raises(ValueError, match=message):
        estimator(**settings)
