"""The gradient laboratory: its truth against autograd, rows as theory has them, planted faults that move them."""

from dataclasses import replace

import pytest
import torch
from refusals import refused

from dllm_rl.algorithms import correctors as c
from dllm_rl.algorithms.losses import PPOClip, Reinforce
from dllm_rl.likelihoods.estimators import ELBO, FunctionLikelihood, Trajectory
from dllm_rl.testing import enumeration
from dllm_rl.testing.enumeration import (
    CLAIMS,
    GradientRow,
    ToyPolicy,
    against,
    contributions,
    corrects,
    estimator_table,
    gradient_table,
    of_batches,
    per_outcome,
    references,
    speaks_against,
)
from recipes.examples.bounds import EUBO, Sandwich
from recipes.studies.likelihoods.surrogates import UniformSteps

pytestmark = pytest.mark.slow

SMALL = {"networks": 3, "sigmas": (0.3,), "length": 3}
SEQUENCE = c.TIS(cap=1e9, level="sequence")


def table(corrector, **options):
    return gradient_table(corrector, **{**SMALL, **options})


def test_its_truth_is_autograds_gradient_of_the_expected_reward():
    generator = torch.Generator().manual_seed(0)
    toy = ToyPolicy(length=3, words=3, sharpness=2.0, generator=generator)
    for weight in toy.weights:
        weight.requires_grad_()
    rollout, rewards = toy.rollout(2), torch.randn(27, dtype=torch.float64, generator=generator)
    noise = Trajectory().draw_views(rollout, generator)
    logps = contributions(toy, rollout, noise, Trajectory())
    chances = logps.sum(-1).exp()
    torch.testing.assert_close(chances.sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-12)
    jacobian = per_outcome(toy, logps)
    by_scores = torch.einsum("b,btw->w", chances.detach() * rewards, jacobian)
    direct = torch.autograd.grad((chances * rewards).sum(), toy.weights)
    torch.testing.assert_close(by_scores, torch.cat([g.flatten() for g in direct]), rtol=0, atol=1e-12)


def test_bias_noise_and_efficiency_by_hand():
    """Two outcomes, likely .25 and .75, of gradients (4, 0) and (0, 4): mean (1, 3), E|g|^2 = 16, variance 6."""
    each, chances = torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([0.25, 0.75])
    bias, rmse, efficiency = against(torch.tensor([1.0, 0.0]), each, chances, 2)
    assert bias == pytest.approx(3) and rmse == pytest.approx((9 + 3) ** 0.5)
    assert efficiency == pytest.approx(1 / 13**0.5)


def test_on_policy_every_corrector_is_unbiased():
    for corrector in (c.NoCorrection(), c.TIS(), SEQUENCE, c.AIS(), c.IcePop(), c.TBPO(), c.Reject()):
        for row in table(corrector, sigmas=(0.0,)):
            assert row.bias < 1e-12 and row.mean_weight == pytest.approx(1, abs=1e-12) == row.ess


def test_sequence_weights_are_unbiased_and_have_mean_one():
    for row in table(SEQUENCE, sigmas=(0.1, 0.5)):
        assert row.bias < 1e-12 and row.mean_weight == pytest.approx(1, abs=1e-12) and row.ess < 1


def test_token_weights_are_biased_with_a_cap_and_without():
    for corrector in (c.TIS(), c.TIS(cap=1e9), c.IcePop()):
        for row, none in zip(table(corrector), table(c.NoCorrection()), strict=True):
            assert 0.05 < row.bias < none.bias
    for row in table(c.TIS(cap=1e9)):
        assert row.mean_weight == pytest.approx(1, abs=1e-12), "each token's weights have mean one all the same"


def test_a_cap_buys_less_noise_with_bias():
    capped, raw = table(c.TIS(level="sequence"), sigmas=(0.5,)), table(SEQUENCE, sigmas=(0.5,))
    for one, other in zip(capped, raw, strict=True):
        assert one.bias > 0.01 and one.ess > other.ess
    assert capped[1].rmse < raw[1].rmse  # concentrated policies


def test_more_rows_less_noise_and_the_same_bias():
    few, many = (table(c.NoCorrection(), batch=batch) for batch in (16, 1024))
    for one, other in zip(few, many, strict=True):
        assert one.bias == other.bias and one.rmse > other.rmse and one.efficiency < other.efficiency


def test_real_batches_by_hand():
    """Batches that gave (1, 0), (3, 0) and (2, 3), truth (2, 0): mean (2, 1), variances 1 and 3, noise of the mean 4/3:
    of the square bias 1 nothing is left; square errors 1, 1, 9, square sizes 1, 9, 13."""
    means = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
    bias, rmse, efficiency = of_batches(torch.tensor([2.0, 0.0]), means)
    assert bias == 0 and rmse == pytest.approx((11 / 3) ** 0.5 / 2) and efficiency == pytest.approx(2 / (23 / 3) ** 0.5)
    bias, _, _ = of_batches(torch.tensor([0.0, 0.0]) + torch.tensor([4.0, 0.0]), means)
    assert bias == pytest.approx((5 - 4 / 3) ** 0.5 / 4)


def test_real_batches_agree_with_one_without_end_and_see_their_own_size():
    """Of a corrector that weighs each row by itself the two are one number, but for 100 draws' noise; a self-normalized
    weight has mean 1 in every batch, however small, and less noise."""
    few = {"batch": 8, "networks": 1, "policies": ("early",)}
    (one,), (other,) = table(c.TIS(), draws=100, **few), table(c.TIS(), **few)
    assert one.rmse == pytest.approx(other.rmse, rel=0.15) and one.bias == pytest.approx(other.bias, abs=0.2)
    (normed,) = table(planted(self_normalized), draws=100, **few)
    (raw,) = table(planted(SEQUENCE.weights), draws=100, **few)
    assert normed.mean_weight == pytest.approx(1, abs=1e-12) and normed.rmse < raw.rmse
    assert raw.mean_weight != pytest.approx(1, abs=1e-3)


def planted(weigh):
    return c.FunctionCorrector(function=weigh, loss=Reinforce())


def self_normalized(stats):
    """Sequence weights divided by their mean over the batch."""
    weights, keep, metrics = SEQUENCE.weights(stats)
    return weights / weights[:, :1].mean(), keep, metrics


def upside_down(stats):
    return c.TIS(cap=1e9, level="sequence").weights(replace(stats, log_mismatch=-stats.log_mismatch))


def doubled(stats):
    weights, keep, metrics = c.TIS(cap=1e9, level="sequence").weights(stats)
    return 2 * weights, keep, metrics


def of_the_first_token(stats):
    first = stats.log_mismatch[:, :1].expand_as(stats.mask)
    return c.TIS(cap=1e9).weights(replace(stats, log_mismatch=first))


def only_where_positive(stats):
    weights, keep, metrics = c.TIS(cap=1e9, level="sequence").weights(stats)
    return torch.where(stats.advantages[:, None] > 0, weights, 1), keep, metrics


@pytest.mark.parametrize("fault", [upside_down, doubled, of_the_first_token, only_where_positive])
def test_planted_faults_move_a_row(fault):
    good = table(planted(SEQUENCE.weights))
    for right, wrong in zip(good, table(planted(fault)), strict=True):
        assert right.bias < 1e-12 and wrong.bias > 0.05


def test_an_update_off_policy_needs_the_ratio():
    """Rollouts of the learner before an update: r A has the learner's own gradient where tokens are one, `Reinforce`
    has none of it, and PPO's clip gives some of it away for a bound."""
    single = {"length": 1, "diffusion_steps": 1, "moved": "old"}
    for name, surrogate, unbiased in (
        ("ratio", PPOClip(epsilon=1e9), True),
        ("reinforce", Reinforce(), False),
        ("clipped", PPOClip(epsilon=0.05), False),
    ):
        for row in table(c.FunctionCorrector(loss=surrogate), **single):
            assert (row.bias < 1e-12) == unbiased, name


@pytest.mark.nightly
def test_a_ratio_of_estimates_is_no_likelihood_ratio():
    """exp of a difference of two estimates under the same masks: its mean over masks and over the completions of the
    old policy is 1 for likelihoods, and another number for bounds."""
    old = ToyPolicy(length=4, words=3, sharpness=1.0, generator=torch.Generator().manual_seed(0))
    new = old.moved(0.3, torch.Generator().manual_seed(1))
    rollout, exact = old.rollout(2), Trajectory()
    made = {"Trajectory()": exact} | {f"ELBO(num_samples={count})": ELBO(num_samples=count) for count in (4, 1)}

    def log_ratio(estimator, seed):
        views = estimator.draw_views(rollout, torch.Generator().manual_seed(seed))
        return contributions(new, rollout, views, estimator).sum(-1) - contributions(
            old, rollout, views, estimator
        ).sum(-1)

    with torch.no_grad():
        p = contributions(old, rollout, exact.draw_views(rollout, torch.Generator()), exact).sum(-1).exp()
        for name, estimator in made.items():
            draws = torch.stack([log_ratio(estimator, seed) for seed in range(200 if estimator.is_random else 2)])
            mean = float(p @ draws.exp().mean(0))
            assert (abs(mean - 1) < 1e-12) == (estimator is exact), name


def too_short(rollout, generator):
    """The masks of `ELBO`, and nine tenths of its weights."""
    views = ELBO(num_samples=4).draw_views(rollout, generator)
    return replace(views, coefficients=0.9 * views.coefficients)


HOLD = {
    "every step": (Trajectory(), {"exact", "unbiased for the order taken"}),
    "a segment": (Trajectory(num_segments=1), set()),
    "some steps": (UniformSteps(k=1), {"unbiased for the order taken"}),
    "elbo": (ELBO(num_samples=4), {"unbiased for the ELBO", "lower bound"}),
    "eubo": (EUBO(base=ELBO(num_samples=16), beta=3.0), {"upper bound"}),
    "too short": (FunctionLikelihood(function=too_short), {"upper bound"}),
}


@pytest.mark.parametrize("name", HOLD)
def test_an_estimator_is_told_which_claims_hold(name):
    estimator, hold = HOLD[name]
    rows = estimator_table(estimator, draws=20, length=3)
    assert {claim for claim in CLAIMS if not speaks_against(rows, claim)} == hold


def test_the_references_of_an_estimator_are_in_their_order():
    """By Jensen the ELBO lies below log p in random order, in every completion: `ELBO` shows both distances."""
    taken, bound, any_order = estimator_table(ELBO(num_samples=4), draws=20)
    assert (taken.reference, bound.reference, any_order.reference) == ("order taken", "ELBO", "random order")
    assert any_order.bias < bound.bias and any_order.below > 4 > max(bound.below, bound.above)
    exact = estimator_table(Trajectory(), draws=2)[0]
    assert exact.cosine == pytest.approx(1, abs=1e-12) and exact.gradient_noise == 0 and exact.error < 1e-12


def test_the_references_are_probabilities_and_a_bound_of_one():
    """Over all completions both probabilities add up to 1. The ELBO lies below log p in random order in each of them,
    and the upper bound above it; of log p in the order taken neither is a bound."""
    toy = ToyPolicy(length=4, words=3, sharpness=1.0, generator=torch.Generator().manual_seed(0))
    rollout = toy.rollout(2)
    taken, lower, any_order = references(toy, rollout).values()
    assert len(taken) == 81
    for logps in (taken, any_order):
        assert abs(logps.exp().sum() - 1) < 1e-12
    many = EUBO(beta=4.0, base=ELBO(num_samples=400))  # many masks, and beta is the number of tokens
    upper = contributions(toy, rollout, many.draw_views(rollout, torch.Generator().manual_seed(0)), many).sum(-1)
    assert (lower < any_order).all() and (any_order < upper).all()
    assert not (lower < taken).all() and not (taken < upper).all()


def test_the_sandwich_gets_the_toys_advantages():
    rows = estimator_table(Sandwich(), draws=4, length=3)
    assert rows[0].bias != estimator_table(ELBO(num_samples=4), draws=4, length=3)[0].bias


def test_a_corrector_reads_the_learners_entropy():
    """In one step all positions are masked: the entropies are those of the toy's logits there, of whichever policy is
    the learner."""
    seen = []

    def keep(stats):
        seen.append(stats.entropy[0])
        return c.NoCorrection().weights(stats)

    corrector = c.FunctionCorrector(function=keep, needs_entropy=True)
    gradient_table(corrector, policies=("early",), diffusion_steps=1, **SMALL | {"networks": 1})
    toy = ToyPolicy(length=3, words=3, sharpness=1.0, generator=torch.Generator().manual_seed(0))
    logps = toy.hidden(torch.full((1, 3), 3), torch.ones(1, 3, dtype=torch.bool))[0, :, :3].log_softmax(-1)
    torch.testing.assert_close(seen[0].double(), -(logps.exp() * logps).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("bias", "efficiency", "passes"),
    [
        ((0.36, 0.45), (0.8, 0.7), True),
        ((0.1, 0.1), (0.795, 0.695), True),
        ((0.4, 0.5), (0.8, 0.7), False),  # no corrector
        ((0.1, 0.46), (0.9, 0.9), False),  # the bias, in one row
        ((0.1, 0.1), (0.9, 0.68), False),  # the efficiency, in one row
    ],
)
def test_a_corrector_passes_by_its_bias_and_its_efficiency_in_every_row(monkeypatch, bias, efficiency, passes):
    def rows(biases, efficiencies):
        return [GradientRow("early", 0.1, 128, b, 1, e, 1, 1) for b, e in zip(biases, efficiencies, strict=True)]

    tables = {c.NoCorrection(): rows((0.4, 0.5), (0.8, 0.7)), c.TIS(): rows(bias, efficiency)}
    monkeypatch.setattr(enumeration, "gradient_table", tables.get)
    assert corrects(c.TIS()) == passes


test_refused = refused(
    (lambda: gradient_table(c.NoCorrection(), moved="reference"), "moved='reference' must be 'rollout' or 'old'"),
    (lambda: gradient_table(c.NoCorrection(), draws=1), "draws=1 must be 0"),
    (lambda: estimator_table(ELBO(), draws=1), "draws=1 must be at least 2"),
    (lambda: speaks_against([], "unbiased"), "claim='unbiased' must be one of 'exact'"),
)
