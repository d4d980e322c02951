"""Estimators on small models with random weights: exact identities, padding, neighbors, groups, randomness."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from repetitions import few, slow

from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.views import View, row_chunks
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.rules import MaxProb
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.groups import equal_groups
from dllm_rl.types.rollouts import Prompts, Rollout
from dllm_rl.types.scoring import Views

SMALL = {
    "characters": "abcdefgh",
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SMALL |= {"head_std": 0.2}  # varied, and not so peaked that a group's completions come out alike
DIFFUSION = {"roberta": tiny_masked_lm(**SMALL), "llada": tiny_llama(causal=False, **SMALL)}
CAUSAL = tiny_llama(causal=True, **SMALL)
RAGGED = [[3, 4, 5, 6, 7, 3], [8, 9], [4]]
ESTIMATORS = {
    "one_step": lik.OneStep(),
    "elbo": lik.ELBO(num_samples=4, antithetic=True),
    "coupled": lik.Coupled(num_samples=2),
    "trajectory": lik.Trajectory(),
    "trajectory, merged": lik.Trajectory(num_segments=2),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampled(policy, *, num_generations: int = 2, ids=RAGGED, **options) -> Rollout:
    prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, num_generations=num_generations)
    options = {"max_new_tokens": 8, "diffusion_steps": 4, "temperature": 1.0, "rank": MaxProb()} | options
    return Unmask(**options)(policy, prompts, seeded(7))


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize("family", few(DIFFUSION, ["llada"]))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"diffusion_steps": 8},
        {"diffusion_steps": 1},
        {"block_size": 4},
        {"block_size": 3, "diffusion_steps": 8},
        {"temperature": 0.7, "top_k": 4},
        {"top_p": 0.8, "suppress": (0, 2)},
        {"temperature": 0.0},
    ],
    ids=str,
)
def test_trajectory_over_every_step_is_the_samplers_own_record(family, options):
    policy = DIFFUSION[family]
    rollout = sampled(policy, num_generations=4, **options)
    estimator = lik.Trajectory()
    logps = estimator.logprobs(policy, rollout, estimator.draw_views(rollout, seeded()))
    torch.testing.assert_close(logps, rollout.logprobs, rtol=0, atol=1e-5)
    assert rollout.logprobs[rollout.completion_mask].max() < 0 or "top_k" in options or "top_p" in options


FILTERED = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "suppress": (0,)}


@pytest.mark.parametrize("sampling_params", [{}, FILTERED], ids=str)
def test_causal_is_transformers_cross_entropy(sampling_params):
    prompts = Prompts.from_ids(RAGGED, pad_id=CAUSAL.pad_id, num_generations=2)
    rollout = Autoregress(max_new_tokens=7, **sampling_params)(CAUSAL, prompts, seeded())
    estimator = lik.Causal()
    logps = estimator.logprobs(CAUSAL, rollout, estimator.draw_views(rollout, seeded()))
    torch.testing.assert_close(logps, rollout.logprobs, atol=2e-6, rtol=0)
    if sampling_params:
        return
    for row, real in enumerate(rollout.attention_mask):  # one row at a time, unpadded, by the stock class
        tokens = rollout.tokens[row][real][None]
        chosen = rollout.completion_mask[row][real]
        logits = CAUSAL.module(input_ids=tokens).logits[0, :-1]
        expected = -F.cross_entropy(logits, tokens[0, 1:], reduction="none")[chosen[1:]]
        torch.testing.assert_close(logps[row][rollout.completion_mask[row]], expected, atol=2e-6, rtol=0)
        labels = tokens.masked_fill(~chosen[None], -100)
        mean = CAUSAL.module(input_ids=tokens, labels=labels).loss
        assert logps[row].sum().item() == pytest.approx(-mean.item() * int(chosen.sum()), abs=1e-5)


def test_the_wrong_estimator_for_a_policy_is_refused_by_name():
    rollout = sampled(DIFFUSION["llada"])
    message = (
        r"likelihood='Causal' is for causal attention, but the policy's is 'full'; "
        r"use Trajectory\(num_segments=None, block_size=None\)"
    )
    with pytest.raises(ValueError, match=message):
        lik.Causal().logprobs(DIFFUSION["llada"], rollout, lik.Causal().draw_views(rollout, seeded()))
    with pytest.raises(ValueError, match=r"likelihood='ELBO' .* 'causal'; use Causal\(\)"):
        lik.ELBO().logprobs(CAUSAL, rollout, lik.ELBO().draw_views(rollout, seeded()))


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("family", few(DIFFUSION, ["llada"]))
@pytest.mark.parametrize("name", ESTIMATORS)
def test_padding_changes_neither_masks_nor_logprobs(family, name):
    policy, estimator = DIFFUSION[family], ESTIMATORS[name]
    rollout = sampled(policy)
    noise = estimator.draw_views(rollout, seeded(3))
    logps = estimator.logprobs(policy, rollout, noise)
    assert logps[rollout.completion_mask].abs().sum() > 1 and logps[~rollout.completion_mask].abs().max() == 0
    padded = rollout.padded(3, pad_id=policy.pad_id)
    again = estimator.draw_views(padded, seeded(3))
    assert torch.equal(again.masked[..., 3:], noise.masked) and torch.equal(
        again.coefficients[..., 3:], noise.coefficients
    )
    torch.testing.assert_close(estimator.logprobs(policy, padded, again)[:, 3:], logps, atol=3e-6, rtol=1e-5)


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_exact_for_the_sampler_where_it_says_so(name):
    policy, estimator = DIFFUSION["llada"], ESTIMATORS[name]
    rollout = sampled(policy, num_generations=4)
    logps = estimator.logprobs(policy, rollout, estimator.draw_views(rollout, seeded(3)))
    assert torch.allclose(logps, rollout.logprobs, atol=1e-5) == estimator.exact_for_sampler


def test_rows_of_a_group_that_attend_to_other_columns_are_scored_apart():
    policy, rollout = DIFFUSION["llada"], sampled(DIFFUSION["llada"], ids=[[3, 4, 5]])
    mask, alike = rollout.attention_mask.clone(), rollout.tokens[:1].repeat(2, 1)
    mask[1, 0] = False
    rollout, scored = replace(rollout, tokens=alike, attention_mask=mask), rollout.completion_mask
    view = View(scored, scored)
    together = view.logprobs(policy, rollout)
    torch.testing.assert_close(
        together, view.logprobs(policy, replace(rollout, group=torch.arange(len(rollout.tokens))))
    )
    assert not torch.allclose(together[0], together[1], atol=1e-4)


def test_chunks_are_whole_groups_of_which_a_view_scores_a_row():
    """Groups of 4; the first view scores row 1 alone, the second row 9: the middle group is left out."""
    weight = torch.zeros(2, 12, 3)
    weight[0, 1, 2] = weight[1, 9, 0] = 1.0
    whole = torch.ones(12, 3, dtype=torch.bool)
    rollout = Rollout(whole.long(), whole, whole, whole.long(), whole.float(), equal_groups(3, 4))
    noise = Views(weight != 0, weight)
    chunks = lambda size: [chunk.rows.tolist() for chunk in row_chunks(rollout, noise, size)]  # noqa: E731
    first, last = [0, 1, 2, 3], [8, 9, 10, 11]
    assert chunks(None) == chunks(8) == [first + last]
    assert chunks(4) == chunks(7) == [first, last]
    assert chunks(3) == [first[:3], first[3:], last[:3], last[3:]]  # only a group that is larger is split


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_rows_masks_depend_on_its_place_in_the_draw_only(name):
    """Row i's seed is the i-th draw: a batch's first rows have the masks of a smaller batch, whatever the
    others hold; with their seeds, two processes draw what one would."""
    policy, estimator = DIFFUSION["llada"], ESTIMATORS[name]
    rollout = sampled(policy)
    noise = estimator.draw_views(rollout, seeded(5))
    fewer = estimator.draw_views(rollout.rows(torch.arange(2)), seeded(5))
    assert torch.equal(fewer.masked, noise.masked[: len(fewer.masked), :2])
    assert torch.equal(fewer.coefficients, noise.coefficients[: len(fewer.masked), :2])
    if not name.startswith("trajectory"):
        other = estimator.draw_views(rollout, seeded(6))
        assert not torch.equal(other.masked, noise.masked)
        same_group = torch.equal(noise.masked[:, 0], noise.masked[:, 1])  # else a row has a seed of its own
        assert same_group == (name == "one_step") and not torch.equal(noise.masked[:, 0], noise.masked[:, -1])
    assert torch.equal(noise.rows(torch.tensor([4, 1])).masked, noise.masked[:, [4, 1]])


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.repeated(every=3)
def test_micro_batches_give_the_same_logprobs(name):
    policy, estimator = DIFFUSION["roberta"], ESTIMATORS[name]
    rollout = sampled(policy)
    noise = estimator.with_advantages(estimator.draw_views(rollout, seeded()), torch.tensor([1.0, -1, 2, -2, 0, -1]))
    whole = estimator.logprobs(policy, rollout, noise)
    for size in (1, 4):
        parts = estimator.logprobs(policy, rollout, noise, micro_batch_size=size)
        torch.testing.assert_close(parts, whole, atol=3e-6, rtol=1e-5)


def counting(policy, monkeypatch) -> list[int]:
    rows = []
    hidden = policy.hidden
    monkeypatch.setattr(policy, "hidden", lambda tokens, mask: (rows.append(len(tokens)), hidden(tokens, mask))[1])
    return rows


@pytest.mark.parametrize("num_generations", [slow(4), [5, 1, 6]])
def test_a_view_that_a_group_shares_is_forwarded_once_a_prompt(num_generations, monkeypatch):
    policy = DIFFUSION["roberta"]
    rollout = sampled(policy, num_generations=num_generations)
    rows = counting(policy, monkeypatch)
    for estimator, expected in ((lik.OneStep(prompt_mask=0.5), [3]), (lik.Trajectory(num_segments=2), [3, 12])):
        rows.clear()
        noise = estimator.draw_views(rollout, seeded())
        logps = estimator.logprobs(policy, rollout, noise)
        assert rows == expected
        apart = replace(rollout, group=torch.arange(12))
        torch.testing.assert_close(logps, estimator.logprobs(policy, apart, noise), rtol=0, atol=1e-5)
        rows.clear()
        parts = estimator.logprobs(policy, rollout, noise, micro_batch_size=2)
        assert max(rows) == 2 and (expected != [3] or rows == [2, 1])  # rows of a forward, not completions
        torch.testing.assert_close(parts, logps, rtol=0, atol=1e-5)


def test_rows_without_a_scored_position_are_left_out(monkeypatch):
    policy = DIFFUSION["roberta"]
    rollout = sampled(policy, num_generations=1, diffusion_steps=8)
    steps = torch.where(rollout.unmask_step < torch.tensor([[8], [3], [5]]), rollout.unmask_step, -1)
    ragged = replace(rollout, unmask_step=steps, completion_mask=steps >= 0)
    rows = counting(policy, monkeypatch)
    noise = lik.Trajectory().draw_views(ragged, seeded())
    lik.Trajectory().logprobs(policy, ragged, noise)
    assert rows == [3, 3, 3, 2, 2, 1, 1, 1]
    nothing = torch.zeros_like(rollout.completion_mask)
    assert torch.equal(View(nothing, nothing).logprobs(policy, rollout), torch.zeros(rollout.tokens.shape))
    assert len(rows) == 8


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_global_generators_are_untouched_and_draws_repeat(name):
    policy, estimator = DIFFUSION["roberta"], ESTIMATORS[name]
    rollout = sampled(policy)
    before = torch.get_rng_state()
    first, second = estimator.draw_views(rollout, seeded(2)), estimator.draw_views(rollout, seeded(2))
    estimator.logprobs(policy, rollout, first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.masked, second.masked) and torch.equal(first.coefficients, second.coefficients)


OTHERS = {
    "one_step, prompts whole": lik.OneStep(prompt_mask=0.0),
}


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("name", [*ESTIMATORS, *OTHERS])
def test_an_estimator_is_random_where_two_draws_differ(name):
    """Inner updates then take masks of their own. Ten draws are not all alike by chance."""
    estimator = (ESTIMATORS | OTHERS)[name]
    rollout = sampled(DIFFUSION["roberta"])
    first, *others = (estimator.draw_views(rollout, seeded(seed)).masked for seed in range(10))
    assert estimator.is_random == any(not torch.equal(first, other) for other in others)


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradient_through_combine_matches_finite_differences(name):
    estimator, rollout = ESTIMATORS[name], sampled(DIFFUSION["roberta"], num_generations=1)
    noise = estimator.with_advantages(estimator.draw_views(rollout, seeded()), torch.tensor([1.0, -1.0, -0.5]))
    scored = noise.coefficients != 0
    scores = -3 * torch.rand(scored.shape, generator=seeded(1)).double() * scored
    noise = replace(noise, coefficients=noise.coefficients.double())
    assert torch.autograd.gradcheck(partial(estimator.combine, views=noise), scores.requires_grad_(), atol=1e-6)


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_ratio_under_shared_masks_is_exactly_one_on_policy(name):
    """The same weights on both sides, scored twice: a log-ratio of exactly 0, and not with masks drawn anew."""
    policy, estimator = DIFFUSION["roberta"], ESTIMATORS[name]
    rollout = sampled(policy)
    noise = estimator.draw_views(rollout, seeded(0))
    once, twice = (estimator.logprobs(policy, rollout, noise) for _ in range(2))
    assert torch.equal(once, twice)
    if not name.startswith("trajectory"):
        assert not torch.equal(estimator.logprobs(policy, rollout, estimator.draw_views(rollout, seeded(1))), once)
