"""The study of corrections with an estimate: its views and its gradient are those of the library."""

from collections import Counter

import pytest
import torch

from dllm_rl import AIS, ELBO, Coupled, Int4WeightOnly, OneStep, Trajectory
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.testing.enumeration import contributions as scored
from dllm_rl.types.rollouts import Rollout, SamplingParams
from recipes.studies.quantized import estimates
from recipes.studies.quantized.estimates import (
    DRAWS,
    LONGEST,
    Moments,
    Rollouts,
    Views,
    among_all,
    completed,
    contributions,
    counted,
    counts_of,
    differentiated,
    filled,
    length_weights,
    logprobs_at,
    mixed,
    rollouts_of,
    segments,
    token_stats,
    views_of,
)
from recipes.studies.quantized.order_flips import canvases, coefficients, law

PUZZLE = "1234341020434300"  # blanks: cells 7, 9, 14 and 15
LIBRARY = {"elbo": ELBO(num_samples=4, antithetic=True), "coupled": Coupled(num_samples=2)}


@pytest.fixture(scope="module")
def puzzle():
    """A learner, its INT4 copy, a puzzle, and the log-probs of both on all of its canvases."""
    policy = tiny_masked_lm(characters="1234", seed=3, hidden_size=32, num_layers=1, intermediate_size=64, head_std=0.5)
    policy.module.eval()
    copied = quantized_copy(policy, Int4WeightOnly())
    at = canvases(PUZZLE, policy)
    states = at.masked.any(-1).nonzero()[:, 0]
    ours, theirs = (among_all(logprobs_at(each, at, states), at, states) for each in (policy, copied))
    return policy, copied, at, ours, theirs


def of_library(rollouts, at, tokens):
    """The rollouts as the library has them: the puzzle's cells, of which the blanks are written."""
    rows = len(rollouts.digits)
    tokens = tokens.repeat(rows, 1)
    tokens[:, at.cells] = at.choices[rollouts.digits]
    written = torch.zeros_like(tokens, dtype=torch.bool)
    written[:, at.cells] = True
    step = torch.full(tokens.shape, -1)
    step[:, at.cells] = rollouts.step
    zeros, group = torch.zeros(tokens.shape), torch.arange(rows)
    params = SamplingParams(suppress=(0, 1, 2))
    return Rollout(tokens, torch.ones_like(written), written, step, zeros, group, sampling_params=params)


@pytest.mark.parametrize("name", DRAWS)
def test_the_draws_are_the_librarys(name):
    """Of 40,000 rows the masks and coefficients of all views, as often as they are enumerated."""
    rows = 40_000
    zeros, everywhere = torch.zeros(rows, 4), torch.ones(rows, 4, dtype=torch.bool)
    step = torch.arange(4).expand(rows, 4)
    rollout = Rollout(step, everywhere, everywhere, step, zeros, torch.arange(rows))
    views = LIBRARY[name].draw_views(rollout, torch.Generator().manual_seed(0))

    def key(masked, weights):
        """What is scored: views that mask nothing, and the order of views, make no difference."""
        each = zip(masked.tolist(), weights.mul(1000).round().tolist(), strict=True)
        return tuple(sorted((tuple(m), tuple(w)) for m, w in each if any(w)))

    seen = Counter(key(views.masked[:, row], views.coefficients[:, row]) for row in range(rows))
    chances = Counter()
    for chance, draw in DRAWS[name](4):
        masks = torch.stack([mask for mask, _ in draw])
        chances[key(masks, torch.stack([mask * weight for mask, weight in draw]))] += chance
    assert sum(chances.values()) == pytest.approx(1)
    assert seen.keys() <= chances.keys()
    for draw, chance in chances.items():
        assert seen[draw] / rows == pytest.approx(chance, abs=5 * (chance / rows) ** 0.5), draw


@pytest.mark.parametrize("order", ["random", "left_to_right", "max_prob"])
@pytest.mark.parametrize(
    ("estimator", "library"),
    [
        ("exact", Trajectory()),
        ("segments 3", Trajectory(num_segments=3)),
        ("segments 2", Trajectory(num_segments=2)),
        ("segments 1", Trajectory(num_segments=1)),
        ("segments 1", OneStep(prompt_mask=0.0)),
    ],
)
def test_scores_and_gradient_are_the_librarys(puzzle, order, estimator, library):
    policy, copied, at, ours, theirs = puzzle
    found = rollouts_of(order, theirs, at, copied)
    assert float(found.chance.sum()) == pytest.approx(1)
    rollout = of_library(found, at, at.tokens[-1])
    views = library.draw_views(rollout, torch.Generator().manual_seed(0))
    p = scored(policy, rollout, views, library)
    with torch.no_grad():
        q = scored(copied, rollout, views, library)
    weights = (p - q).exp().clamp(max=2.0).detach()
    surrogate = (found.chance[:, None] * found.advantages[:, None] * weights * p).sum()
    wanted = torch.autograd.grad(surrogate, list(policy.module.parameters()), allow_unused=True)
    (mine,) = views_of(estimator, found)
    for policy_s, table in ((p, ours), (q, theirs)):
        torch.testing.assert_close(
            contributions(table, found.digits, mine).float(), policy_s[:, at.cells].detach().float(), rtol=0, atol=1e-4
        )
    counts = counts_of(estimator, found, ours, theirs, Moments.empty())["tis"]
    states = at.masked.any(-1).nonzero()[:, 0]
    gradient = differentiated(logprobs_at(policy, at, states), counts[states], policy)
    flat = torch.cat(
        [
            (torch.zeros_like(w) if g is None else g).flatten()
            for g, w in zip(wanted, policy.module.parameters(), strict=True)
        ]
    )
    assert float((gradient - flat).norm() / flat.norm()) < 1e-3


@pytest.mark.parametrize("order", ["random", "left_to_right", "max_prob"])
def test_the_exact_gradient_is_that_of_orders(puzzle, order):
    """The other enumeration, of states instead of rollouts, counts every event alike."""
    policy, _, at, ours, _ = puzzle
    found = rollouts_of(order, ours, at, policy)
    counts = counts_of("exact", found, ours, ours, Moments.empty())["none"]
    with torch.no_grad():
        chances = law(policy, at, order).chances(at)
    baseline = float(found.chance @ found.reward)
    torch.testing.assert_close(counts, coefficients(chances, torch.ones_like(chances), at, baseline), rtol=0, atol=1e-6)


def test_lambda_and_shuffled_weights_are_those_of_a_batch(puzzle):
    """A batch that has each of some equally likely rollouts once is a batch without end."""
    _, copied, at, ours, theirs = puzzle
    every = rollouts_of("random", theirs, at, copied)
    some = slice(0, 2000)
    alike = torch.full((2000,), 1 / 2000, dtype=torch.float64)
    found = Rollouts(every.digits[some], every.step[some], alike, every.reward[some])
    moments = Moments.empty()
    counts = counts_of("segments 2", found, ours, theirs, moments)
    (views,) = views_of("segments 2", found)
    stats = token_stats(*(contributions(each, found.digits, views) for each in (ours, theirs)), found)
    weights, _, metrics = AIS().weights(stats)
    assert moments.lam == pytest.approx(metrics["ais/lambda"], abs=1e-6)
    means = mixed({name: each.flatten() for name, each in completed(counts, moments).items()}, moments)
    wanted = counted(weights, found, views, ours.shape).flatten()
    torch.testing.assert_close(means["ais"], wanted, rtol=0, atol=1e-9)
    tis = stats.log_mismatch.exp().clamp(max=2)
    torch.testing.assert_close(means["shuffled"], float(tis.mean()) * means["none"], rtol=0, atol=1e-9)
    by_view = torch.zeros_like(tis)
    for scored_here in views.coefficients:
        by_view += scored_here * tis / tis[scored_here > 0].mean()
    torch.testing.assert_close(means["mean 1"], counted(by_view, found, views, ours.shape).flatten(), rtol=0, atol=1e-9)


def test_weights_of_lengths_by_hand():
    ours, theirs = torch.tensor([[0.3, 0.5]]), torch.tensor([[0.1, -0.7]])  # log-ratios 0.2 and 1.2
    found = length_weights(ours, theirs, torch.tensor([[1, 0]]))  # the second token is written first
    for name, logs in {"token": (0.2, 1.2), "prefix": (1.4, 1.2), "sequence": (1.4, 1.4)}.items():
        torch.testing.assert_close(found[name], torch.tensor([logs]).exp())
        torch.testing.assert_close(found[f"{name}, cap 2"], torch.tensor([logs]).exp().clamp(max=2))


def test_sequence_weights_leave_nothing_at_any_length(puzzle):
    """Their mean gradient is the learner's own, as importance sampling says."""
    policy, copied, at, ours, theirs = puzzle
    for order in LONGEST:
        own, found = (rollouts_of(order, *each) for each in ((ours, at, policy), (theirs, at, copied)))
        truth = counts_of("exact", own, ours, ours, Moments.empty())["none"]
        views = segments(found.step, 4)
        p, q = (contributions(each, found.digits, views) for each in (ours, theirs))
        weights = length_weights(p, q, found.step)["sequence"]
        baseline = own.chance @ own.reward
        kept = Rollouts(found.digits, found.step, found.chance, found.reward)
        each = (kept.chance * (kept.reward - baseline))[:, None] * weights * views.coefficients
        counts = torch.zeros(ours.numel(), dtype=torch.float64)
        counts.index_add_(0, estimates.events_of(found.digits, views.masked).flatten(), each.flatten())
        torch.testing.assert_close(counts.view(ours.shape), truth, rtol=0, atol=1e-6)


def test_puzzles_are_filled_from_the_right():
    assert filled("0120", "3124", 1) == "0124"
    assert filled("0120", "3124", 2) == "0120"
    assert isinstance(segments(torch.tensor([[0, 1, 2, 3]]), 2), Views)
