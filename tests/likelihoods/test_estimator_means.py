"""Every estimator under every combination of its options, against the enumeration of its documented expectation."""

import math
from dataclasses import fields
from itertools import combinations, product

import pytest
import torch
from likelihood_toys import TablePolicy, elbo_by_hand
from order_toys import as_rollout, outcomes
from repetitions import slow

from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.estimators import FunctionLikelihood
from dllm_rl.records import subclasses
from recipes.examples import bounds

COMPLETION, ROWS = [2, 0, 1], 4000
TOY = TablePolicy(length=3, words=3, seed=2)
ALL = {0, 1, 2}
OPTIONS = {
    lik.OneStep: {"prompt_mask": (0.0, 0.5)},
    lik.ELBO: {
        "num_samples": (1, 2, 4),
        "stratified": (True, False),
        "antithetic": (True, False),
    },
    lik.Coupled: {"num_samples": (1, 3)},
    bounds.Quadrature: {"nodes": (1, 2, 3)},
    bounds.BlockELBO: {"block_size": (1, 2, 3), "num_samples": (1, 2, 3)},
    lik.Trajectory: {
        "num_segments": (None, 1, 2),
        "variance_growth": (None,),  # the draw comes after the views: test_drawn_steps.py
        "include_order": (True, False),
        "self_conditioning": ("detached", "full"),
        "block_size": (None,),  # packed views give the bits of the other ones: test_scoring.py
    },
    bounds.EUBO: {"beta": (0.5, 1.5)},
    bounds.Sandwich: {"beta": (0.5, 1.5), "mix": (0.0, 0.25, 1.0)},
}

OF_THE_EXAMPLE = (bounds.Quadrature, bounds.BlockELBO, bounds.EUBO, bounds.Sandwich)


def cases(*makers):
    return [
        (make, dict(zip(OPTIONS[make], values, strict=True)))
        for make in makers
        for values in product(*OPTIONS[make].values())
    ]


def named(value):
    return value.__name__ if callable(value) else ",".join(map(str, value.values()))


def test_every_option_is_listed():
    assert {*subclasses(lik.LikelihoodEstimator).values()} == {*OPTIONS, lik.Causal, FunctionLikelihood} - {
        *OF_THE_EXAMPLE
    }
    for make, options in OPTIONS.items():
        assert {*options} == {field.name for field in fields(make)} - {"base"}


def scored(masked, positions):
    return sum(TOY.logp(COMPLETION, set(masked), i) for i in positions)


def of_size(k):
    """(L/k) E sum_{i in m} l_i(m) over uniform sets of k positions."""
    return 3 / k * sum(scored(m, m) for m in combinations(range(3), k)) / math.comb(3, k)


def expected(make, nodes=None, block_size=None, num_segments=None, **options):
    """The expectation that the docstring of `make` states."""
    if make is lik.OneStep:
        return scored(ALL, ALL)
    if make is lik.ELBO:
        return sum(map(of_size, (1, 2, 3))) / 3
    if make is lik.Coupled:  # k is 0, 1, 2 or 3, each with chance 1/4
        total = 0.0
        for k in range(4):
            for m in map(set, combinations(range(3), k)):
                first = scored(m, m) * 4 / k if k else 0.0
                second = scored(ALL - m, ALL - m) * 4 / (3 - k) if k < 3 else 0.0
                total += (first + second) / 2 / 4 / math.comb(3, k)
        return total
    if make is bounds.Quadrature:  # Gauss-Legendre on [0, 1]; k = floor(3 t) + 1
        away = math.sqrt(0.15)
        rule = {1: {0.5: 1.0}, 2: {0.5 - math.sqrt(1 / 12): 0.5, 0.5 + math.sqrt(1 / 12): 0.5}}
        rule[3] = {0.5 - away: 5 / 18, 0.5: 8 / 18, 0.5 + away: 5 / 18}
        return sum(weight * of_size(math.floor(3 * t) + 1) for t, weight in rule[nodes].items())
    assert make is bounds.BlockELBO
    blocks = [range(start, min(start + block_size, 3)) for start in range(0, 3, block_size)]
    return sum(elbo_by_hand(TOY, COMPLETION, block, later=range(block.stop, 3)) for block in blocks)


def rollout_of(rows):
    return TOY.rollout([COMPLETION] * rows)


def made(make, settings):
    """The estimator, or None if it refuses these settings, which must be a refusal that names them."""
    try:
        return make(**settings)
    except ValueError as error:
        assert make is lik.ELBO and settings["antithetic"] and "num_samples=1 must be even" in str(error)
        return None


def assert_mean(estimator, rollout, by_hand):
    totals = estimator.logprobs(TOY, rollout, estimator.draw_views(rollout, torch.Generator().manual_seed(1)))
    totals = totals.double().sum(-1)
    error = totals.std() / math.sqrt(ROWS)
    assert abs(totals.mean() - by_hand) < 4.5 * error + 1e-5
    assert error < 0.06  # or the line above would say nothing


OFTEN = [
    (lik.OneStep, {"prompt_mask": 0.0}),
    (lik.ELBO, {"num_samples": 2, "stratified": True, "antithetic": False}),
    (lik.ELBO, {"num_samples": 4, "stratified": True, "antithetic": True}),
    (lik.Coupled, {"num_samples": 3}),
    (bounds.Quadrature, {"nodes": 3}),
    (bounds.BlockELBO, {"block_size": 2, "num_samples": 2}),
]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        case if case in OFTEN else slow(*case)
        for case in cases(lik.OneStep, lik.ELBO, lik.Coupled, bounds.Quadrature, bounds.BlockELBO)
    ],
    ids=named,
)
def test_the_mean_is_the_documented_expectation(make, settings):
    if estimator := made(make, settings):
        assert_mean(estimator, rollout_of(ROWS), expected(make, **settings))


@pytest.mark.parametrize("settings", [settings for _, settings in cases(lik.Trajectory)], ids=named)
@pytest.mark.repeated(every=5)
def test_the_mean_of_a_trajectory_is_that_of_its_segments(settings):
    """A row of confidence-ranked unmasking in three steps: its steps or segments, and the order if none is merged."""
    found = outcomes(TOY, [[0, 1, 2]], 3)
    key, chance = max(((key, p) for key, p in found.items() if key[0] == tuple(COMPLETION)), key=lambda pair: pair[1])
    steps, count = key[1], settings["num_segments"] or 3
    segment = [step * count // 3 for step in steps]
    by_hand = sum(scored({j for j in ALL if segment[j] >= segment[i]}, [i]) for i in ALL)
    is_whole = settings["num_segments"] is None
    if is_whole and settings["include_order"]:
        assert abs(math.log(chance) - by_hand) > 0.1
        by_hand = math.log(chance)
    estimator = lik.Trajectory(**settings)
    assert estimator.exact_for_sampler == is_whole
    assert_mean(estimator, as_rollout(TOY, [key] * ROWS), by_hand)


BASES = [made(*case) for case in cases(lik.ELBO, lik.Coupled, bounds.Quadrature, bounds.BlockELBO)]


@pytest.mark.parametrize(("make", "settings"), cases(bounds.EUBO, bounds.Sandwich), ids=named)
@pytest.mark.repeated(every=3)
def test_bounds_are_the_formula_of_the_views_of_every_base(make, settings):
    """Position by position, in Python floats: (1/beta) log sum_n w_n p_i(m_n)^beta, and its mix with sum_n w_n l_i."""
    rollout, beta, mix = rollout_of(2), settings["beta"], settings.get("mix", 1.0)
    advantages = torch.tensor([1.0, -1.0])
    for base in filter(None, BASES):
        estimator = make(base=base, **settings)
        views = estimator.draw_views(rollout, torch.Generator().manual_seed(2))
        plain = base.draw_views(rollout, torch.Generator().manual_seed(2))
        assert torch.equal(views.masked, plain.masked) and torch.equal(views.coefficients, plain.coefficients)
        assert not estimator.exact_for_sampler
        logps = estimator.logprobs(TOY, rollout, estimator.with_advantages(views, advantages))[:, 1:].tolist()
        for row, advantage in enumerate(advantages.tolist()):
            for i in range(3):
                terms = []
                for masked, weights in zip(views.masked[:, row, 1:], views.coefficients[:, row, 1:], strict=True):
                    hidden = {j for j in ALL if masked[j]}
                    terms.append((float(weights[i]), TOY.logp(COMPLETION, hidden, i)))
                lower = sum(w * logp for w, logp in terms)
                mass = sum(w * math.exp(beta * logp) for w, logp in terms)
                upper = math.log(mass) / beta if mass else 0.0
                weight = mix if make is bounds.EUBO or advantage < 0 else 0.0
                assert logps[row][i] == pytest.approx(weight * upper + (1 - weight) * lower, abs=1e-4)
