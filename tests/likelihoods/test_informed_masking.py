"""Informed masking: what the sampler records, by hand, and the masks drawn from it, by enumeration."""

import math
from itertools import permutations

import pytest
import torch
from likelihood_toys import TablePolicy

from dllm_rl import ELBO, EUBO, Coupled, Prompts, Unmask, grpo_recipe, tiny_masked_lm
from dllm_rl.samplers import rules

CHANGE, D, DRAWS = [0.5, -0.25, 0.0, 0.125], 1.5, 4000


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sampled(policy, **options):
    options = {"temperature": 1.0, "rank": rules.MaxProb(), "suppress": (2, 3, 4), "confidence_radius": 1, **options}
    prompts = Prompts.from_ids([[3]], pad_id=policy.pad_id, num_generations=8, seeds=range(8))
    return Unmask(max_new_tokens=5, **options)(policy, prompts, torch.Generator())


def recorded(rollout):
    return rollout.unmask_step, rollout.tokens, rollout.confidence_change


def confidences(policy, step, tokens, at):
    """Of the likeliest token at each position, the mask token among them, before the step `at`."""
    state = sum((2 if step[j] >= at else tokens[j]) * 3**j for j in range(5))
    return policy.table[state, :, :3].softmax(-1).amax(-1).tolist()


@pytest.mark.parametrize("rank", [rules.MaxProb(), rules.Confidence()])
@pytest.mark.parametrize("options", [{}, {"diffusion_steps": 3}, {"block_size": 3}, {"temperature": 0.0}])
@pytest.mark.parametrize("radius", [1, 10])
def test_the_recorded_change_is_that_of_the_neighbors(rank, options, radius):
    """From the rollout's steps and the table of logits alone; `confidence` has the change of tokens that were drawn, so
    that only its places with a neighbor are known."""
    policy = TablePolicy(length=5, words=2, seed=1)
    rollout = sampled(policy, rank=rank, confidence_radius=radius, **options)
    size = options.get("block_size", 5)
    for step, tokens, changes in zip(*(x[:, 1:].tolist() for x in recorded(rollout)), strict=True):
        for i in range(5):
            near = [j for j in range(5) if abs(i - j) <= radius and step[j] > step[i] and j // size == i // size]
            if rank == rules.MaxProb():
                before, after = (confidences(policy, step, tokens, step[i] + more) for more in (0, 1))
                assert changes[i] == pytest.approx(sum(after[j] - before[j] for j in near), abs=1e-5)
            assert bool(changes[i]) == bool(near)
    plain = sampled(policy, rank=rank, confidence_radius=None, **options)
    assert plain.confidence_change is None and torch.equal(plain.tokens, rollout.tokens)


def test_masks_are_drawn_without_replacement():
    """Draws of k of four positions, against the chances of every set by enumeration; chi-squared at 1 - 1e-5."""
    policy = TablePolicy(length=4, words=2, seed=0)
    change = torch.tensor([0.0, *CHANGE]).expand(DRAWS, -1)
    rollout = policy.rollout(torch.zeros(DRAWS, 4, dtype=torch.long), confidence_change=change)
    q = [math.exp(D * (max(CHANGE) - m) / (max(CHANGE) - min(CHANGE))) for m in CHANGE]
    chance = {}
    for order in permutations(range(4)):
        p, left = 1.0, sum(q)
        for i in order:
            p, left = p * q[i] / left, left - q[i]
        for k in range(1, 5):
            key = (k, frozenset(order[:k]))
            chance[key] = chance.get(key, 0) + p
    for views, weighted in (
        (ELBO(num_samples=1, informed_masking=D).draw_views(rollout, seeded(0)), lambda k: 4 / k),
        (Coupled(informed_masking=D).draw_views(rollout, seeded(1)), lambda k: 5 / (2 * k)),
    ):
        seen, rows = {}, {}
        drawn = views.masked[0, :, 1:]
        weights = torch.where(drawn, weighted(drawn.sum(-1, keepdim=True)), 0.0)
        torch.testing.assert_close(views.coefficients[0, :, 1:], weights)
        for masked in drawn.tolist():
            places = [i for i in range(4) if masked[i]]
            key = (len(places), frozenset(places))
            seen[key], rows[len(places)] = seen.get(key, 0) + 1, rows.get(len(places), 0) + 1
        statistic = sum(
            (seen.get(key, 0) - rows[key[0]] * p) ** 2 / (rows[key[0]] * p) for key, p in chance.items() if key[0] < 4
        )
        assert statistic < 39.0  # 3 + 5 + 3 degrees of freedom
    pair = Coupled(informed_masking=D).draw_views(rollout, seeded(1))
    assert (pair.masked.sum(0) == rollout.completion_mask).all()


@pytest.mark.parametrize("estimator", [ELBO, Coupled])
def test_without_differences_the_masks_are_the_plain_ones(estimator):
    """Equal changes, and a d near 0, give every mask the same chance, and the very masks of the plain estimate."""
    rollout = TablePolicy(length=4, words=2, seed=0).rollout(torch.zeros(64, 4, dtype=torch.long))
    changes = torch.randn(64, 5, generator=seeded(2))
    plain = estimator(num_samples=4).draw_views(rollout, seeded(0))
    for d, change in ((1e-12, changes), (D, torch.ones(64, 5))):
        same = estimator(num_samples=4, informed_masking=d).draw_views(rollout_with(rollout, change), seeded(0))
        assert torch.equal(same.masked, plain.masked) and torch.equal(same.coefficients, plain.coefficients)
    other = estimator(num_samples=4, informed_masking=D).draw_views(rollout_with(rollout, changes), seeded(0))
    assert not torch.equal(other.masked, plain.masked)


def rollout_with(rollout, change):
    return type(rollout)(**vars(rollout) | {"confidence_change": change})


def test_what_is_refused_in_one_line():
    policy = TablePolicy(length=5, words=2, seed=1)
    rollout = sampled(policy, confidence_radius=None)
    assert EUBO(base=Coupled(informed_masking=D)).reads_confidence_change
    for options in (
        {"rank": rules.Margin()},
        {"commit": rules.Origin(), "rank": rules.RandomOrder()},
        {"compile_step": True},
    ):
        with pytest.raises(ValueError, match="confidence_radius"):
            sampled(policy, **options)
    with pytest.raises(ValueError, match=r"^confidence_radius=0 "):
        sampled(policy, confidence_radius=0)
    with pytest.raises(ValueError, match="confidence_change: sample with"):
        ELBO(informed_masking=D).draw_views(rollout, seeded(0))
    with pytest.raises(ValueError, match=r"^informed_masking=-1 "):
        ELBO(informed_masking=-1)
    rows = [{"prompt": "1+1="}] * 8
    settings = {"max_new_tokens": 4, "likelihood": ELBO(informed_masking=D)}
    with pytest.raises(ValueError, match="informed_masking"):
        grpo_recipe(tiny_masked_lm(characters="1+="), rows, reward, **settings)
    options = {"sampler_options": {"confidence_radius": 10}}
    recipe = grpo_recipe(tiny_masked_lm(characters="1+="), rows, reward, **settings, **options)
    assert recipe.sampler.confidence_radius == 10


def reward(completions, **rest):
    return [0.0] * len(completions)
