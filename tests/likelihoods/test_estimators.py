"""Each estimator against plain-Python enumeration on toys that no joint distribution fits."""

import math
from dataclasses import replace

import pytest
import torch
from likelihood_toys import COMPLETION, LENGTH, TOY, WORDS, TablePolicy, all_exact, elbo_by_hand, orders, seeded, summed

from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.masks import coupled_views
from dllm_rl.likelihoods.views import each_view
from dllm_rl.types.scoring import Views
from recipes.examples import bounds


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


@pytest.mark.parametrize("estimator", [bounds.EUBO(), bounds.Sandwich(), lik.Coupled()])
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
    if isinstance(estimator, bounds.EUBO):
        assert out[0, 1] == -torch.inf and out[0, 2].item() == pytest.approx(-0.5 + math.log(0.5) / 1.5)
        assert gradient[:, 0, 2].tolist() == [0.0, 1.0]


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
        (lik.OneStep, {"prompt_mask": 1.0}, r"prompt_mask=1.0 must lie in \[0, 1\)"),
        (lik.Trajectory, {"num_segments": 0}, r"num_segments=0 must be at least 1"),
    ],
)
def test_bad_settings_are_named(estimator, settings, message):
    with pytest.raises(ValueError, match=message):
        estimator(**settings)
