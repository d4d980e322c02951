"""Rows of like lengths go through the model together, without the padding that they share; nothing else changes. Packed
scoring gives the likelihood and the gradient of the steps one by one, in fewer forwards."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from repetitions import slow
from tiny_recipe import Wrapped, tiny_recipe

from dllm_rl.decoding.prompts import encode
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.estimators import ELBO, Causal, Coupled, OneStep, recorded
from dllm_rl.likelihoods.packed import Packed, packed_mask
from dllm_rl.likelihoods.views import differs_in_group, each_view, row_chunks
from dllm_rl.models.base import encode_block_causal
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.rng import generator_for
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.rules import Confidence, LateSchedule, MaxProb, PlackettLuce, SoftThreshold
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.score import score
from dllm_rl.step.update import forward_backward
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.testing import check_estimator
from dllm_rl.training.make_step import make_step
from dllm_rl.types.retained_graphs import RetainedGraphs
from dllm_rl.types.rollouts import Prompts, Rollout
from dllm_rl.types.scoring import Batch, Views

SMALL = {
    "characters": "abcdefgh",
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SMALL |= {"head_std": 0.2}
LENGTHS = (3, 40, 5, 38, 12)  # with 6 new tokens: 46 and 44 together, and 18, 11 and 9


def ragged(kind: str = "llada"):
    policy = tiny_masked_lm(**SMALL) if kind == "roberta" else tiny_llama(**SMALL, causal=kind == "causal")
    ids = [[3 + i % 7 for i in range(n)] for n in LENGTHS]
    prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, num_generations=2)
    if kind == "causal":
        return policy, Autoregress(max_new_tokens=6)(policy, prompts, generator_for(0))
    return policy, Unmask(max_new_tokens=6, diffusion_steps=3, temperature=1.0)(policy, prompts, generator_for(0))


def test_chunks_by_hand():
    """Of two rows each; the rule of `length_buckets`, which a test of its own works out."""
    _, rollout = ragged()
    noise = ELBO().draw_views(rollout, generator_for(1))

    def chunks(noise, size):
        return [(chunk.rows.tolist(), chunk.columns.start) for chunk in row_chunks(rollout, noise, size)]

    assert chunks(noise, None) == [([2, 3, 6, 7], 0), ([0, 1, 4, 5, 8, 9], 28)]
    assert chunks(noise, 5) == [([2, 3, 6, 7], 0), ([0, 1, 4, 5], 28), ([8, 9], 28)]
    assert chunks(noise, 2) == [([2, 3], 0), ([6, 7], 0), ([0, 1], 28), ([4, 5], 28), ([8, 9], 28)]
    one = noise.restrict_to_rows(torch.arange(10) == 4)
    assert chunks(one, None) == [([4, 5], 28)], "the width is that of the whole rollout's bucket"

    shared = OneStep().draw_views(rollout, generator_for(1))  # five groups that the model reads as one row each
    assert chunks(shared, 3) == [([2, 3, 6, 7], 0), ([0, 1, 4, 5, 8, 9], 28)]
    assert chunks(shared, 2) == [([2, 3, 6, 7], 0), ([0, 1, 4, 5], 28), ([8, 9], 28)]
    assert chunks(shared, 1) == [([2, 3], 0), ([6, 7], 0), ([0, 1], 28), ([4, 5], 28), ([8, 9], 28)]
    assert chunks(shared.restrict_to_rows(torch.arange(10) == 8), 1) == [([8, 9], 28)]
    masked, scored = shared.masked.clone(), shared.coefficients != 0
    masked[0, 9] = rollout.attention_mask[9]  # a row of the third group has another prompt mask
    apart = chunks(replace(shared, masked=masked), 2)
    assert apart == [([2, 3, 6, 7], 0), ([0, 1], 28), ([4, 5], 28), ([8, 9], 28)], "no group of this bucket is shared"
    shown = replace(shared, masked=shared.masked & ~scored)  # the completions, which differ
    assert chunks(shown, 2) == chunks(noise, 2)
    assert chunks(replace(shared, features=(Packed(),)), 2) == chunks(noise, 2), "its forward shares no rows"


@pytest.mark.repeated
@pytest.mark.parametrize("kind", ["llada", "roberta", "causal"])
def test_scores_are_those_of_the_padded_batch_and_of_each_row_alone(kind, monkeypatch):
    """A causal row that ends early has padding behind it, too."""
    policy, rollout = ragged(kind)
    estimator = Causal() if kind == "causal" else ELBO()
    noise = estimator.draw_views(rollout, generator_for(1))
    padded = torch.stack([view.logprobs(policy, rollout) for view in each_view(noise)])
    tokens, hidden = [], policy.hidden
    monkeypatch.setattr(policy, "hidden", lambda x, mask: (tokens.append(x.numel()), hidden(x, mask))[1])
    ours = estimator.view_logprobs(policy, rollout, noise)
    assert sum(tokens) == len(noise.coefficients) * (4 * 46 + 6 * 18)
    torch.testing.assert_close(ours, padded, rtol=1e-5, atol=2e-6)
    assert (padded != 0).any()
    monkeypatch.undo()
    single = replace(rollout, group=torch.arange(len(rollout.tokens)))
    rows = torch.arange(0, 10, 2)  # of every length
    alone = [estimator.view_logprobs(policy, single.rows(row), noise.rows(row)) for row in rows.split(1)]
    torch.testing.assert_close(ours[:, rows], torch.cat(alone, dim=1), rtol=1e-5, atol=2e-6)


def test_the_gradient_is_that_of_the_padded_batch():
    policy, rollout = ragged()
    estimator = Coupled()
    noise = estimator.draw_views(rollout, generator_for(1))
    scores, mask = estimator.view_logprobs(policy, rollout, noise), rollout.completion_mask
    vector = torch.randn(mask.shape, generator=generator_for(2)) * mask
    old = estimator.combine(scores, noise)
    batch = Batch(rollout, noise, torch.ones(10), old, scores, mask.float(), mask, None, 1, 1)
    found = []
    for update in ("padded", "buckets", "kept"):
        policy.module.zero_grad()
        if update == "padded":
            for view, weight in zip(each_view(noise), noise.coefficients, strict=True):
                view.backward(policy, rollout, vector * weight)
        else:
            made = replace(batch, graphs=RetainedGraphs(mask.any(-1), 99 if update == "kept" else 0))
            given = estimator.view_logprobs(policy, rollout, noise, graphs=made.graphs)
            forward_backward(policy, made, given, loss=lambda logps, batch: (0, {}, vector), likelihood=estimator)
        found.append(torch.cat([p.grad.flatten() for p in policy.module.parameters()]))
    for ours in found[1:]:
        assert (ours - found[0]).norm() < 1e-5 * found[0].norm()


class Ragged(Wrapped):
    """Every other prompt is nearly twice as long."""

    def reward(self, problem, completion):
        return self.task.reward(problem, completion)

    def __getitem__(self, index):
        problem = self.task[index]
        return replace(problem, prompt=problem.prompt + "=" * (28 * (index % 2) + index % 3))


@pytest.mark.parametrize("zero_mismatch", [False, True])
def test_what_is_scored_is_what_was_sampled(tmp_path, zero_mismatch):
    """The sampler's buckets are the learner's, also where some groups are not scored. Bit for bit with zero_mismatch,
    to rounding without it."""
    task = Ragged(Sudoku(split="train", size=8))
    recipe = tiny_recipe(tmp_path, zero_mismatch=zero_mismatch, rollout_quantization=None, task=task)
    policy = recipe.model()
    run = make_step(recipe, accelerator=Accelerator(cpu=True), policy=policy, rollout_policy=policy)
    with run.arithmetic():
        problems = [recipe.task[i] for i in range(8)]
        rollout = recipe.sampler(policy, encode(policy, problems, num_generations=2), generator_for(0))
        noise = recipe.likelihood.draw_views(rollout, generator_for(1)).restrict_to_rows(torch.arange(16) != 3)
        assert len(list(row_chunks(rollout, noise, None))) == 2
        logps = score(run, rollout, noise)
    there = torch.arange(16)[:, None] != 3
    bound = 0 if zero_mismatch else 1e-5
    torch.testing.assert_close(logps.old_logprobs, recorded(rollout, noise) * there, rtol=0, atol=bound)
    assert (logps.old_logprobs != 0).any()


SIZE = 4


def block_causal_policy(*, causal_context: bool = False, shift: bool = False):
    shape = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "head_std": 0.3}
    policy = tiny_llama(characters="abcdefgh", causal=False, **shape)
    toy = {"name": "toy", "attention": "block_causal", "block_size": SIZE, "causal_context": causal_context}
    toy |= {"shift": shift}
    spec = replace(policy.spec, **toy)
    policy.spec = replace(spec, encode=partial(encode_block_causal, spec=spec))
    return policy


BLOCK_IDS = [[3, 4, 5, 6, 7], [8, 9], [4, 4, 4, 5, 5, 5, 6, 6]]


def block_sampled(policy, *, ids=BLOCK_IDS, diffusion_steps: int = 9, rank=MaxProb(), **others):
    """Prompts of 5, 2 and 8 tokens: the completion starts inside a block, inside another, and at a boundary."""
    prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, num_generations=2)
    options = {
        "max_new_tokens": 12,
        "diffusion_steps": diffusion_steps,
        "block_size": SIZE,
        "temperature": 1.0,
        "rank": rank,
    }
    return Unmask(**options | others)(policy, prompts, torch.Generator().manual_seed(1))


def test_packed_mask_by_hand():
    """A row of one padding column and blocks (a b) (c d) of two; noisy columns from c on."""
    block = torch.tensor([[0, 0, 0, 1, 1]])
    mask = packed_mask(torch.tensor([[False, True, True, True, True]]), block, 3, (block, block), (block, block))[0, 0]
    assert mask.int().tolist() == [
        # -  a  b  c  d  c' d'
        [0, 1, 1, 0, 0, 0, 0],  # padding
        [0, 1, 1, 0, 0, 0, 0],  # a
        [0, 1, 1, 0, 0, 0, 0],  # b
        [0, 1, 1, 1, 1, 0, 0],  # c
        [0, 1, 1, 1, 1, 0, 0],  # d
        [0, 1, 1, 0, 0, 1, 1],  # noisy c
        [0, 1, 1, 0, 0, 1, 1],  # noisy d
    ]


@pytest.mark.parametrize(
    ("diffusion_steps", "causal_context", "shift"),
    [(4, False, False), (9, True, False), (9, False, True), slow(12, False, False), slow(9, True, True)],
)
def test_packed_trajectory_is_the_trajectory(diffusion_steps, causal_context, shift):
    policy = block_causal_policy(causal_context=causal_context, shift=shift)
    rollout = block_sampled(policy, diffusion_steps=diffusion_steps)
    one_by_one, packed = lik.Trajectory(), lik.Trajectory(block_size=SIZE)
    plain, together = (e.draw_views(rollout, torch.Generator()) for e in (one_by_one, packed))
    logps = packed.logprobs(policy, rollout, together)
    torch.testing.assert_close(logps, one_by_one.logprobs(policy, rollout, plain), atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(logps, rollout.logprobs, atol=3e-6, rtol=1e-5)
    assert len(together.masked) <= SIZE < len(plain.masked) or diffusion_steps == 4
    assert torch.equal(together.coefficients.sum(0), rollout.completion_mask.float())  # every token once


@pytest.mark.parametrize("shift", [False, True])
def test_packed_gradient_is_that_of_the_steps_one_by_one(shift):
    policy = block_causal_policy(shift=shift)
    rollout = block_sampled(policy)
    vector = torch.randn(rollout.tokens.shape, generator=torch.Generator().manual_seed(2)) * rollout.completion_mask
    parameters, gradients = list(policy.module.parameters()), []
    for estimator in (lik.Trajectory(), lik.Trajectory(block_size=SIZE)):
        noise = estimator.draw_views(rollout, torch.Generator())
        logps = sum(view.logprobs(policy, rollout) for view in each_view(noise))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad((logps * vector).sum(), parameters)]))
    assert gradients[0].norm() > 0.1
    assert ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item() < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"rank": PlackettLuce(temperature=0.3)},
        {"rank": MaxProb(), "commit": SoftThreshold(tau=0.3, temperature=1.0)},
    ],
    ids=["plackett_luce", "soft_threshold"],
)
@pytest.mark.usefixtures("exact_arithmetic")
@pytest.mark.repeated(first_only=True)
def test_packed_scoring_of_noisy_orders(options):
    """Several blocks of a row in one view, each with its own draws: log-probs and gradient of the steps one by one."""
    policy = block_causal_policy()
    rollout = block_sampled(policy, max_new_tokens=8, diffusion_steps=6, **options)
    parameters, found = list(policy.module.parameters()), []
    vector = torch.randn(rollout.tokens.shape, generator=torch.Generator().manual_seed(2)) * rollout.completion_mask
    for estimator in (lik.Trajectory(), lik.Trajectory(block_size=SIZE)):
        noise = estimator.draw_views(rollout, torch.Generator())
        logps = estimator.combine(estimator.view_logprobs(policy, rollout, noise, retain_graphs=True), noise)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad((logps * vector).sum(), parameters)])
        found.append((logps.detach(), gradient))
    (one_by_one, expected), (packed, gradient) = found
    assert torch.equal(one_by_one, recorded(rollout, lik.Trajectory().draw_views(rollout, torch.Generator())))
    torch.testing.assert_close(packed, one_by_one, atol=5e-6, rtol=1e-5)
    assert (rollout.order.logprobs < -0.5).any() and expected.norm() > 0.1
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("full", Confidence()),
        ("block_causal", PlackettLuce(temperature=0.3)),
        pytest.param("full", PlackettLuce(temperature=0.3), marks=pytest.mark.slow),
        pytest.param("block_causal", Confidence(), marks=pytest.mark.slow),
    ],
)
@pytest.mark.repeated(first_only=True)
def test_an_order_with_more_steps_than_columns_is_scored(kind, rank):
    """`LateSchedule` waits for as long as a block has more steps than positions, here past the row's last column."""
    estimators = [lik.Trajectory()]
    policy = tiny_llama(**SMALL, causal=False)
    if kind == "block_causal":
        policy = block_causal_policy()
        estimators.append(lik.Trajectory(block_size=SIZE))
    few = {"ids": [[3, 4], [5]], "max_new_tokens": 8, "diffusion_steps": 24}
    rollout = block_sampled(policy, **few, rank=rank, commit=LateSchedule())
    assert rollout.order.block_first_step.max() > rollout.tokens.shape[1]
    for estimator in estimators:
        views = estimator.draw_views(rollout, torch.Generator())
        logps = estimator.logprobs(policy, rollout, views)
        torch.testing.assert_close(logps, recorded(rollout, views), atol=5e-6, rtol=1e-5)


def test_what_a_block_cannot_see_does_not_move_it():
    """Another token in a later block changes no earlier contribution; one in an earlier block changes later ones."""
    policy = block_causal_policy()
    rollout = block_sampled(policy)
    estimator = lik.Trajectory(block_size=SIZE)
    noise = estimator.draw_views(rollout, torch.Generator())
    base = estimator.logprobs(policy, rollout, noise)
    block = (rollout.attention_mask.long().cumsum(-1) - 1) // SIZE
    last = rollout.completion_mask & (block == block.amax(-1, keepdim=True))
    changed = replace(rollout, tokens=torch.where(last, 3 + (rollout.tokens - 2) % 8, rollout.tokens))
    assert torch.equal(estimator.logprobs(policy, changed, noise)[~last], base[~last])
    first = rollout.completion_mask & (block == torch.where(rollout.completion_mask, block, 99).amin(-1, keepdim=True))
    changed = replace(rollout, tokens=torch.where(first, 3 + (rollout.tokens - 2) % 8, rollout.tokens))
    assert (estimator.logprobs(policy, changed, noise)[last] - base[last]).abs().max() > 1e-3


def test_segments_of_each_block_merge_its_own_steps():
    policy = block_causal_policy()
    rollout = block_sampled(policy, diffusion_steps=12)
    noise = lik.Trajectory(num_segments=1, block_size=SIZE).draw_views(rollout, torch.Generator())
    assert torch.equal(noise.masked[0], rollout.completion_mask) and len(noise.masked) == 1
    halves = lik.Trajectory(num_segments=2, block_size=SIZE).draw_views(rollout, torch.Generator())
    assert len(halves.masked) == 2
    columns = zip(rollout.unmask_step, rollout.completion_mask, rollout.attention_mask, strict=True)
    for row, (steps, completion, real) in enumerate(columns):
        block = (real.long().cumsum(-1) - 1) // SIZE
        for b in set(block[completion].tolist()):
            inside = completion & (block == b)
            own = steps[inside] - steps[inside].min()
            expected = own * 2 // (own.max() + 1)
            assert halves.coefficients[1, row][inside].tolist() == expected.float().tolist()


@pytest.mark.parametrize("num_segments", [None, 2])
def test_contract_of_packed_scoring(num_segments):
    policy = block_causal_policy()
    check_estimator(lik.Trajectory(block_size=SIZE, num_segments=num_segments), policy, block_sampled(policy))


def test_packed_scoring_is_refused_where_it_would_be_wrong():
    policy = block_causal_policy()
    rollout = block_sampled(policy)
    wrong = lik.Trajectory(block_size=8)
    with pytest.raises(ValueError, match="block_size=8 is not the policy's block size, 4"):
        wrong.logprobs(policy, rollout, wrong.draw_views(rollout, torch.Generator()))
    with pytest.raises(ValueError, match=r"block_size=0 must be at least 1"):
        lik.Trajectory(block_size=0)
    policy.spec = replace(policy.spec, attention="full")
    right = lik.Trajectory(block_size=SIZE)
    with pytest.raises(ValueError, match=r"likelihood='Trajectory' is for block_causal attention"):
        right.logprobs(policy, rollout, right.draw_views(rollout, torch.Generator()))


def test_packed_padding_rows_stay_finite():
    policy = block_causal_policy()
    rollout = block_sampled(policy)
    wide = rollout.padded(5, pad_id=policy.pad_id)
    estimator = lik.Trajectory(block_size=SIZE)
    found = estimator.logprobs(policy, wide, estimator.draw_views(wide, torch.Generator()))
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 5:], rollout.logprobs, atol=3e-6, rtol=1e-5)


def test_rows_that_differ_at_a_position_are_one_only_in_the_views_that_hide_it():
    """Two rows of a group with another second token, which the first view hides, and the second view shows."""
    tokens = torch.tensor([[3, 4, 5], [3, 6, 5]])
    own = torch.tensor([[False, True, True]] * 2)
    rollout = Rollout(tokens, torch.ones_like(own), own, tokens, tokens.float(), torch.zeros(2, dtype=torch.long))
    masked = torch.tensor([[[False, True, False]] * 2, [[False, False, True]] * 2, [[False, True, True]] * 2])
    found = differs_in_group(rollout, Views(masked, masked.float()))
    assert found.tolist() == [[False, False], [False, True], [False, False]]
