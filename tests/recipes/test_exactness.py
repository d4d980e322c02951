"""The table of exact ratios: its enumeration against the sampler itself, finite differences and autograd."""

import runpy
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dllm_rl import ELBO, Confidence, Coupled, MaxProb, Prompts, Rank, Schedule, Threshold, Trajectory, Unmask
from dllm_rl.files import read_json
from dllm_rl.testing.enumeration import ToyPolicy, contributions, per_outcome
from dllm_rl.types.rollouts import Rollout
from recipes.examples.fork_grpo import Fork, ForkSteps
from recipes.examples.informed_masking import change_of_confidence, informed_masks
from recipes.examples.just_grpo_fast import LeastCertain
from recipes.examples.sglang_confidence import DrawnAndLikeliest
from recipes.studies.exactness import exactness
from recipes.studies.exactness.exactness import ROWS, Renoised, Table, law_of, outcomes, truth, unmask


def toy_of(length=3, sharpness=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ToyPolicy(length=length, words=3, sharpness=sharpness, generator=generator)


def by_outcome(table, sampler):
    """{(tokens, steps): probability} of the enumeration."""
    found = outcomes(table, sampler, law_of(sampler, table))
    keys = zip(found.rollout.tokens.tolist(), found.rollout.unmask_step.tolist(), strict=True)
    return dict(zip(((*map(tuple, key),) for key in keys), found.chances.tolist(), strict=True))


def test_a_step_of_forks_sampler_by_hand():
    """Two positions and a threshold of 0.8: a step writes the draws above it, and the leftmost one if there are none,
    although another is likelier."""
    scores = torch.tensor([[0.9, 0.6], [0.9, 0.4], [0.1, 0.6], [0.1, 0.9]]).log()
    masked, left = torch.ones(4, 2, dtype=torch.bool), torch.full((4,), 2)
    expected = [[True, False], [True, False], [True, False], [False, True]]
    assert Fork()(scores, masked, left).tolist() == expected


def test_sglangs_confidence_by_hand():
    """Words of 0.5, 0.3 and 0.2: the draws' confidences are 0.5, min(0.5, 0.6) and min(0.5, 0.4)."""
    logits = torch.tensor([[0.5, 0.3, 0.2]] * 3).log()
    found = DrawnAndLikeliest()(logits, torch.zeros(3), torch.arange(3)).exp()
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5, 0.4]))


def test_only_fallback_steps_and_the_least_certain_tokens_are_scored():
    table = Table(toy_of(4))
    sampler = unmask(rank=Confidence(), commit=Fork())
    rollout = outcomes(table, sampler, law_of(sampler, table)).rollout
    scored = ForkSteps().draw_views(rollout, torch.Generator()).coefficients.any(0)
    alone = (rollout.unmask_step[:, :, None] == rollout.unmask_step[:, None]).sum(-1) == 1
    assert (alone | ~scored).all() and scored.any() and not scored.all()
    assert ((rollout.logprobs.exp() <= 0.8) == scored).all()
    rows = LeastCertain(block_size=2).draw_views(rollout, torch.Generator()).coefficients.any(0)
    halves = rollout.logprobs.view(-1, 2, 2)
    torch.testing.assert_close(rollout.logprobs[rows].view(-1, 2), halves.amin(-1), rtol=0, atol=0)


def test_informed_masks_follow_the_change_of_confidence():
    """By hand: a token's score is the change of the largest probability at the positions that are masked before and
    after; the token with the least score is masked most often, in the proportion of a draw without replacement."""
    table = Table(toy_of(3))
    sampler = Unmask(max_new_tokens=3, temperature=1.0, block_size=1)
    rollout = outcomes(table, sampler, law_of(sampler, table)).rollout
    a, b, _ = rollout.tokens[5].tolist()
    tops = [table.table[table.index(torch.tensor([canvas]))].softmax(-1).amax(-1)[0] for canvas in
            ([3, 3, 3], [a, 3, 3], [a, b, 3])]  # fmt: skip
    expected = [(tops[1] - tops[0])[1:].abs().sum(), (tops[2] - tops[1])[2].abs(), torch.tensor(0.0).double()]
    score = change_of_confidence(table, rollout, 10)[5]
    torch.testing.assert_close(score, torch.stack(expected))
    single = rollout.rows(torch.full((2000,), 5))
    views = informed_masks(single, torch.Generator().manual_seed(0), policy=table, num_samples=1)
    masked = views.masked[0][views.masked[0].sum(-1) == 1].double()
    q = (1.5 * (score.max() - score) / (score.max() - score.min())).softmax(-1)
    torch.testing.assert_close(masked.mean(0), q, rtol=0, atol=5 * (0.25 / len(masked)) ** 0.5)


@pytest.mark.slow
def test_an_estimator_of_ones_own_has_its_row_beside_the_stored_ones(monkeypatch, capsys):
    words = ["exactness", "recipes.examples.own_estimator.Halves"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(exactness, "NETWORKS", exactness.NETWORKS[:1])
    monkeypatch.setattr(exactness, "DRAWS", 2)
    exactness.main()
    printed = capsys.readouterr().out
    assert printed.count(f"| {words[1]} | completion |") == 1 and printed.count(f"| {words[1]} |") == 3
    assert all(printed.count(f"| {name} |") == 3 for name in ROWS)
    assert set(exactness.IN_WORDS) == set(ROWS)
    monkeypatch.setattr(sys, "argv", ["exactness", "recipes.examples.own_estimator.Nothing"])
    with pytest.raises(SystemExit, match=r"Nothing.* is not found .*give MODULE\.NAME"):
        exactness.main()


@pytest.mark.slow
def test_a_rank_and_a_rule_of_ones_own_have_their_row(monkeypatch, capsys):
    monkeypatch.setattr(exactness, "NETWORKS", exactness.NETWORKS[:1])
    monkeypatch.setattr(exactness, "DRAWS", 2)
    rules = ["recipes.examples.own_order.LogOdds", "recipes.examples.own_order.Halves"]
    monkeypatch.setattr(sys, "argv", ["exactness", "--rank", rules[0], "--commit", rules[1]])
    exactness.main()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if rules[0] in line and "| steps |" in line]
    assert row.startswith(f"| Trajectory, {', '.join(rules)} | steps | 0.00 (0.00 to 0.00)"), (
        "its order is declared right"
    )
    name, measured = exactness.own_row(None, "max_prob", f"{__name__}.EvenFirst", None)
    assert name == f"Trajectory, {__name__}.EvenFirst" and measured.sampler.rank == EvenFirst()
    sharpness, seed = exactness.NETWORKS[0]
    assert exactness.measure(measured, sharpness, seed, 1)["largest"] < 1e-9
    _, drawn = exactness.own_row(None, "max_prob", "dllm_rl.RandomOrder", None)
    with pytest.raises(ValueError, match="rank=RandomOrder and commit=Schedule read uniforms, and only logits, norm"):
        exactness.measure(drawn, sharpness, seed, 1)


class EvenFirst(Rank):
    order = "deterministic"

    def __call__(self, logits, normalizer, positions):
        return logits.amax(-1) - normalizer + 1000 * (positions % 2 == 0)


SAMPLERS = {
    "confidence": {"rank": Confidence()},
    "two a step": {"rank": Confidence(), "commit": Schedule(), "diffusion_steps": 2},
    "fork": {"rank": Confidence(), "commit": Fork()},
    "threshold": {"rank": MaxProb(), "commit": Threshold(tau=0.8)},
    "sglang": {"rank": DrawnAndLikeliest(), "commit": Threshold(tau=0.8)},
    "left to right": {"block_size": 1},
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sampler_itself_is_as_frequent_as_the_enumeration_says(name):
    """4,000 rollouts of `Unmask` on the same network: a chi-squared test of completions with their steps."""
    table, rows = Table(toy_of(sharpness=2.0)), 4000
    expected = by_outcome(table, Unmask(max_new_tokens=3, temperature=1.0, **SAMPLERS[name]))
    assert sum(expected.values()) == pytest.approx(1, abs=1e-12)
    prompts = Prompts.from_ids([[3, 3, 3]], pad_id=0, num_generations=rows, seeds=range(rows))
    prompts = replace(prompts, infill_mask=torch.ones(rows, 3, dtype=torch.bool))
    sampler = Unmask(max_new_tokens=0, temperature=1.0, **SAMPLERS[name])
    rollout = sampler(table, prompts, torch.Generator())
    counts = dict.fromkeys(expected, 0)
    for tokens, steps in zip(rollout.tokens.tolist(), rollout.unmask_step.tolist(), strict=True):
        counts[tuple(tokens), tuple(steps)] += 1
    frequent = [key for key, p in expected.items() if p * rows >= 5]
    rest = rows - sum(counts[key] for key in frequent), rows * (1 - sum(expected[key] for key in frequent))
    pairs = [(counts[key], rows * expected[key]) for key in frequent] + [rest]
    statistic, degrees = sum((a - b) ** 2 / max(b, 5) for a, b in pairs), len(pairs) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["confidence", "fork", "sglang", "renoised"])
def test_the_true_gradient_is_the_slope_of_the_expected_reward(name):
    """By finite differences along a random direction, through networks of their own."""
    toy, generator = toy_of(), torch.Generator().manual_seed(1)
    sampler = Renoised() if name == "renoised" else Unmask(
        max_new_tokens=3, temperature=1.0, **SAMPLERS[name]
    )  # fmt: skip
    table = Table(toy)
    rewards = torch.randn(len(table.canvases), generator=generator, dtype=torch.float64)
    direction = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in toy.weights]

    def expected(size):
        moved = [w + size * d for w, d in zip(toy.weights, direction, strict=True)]
        other = Table(exactness.replace_weights(toy, moved))
        found = outcomes(other, sampler, law_of(sampler, other))
        return found.chances @ rewards[found.path[:, -1]]

    slope = (expected(1e-6) - expected(-1e-6)) / 2e-6
    found = truth(table, sampler, law_of(sampler, table), rewards) @ torch.cat([d.flatten() for d in direction])
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-8)


@pytest.mark.nightly
@pytest.mark.parametrize("estimator", [Trajectory(), Trajectory(num_segments=2), Coupled(), ELBO(num_samples=2)])
def test_the_gradient_of_each_row_is_autograds(estimator):
    """Through the table and its Jacobian, and through the network itself."""
    toy = toy_of()
    table, sampler = Table(toy), Unmask(max_new_tokens=3, temperature=1.0, rank=Confidence())
    found = outcomes(table, sampler, law_of(sampler, table))
    few = replace(found, rollout=found.rollout.rows(torch.arange(20)), path=found.path[:20])
    drawn = exactness.with_estimator(estimator, few, torch.ones(20).double(), 0)
    _, each = exactness.gradients(table, drawn, torch.ones(20, 3, dtype=torch.float64))
    for weight in toy.weights:
        weight.requires_grad_()
    views = estimator.draw_views(few.rollout, torch.Generator().manual_seed(0))
    direct = per_outcome(toy, contributions(toy, few.rollout, views, estimator)).sum(1)
    torch.testing.assert_close(each.to_dense() @ table.jacobian, direct, rtol=0, atol=1e-9)


@pytest.mark.nightly
def test_the_order_of_confident_draws_is_scored_by_hand():
    """LLaDA's sampler, a position a step: the chance of a trajectory from draws at all masked positions, in loops."""
    table = Table(toy_of())
    for (tokens, steps), p in by_outcome(table, Unmask(max_new_tokens=3, temperature=1.0, rank=Confidence())).items():
        chance, canvas = 1.0, [3, 3, 3]
        for now in sorted(range(3), key=lambda i: steps[i]):
            logits = table.table[table.index(torch.tensor([canvas]))][0, :, :3].softmax(-1)
            chance *= float(logits[now, tokens[now]])
            for j in set(range(3)) - {now}:
                if canvas[j] == 3:
                    below = [v for v in logits[j].tolist() if (v, -j) < (float(logits[now, tokens[now]]), -now)]
                    chance *= sum(below)
            canvas[now] = tokens[now]
        assert p == pytest.approx(chance, abs=1e-12)


@pytest.mark.nightly
@pytest.mark.parametrize("num_samples", [1, 2])
def test_the_enumerated_masks_of_coupled_are_the_librarys(num_samples):
    """Of 40,000 rows the masks and coefficients, as often as they are enumerated."""
    rows = 40_000
    tokens, everywhere = torch.arange(4).expand(rows, 4), torch.ones(rows, 4, dtype=torch.bool)
    rollout = Rollout(tokens, everywhere, everywhere, tokens, torch.zeros(rows, 4), torch.arange(rows))

    def keys(views, row):
        each = zip(views.masked[:, row].tolist(), views.coefficients[:, row].mul(1000).round().tolist(), strict=True)
        return tuple(sorted((tuple(mask), tuple(weights)) for mask, weights in each if any(weights)))

    views = Coupled(num_samples=num_samples).draw_views(rollout, torch.Generator().manual_seed(0))
    seen = Counter(keys(views, row) for row in range(rows))
    chances = Counter()
    for chance, estimator in exactness.coupled_draws(num_samples):
        chances[keys(estimator.draw_views(rollout.rows(torch.tensor([0])), torch.Generator()), 0)] += chance
    assert sum(chances.values()) == pytest.approx(1) and seen.keys() <= chances.keys()
    for draw, chance in chances.items():
        assert seen[draw] / rows == pytest.approx(chance, abs=5 * (chance / rows) ** 0.5), draw


@pytest.mark.nightly
def test_every_stored_row_is_what_the_enumeration_gives():
    """Of the first network, with the same masks; and the rows that are exact are those that the page names."""
    stored = read_json(exactness.STORED)
    assert [*stored] == [*ROWS]
    for name, row in ROWS.items():
        first = stored[name][0]
        again = exactness.measure(row, first["sharpness"], first["seed"])
        for key, value in again.items():
            right = value == first[key] if key == "of" else value == pytest.approx(first[key], rel=1e-4, abs=1e-6)
            assert right, (name, key, value)
    exact = {name for name, found in stored.items() if all(each["largest"] < 1e-9 for each in found)}
    assert exact == {
        "JustGRPO", "JustGRPO-Fast (NeMo-RL)", "MaxProb, tokens", "LLaDA, tokens and order",
        "threshold on the likeliest", "DiffusionGemma, accepted draws",
    }  # fmt: skip


@pytest.mark.nightly
def test_estimators_of_the_examples_keep_their_contract():
    for module in ("fork_grpo", "just_grpo_fast", "informed_masking", "sglang_confidence"):
        runpy.run_module(f"recipes.examples.{module}", run_name="__main__")
