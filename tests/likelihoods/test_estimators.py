"""Each estimator against plain-Python enumeration on toys that no joint distribution fits."""

import math
from dataclasses import replace
from functools import cache
from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from likelihood_toys import TablePolicy, elbo_by_hand, eubo_by_hand, log_any_order

from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.masks import block_view, coupled_views, k_masked_view
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.types import Views

LENGTH, WORDS = 3, 3
COMPLETION = [2, 0, 1]
TOY = TablePolicy(length=LENGTH, words=WORDS, seed=0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orders(length: int, prompt: int = 1):
    """Every order of the completion's positions, as keys (1, T)."""
    for order in permutations(range(length)):
        keys = torch.full((1, prompt + length), torch.inf)
        keys[0, prompt:] = torch.tensor(order, dtype=torch.float)
        yield keys


def summed(policy, rollout, views, estimator=lik.ELBO()) -> float:
    """The estimate that these views give together, a mean over as many samples as there are views' weights for."""
    noise = Views(*(torch.stack(column) for column in zip(*views, strict=True)))
    return estimator.logprobs(policy, rollout, noise).double().sum().item()


@cache
def all_exact(length: int):
    """(masked, weight) for every k and every order, weights divided by their number: the whole of elbo's randomness."""
    inside = torch.tensor([[False] + [True] * length])
    views = [k_masked_view(inside, keys, torch.tensor([[k]])) for keys in orders(length) for k in range(1, length + 1)]
    return [(masked, weight / len(views)) for masked, weight in views]


def test_elbo_over_all_masks_is_the_hand_enumeration():
    estimate = summed(TOY, TOY.rollout([COMPLETION]), all_exact(LENGTH))
    assert estimate == pytest.approx(elbo_by_hand(TOY, COMPLETION), abs=1e-5)


def test_coupled_over_all_masks_is_the_hand_enumeration():
    inside, views = torch.tensor([[False, True, True, True]]), []
    for keys in orders(LENGTH):
        for k in range(LENGTH + 1):
            views += coupled_views(inside, keys, torch.tensor([[k]]))
    samples = math.factorial(LENGTH) * (LENGTH + 1)
    estimate = summed(TOY, TOY.rollout([COMPLETION]), [(m, w / samples) for m, w in views])
    assert estimate == pytest.approx(elbo_by_hand(TOY, COMPLETION), abs=1e-5)


@pytest.mark.parametrize("name", ["elbo", "coupled"])
def test_the_gradient_over_all_masks_is_that_of_the_enumerated_elbo(name):
    """Along random lines through all weights, against differences of the ELBO by hand."""
    toy, direction = TablePolicy(length=LENGTH, words=WORDS, seed=3), torch.Generator().manual_seed(1)
    views = all_exact(LENGTH)
    if name == "coupled":
        inside = torch.tensor([[False, True, True, True]])
        pairs = [coupled_views(inside, keys, torch.tensor([[k]])) for keys in orders(LENGTH) for k in range(LENGTH + 1)]
        views = [(masked, weight / len(pairs)) for pair in pairs for masked, weight in pair]
    noise, table = Views(*(torch.stack(column) for column in zip(*views, strict=True))), toy.table
    toy.table = table.clone().requires_grad_()
    scores = torch.stack([view.logprobs(toy, toy.rollout([COMPLETION])) for view in each_view(noise)])
    (gradient,) = torch.autograd.grad(lik.ELBO().combine(scores, noise).sum(), toy.table)
    for _ in range(3):
        line, ends = torch.randn(table.shape, generator=direction), []
        for sign in (1, -1):
            toy.table = table + sign * 1e-2 * line
            ends.append(elbo_by_hand(toy, COMPLETION))
        slope = (ends[0] - ends[1]) / 2e-2
        assert (gradient * line).sum().item() == pytest.approx(slope, abs=1e-3)
        assert abs(slope) > 0.05


def test_coupled_scores_every_token_once_a_sample():
    inside = torch.tensor([[False, True, True, True]])
    for keys in orders(LENGTH):
        for k in range(LENGTH + 1):
            (a, wa), (b, wb) = coupled_views(inside, keys, torch.tensor([[k]]))
            assert torch.equal(a ^ b, inside) and torch.equal(((wa > 0) | (wb > 0)), inside)
            # (L+1)/2k on k tokens and (L+1)/2(L-k) on the rest: L+1 in all, or half of it when a set is empty
            assert float((wa + wb).sum()) == pytest.approx((LENGTH + 1) / (1 if 0 < k < LENGTH else 2))


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


def test_stratification_and_antithetic_pairs_lower_the_variance():
    rollout = TOY.rollout([COMPLETION] * 3000)

    def variance(**options):
        estimator = lik.ELBO(num_samples=4, **options)
        return estimator.logprobs(TOY, rollout, estimator.draw_views(rollout, seeded(2))).sum(-1).var().item()

    plain, stratified, both = variance(stratified=False), variance(), variance(antithetic=True)
    assert stratified < 0.9 * plain and both < 0.9 * stratified


def test_antithetic_pairs_cover_the_completion_and_mirror_k():
    rollout = TOY.rollout([COMPLETION] * 64)
    masked = lik.ELBO(num_samples=4, antithetic=True).draw_views(rollout, seeded(3)).masked
    first, second = masked[:2], masked[2:]
    assert torch.equal(first | second, rollout.completion_mask.expand(2, -1, -1))
    assert (first.sum(-1) + second.sum(-1) == LENGTH + 1).all()
    assert {int(k) for k in masked.sum(-1).unique()} == {1, 2, 3}


@pytest.mark.slow
def test_quadrature_bias_is_what_its_nodes_say():
    """Over all masks of its sizes, two nodes give w_1 g(k_1) + w_2 g(k_2): 0.5 g(1) + 0.5 g(3) at L = 3."""
    rollout = TOY.rollout([COMPLETION] * 6000)

    def g(k):
        terms = [TOY.logp(COMPLETION, m, i) for m in map(set, subsets(k)) for i in m]
        return LENGTH / k * sum(terms) / math.comb(LENGTH, k)

    estimator = lik.Quadrature(nodes=2)
    noise = estimator.draw_views(rollout, seeded(5))
    assert noise.masked.sum(-1).unique(dim=1).tolist() == [[1], [3]]
    totals = estimator.logprobs(TOY, rollout, noise).double().sum(-1)
    expected = 0.5 * g(1) + 0.5 * g(3)
    assert abs(totals.mean() - expected) < 4 * totals.std() / math.sqrt(6000)
    bias = expected - elbo_by_hand(TOY, COMPLETION)
    assert abs(bias) > 0.05  # a bias that more masks do not remove; three nodes hit k = 1, 2, 3 with weights 5/18, 8/18
    three = 5 / 18 * (g(1) + g(3)) + 8 / 18 * g(2)
    totals = lik.Quadrature(nodes=3)
    totals = totals.logprobs(TOY, rollout, totals.draw_views(rollout, seeded(6))).double().sum(-1)
    assert abs(totals.mean() - three) < 4 * totals.std() / math.sqrt(6000)


def subsets(k):
    return [m for m in product(range(LENGTH), repeat=k) if list(m) == sorted(set(m))]


def test_quadrature_is_unbiased_where_the_integrand_is_linear_in_k():
    """l_i(m) = -|m|^2 gives (L/k) sum = -L k^2... so take l_i(m) = -|m|: g(k) = -L k, the mean of it -L (L+1)/2."""
    length = 40
    rollout = TablePolicy(length=1, words=2, seed=0).rollout([[0] * length], prompt=3)
    for nodes in (1, 2, 3):
        noise = lik.Quadrature(nodes=nodes).draw_views(rollout, seeded(0))
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
        upper = lik.upper_bound(scores, noise, beta=beta).double().sum().item()
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
    at = lambda beta: summed(toy, toy.rollout([[0, 0]]), views, lik.EUBO(beta=beta))  # noqa: E731
    assert at(1.0) == pytest.approx(2 * math.log(0.5), abs=1e-6)
    assert at(2.0) == pytest.approx(math.log(0.41), abs=1e-6)  # Hoelder's bound is reached


def test_eubo_by_hand_and_unscored_positions():
    """Two views: 0.5 * 0.2^2 + 1.5 * 0.4^2 = 0.26 at one token, 2 * 0.3^2 at another, nothing at the third."""
    scores = torch.tensor([[[math.log(0.2), math.log(0.3), 0.0]], [[math.log(0.4), 0.0, 0.0]]], requires_grad=True)
    weight = torch.tensor([[[0.5, 2.0, 0.0]], [[1.5, 0.0, 0.0]]])
    out = lik.upper_bound(scores, Views(weight > 0, weight), beta=2.0)
    assert out[0].tolist() == pytest.approx([0.5 * math.log(0.26), 0.5 * math.log(0.18), 0.0], abs=1e-6)
    out.sum().backward()
    # d/ds of (1/beta) log sum w exp(beta s) is the softmax share of each view
    assert scores.grad.flatten().tolist() == pytest.approx([0.02 / 0.26, 1.0, 0.0, 0.24 / 0.26, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("estimator", [lik.EUBO(), lik.Sandwich(), lik.Coupled()])
def test_a_token_of_probability_0_has_no_gradient_that_is_nan(estimator):
    """Training drops such a token: it passes a gradient of 0. A position that only one view excludes stays."""
    scores = torch.tensor([[[-1.0, -torch.inf, -torch.inf]], [[-2.0, -torch.inf, -0.5]]], requires_grad=True)
    views = Views(torch.ones(2, 1, 3, dtype=torch.bool), torch.full((2, 1, 3), 0.5))
    views = estimator.with_advantages(views, torch.tensor([-1.0]))
    out = estimator.combine(scores, views)
    assert out[0, 0].isfinite() and not out[0, 1].isfinite()
    kept = torch.tensor([[1.0, 0.0, float(out[0, 2].isfinite())]])
    (gradient,) = torch.autograd.grad(out, scores, kept)
    assert gradient.isfinite().all() and not gradient[..., 1].any() and gradient[:, 0, 0].all()
    if isinstance(estimator, lik.EUBO):
        assert out[0, 1] == -torch.inf and out[0, 2].item() == pytest.approx(-0.5 + math.log(0.5) / 1.5)
        assert gradient[:, 0, 2].tolist() == [0.0, 1.0]


def test_sandwich_takes_the_bound_that_the_advantage_calls_for():
    rollout = TOY.rollout([COMPLETION] * 3)
    advantages = torch.tensor([1.0, -2.0, 0.0])
    base = lik.ELBO(num_samples=4)
    both = lik.Sandwich(beta=1.5, mix=0.25, base=base)
    noise = both.draw_views(rollout, seeded(0))
    lower = base.logprobs(TOY, rollout, noise)
    upper = lik.EUBO(beta=1.5, base=base).logprobs(TOY, rollout, noise)
    assert torch.equal(both.logprobs(TOY, rollout, noise), lower)  # no advantages given yet
    told = both.with_advantages(noise, advantages)
    assert told.masked is noise.masked and told.coefficients is noise.coefficients
    mixed = both.logprobs(TOY, rollout, told)
    assert torch.equal(mixed[[0, 2]], lower[[0, 2]])
    torch.testing.assert_close(mixed[1], 0.25 * upper[1] + 0.75 * lower[1])
    assert (upper[1] - lower[1]).abs().sum() > 0.05
    assert torch.equal(told.rows(torch.tensor([1])).upper_bound_weight, torch.tensor([0.25]))
    assert base.with_advantages(noise, advantages) is noise


def test_one_step_is_the_product_of_marginals_and_masks_only_prompts():
    rollout = TOY.rollout([COMPLETION] * 500, prompt=20)
    estimator = lik.OneStep(prompt_mask=0.15)
    noise = estimator.draw_views(rollout, seeded(0))
    by_hand = [TOY.logp(COMPLETION, {0, 1, 2}, i) for i in range(3)]
    logps = estimator.logprobs(TOY, rollout, noise)
    assert logps[7, 20:].tolist() == pytest.approx(by_hand, abs=1e-6)
    assert logps[:, :20].abs().max() == 0 and noise.masked[0, :, 20:].all()
    share = noise.masked[0, :, :20].float().mean().item()
    assert abs(share - 0.15) < 4 * math.sqrt(0.15 * 0.85 / 10_000)
    assert not lik.OneStep(prompt_mask=0.0).draw_views(rollout, seeded(0)).masked[0, :, :20].any()


def test_a_group_shares_one_prompt_mask_and_each_row_has_the_law_of_its_own():
    """Of two prompt tokens each is hidden with probability 0.3, apart from the other and from other groups."""
    rollout = replace(TOY.rollout([COMPLETION] * 6000, prompt=2), group=torch.arange(6000) // 3)
    hidden = lik.OneStep(prompt_mask=0.3).draw_views(rollout, seeded(0)).masked[0, :, :2].view(2000, 3, 2)
    assert (hidden == hidden[:, :1]).all()
    patterns = (2 * hidden[:, 2, 0].long() + hidden[:, 2, 1].long()).bincount(minlength=4)
    for count, chance in zip(patterns.tolist(), (0.49, 0.21, 0.21, 0.09), strict=True):
        assert abs(count - 2000 * chance) < 4 * math.sqrt(2000 * chance * (1 - chance))
    apart = (hidden[:-1, 0] & hidden[1:, 0]).double().mean().item()
    assert abs(apart - 0.09) < 4 * math.sqrt(0.09 * 0.91 / 2000)


def test_trajectory_by_hand():
    """Tokens 2, 0, 1 committed at steps 1, 0, 0 and, merged into one segment, all at once."""
    steps = torch.tensor([[-1, 1, 0, 0]])
    rollout = TOY.rollout([COMPLETION], unmask_step=steps)
    estimator = lik.Trajectory()
    logps = estimator.logprobs(TOY, rollout, estimator.draw_views(rollout, seeded(0)))[0]
    everything = {0, 1, 2}
    by_hand = [TOY.logp(COMPLETION, {0}, 0), TOY.logp(COMPLETION, everything, 1), TOY.logp(COMPLETION, everything, 2)]
    assert logps.tolist() == pytest.approx([0, *by_hand], abs=1e-6)
    merged = lik.Trajectory(num_segments=1)
    logps = merged.logprobs(TOY, rollout, merged.draw_views(rollout, seeded(0)))[0]
    assert logps.tolist() == pytest.approx([0, *(TOY.logp(COMPLETION, everything, i) for i in range(3))], abs=1e-6)


def test_segments_split_each_rows_own_steps_evenly():
    """Rows of 4 and 2 steps in 2 segments: steps {0,1},{2,3} and {0},{1}."""
    toy = TablePolicy(length=4, words=2, seed=0)
    steps = torch.tensor([[-1, 0, 1, 2, 3], [-1, 1, 0, 1, 0]])
    rollout = toy.rollout([[0] * 4, [1] * 4], unmask_step=steps)
    weight = lik.Trajectory(num_segments=2).draw_views(rollout, seeded(0)).coefficients
    assert weight[0].tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 0, 1]]
    assert weight[1].tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 1, 0]]


@pytest.mark.parametrize(
    ("estimator", "settings", "message"),
    [
        (lik.ELBO, {"num_samples": 0}, r"num_samples=0 must be at least 1"),
        (lik.ELBO, {"num_samples": 3, "antithetic": True}, r"num_samples=3 must be even .* use 4"),
        (lik.Coupled, {"num_samples": 0}, r"num_samples=0"),
        (lik.Quadrature, {"nodes": 0}, r"nodes=0"),
        (lik.BlockELBO, {"block_size": 0}, r"block_size=0"),
        (lik.OneStep, {"prompt_mask": 1.0}, r"prompt_mask=1.0 must lie in \[0, 1\)"),
        (lik.EUBO, {"beta": 0.0}, r"beta=0.0 must lie in \[0.01, 1000000\]"),
        (lik.Sandwich, {"mix": 2.0}, r"mix=2.0 must lie in \[0, 1\]"),
        (lik.Trajectory, {"num_segments": 0}, r"num_segments=0 must be at least 1"),
    ],
)
def test_bad_settings_are_named(estimator, settings, message):
    with pytest.raises(ValueError, match=message):
        estimator(**settings)


@pytest.mark.parametrize("estimator", [lik.BlockELBO(block_size=2), lik.Sandwich(base=lik.BlockELBO(block_size=2))])
def test_blocks_that_begin_in_the_prompt_are_not_those_of_the_estimate(estimator):
    policy = tiny_masked_lm(characters="12")
    estimator.check_policy(policy)
    policy.spec = replace(policy.spec, attention="block_causal", block_size=2)
    with pytest.raises(ValueError, match=r"is for full attention.*use Trajectory"):
        estimator.check_policy(policy)
