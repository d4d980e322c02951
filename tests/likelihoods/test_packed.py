"""Packed scoring of block-causal models: the likelihood and the gradient of the steps one by one, in fewer forwards."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.packed import packed_mask
from dllm_rl.likelihoods.scoring import score_view
from dllm_rl.models.base import encode_block_causal
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.samplers.rules import max_prob
from dllm_rl.samplers.unmask import unmask
from dllm_rl.testing import check_estimator
from dllm_rl.types import Prompts

SIZE = 4


def block_causal_policy():
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "head_std": 0.3}
    policy = tiny_llama(characters="abcdefgh", causal=False, **shape)
    encode = partial(encode_block_causal, block_size=SIZE)
    policy.spec = replace(policy.spec, name="toy", attention="block_causal", block_size=SIZE, encode=encode)
    return policy


def sampled(policy, *, num_steps: int = 9):
    """Prompts of 5, 2 and 8 tokens: the completion starts inside a block, inside another, and at a boundary."""
    ids = [[3, 4, 5, 6, 7], [8, 9], [4, 4, 4, 5, 5, 5, 6, 6]]
    prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, group_size=2)
    options = {"max_new_tokens": 12, "num_steps": num_steps, "block_size": SIZE, "temperature": 1.0, "rank": max_prob}
    return unmask(policy, prompts, torch.Generator().manual_seed(1), **options)


def test_mask_by_hand():
    """A row of one padding column and blocks (a b) (c d) of two; noisy columns from c on."""
    mask = packed_mask(torch.tensor([[False, True, True, True, True]]), torch.tensor([[0, 0, 0, 1, 1]]), 3)[0, 0].int()
    assert mask.tolist() == [
        # -  a  b  c  d  c' d'
        [0, 1, 1, 0, 0, 0, 0],  # padding
        [0, 1, 1, 0, 0, 0, 0],  # a
        [0, 1, 1, 0, 0, 0, 0],  # b
        [0, 1, 1, 1, 1, 0, 0],  # c
        [0, 1, 1, 1, 1, 0, 0],  # d
        [0, 1, 1, 0, 0, 1, 1],  # noisy c
        [0, 1, 1, 0, 0, 1, 1],  # noisy d
    ]


@pytest.mark.parametrize("num_steps", [4, 9, 12])
def test_packed_trajectory_is_the_trajectory(num_steps, monkeypatch):
    policy = block_causal_policy()
    rollout = sampled(policy, num_steps=num_steps)
    one_by_one, packed = lik.trajectory(), lik.trajectory(block_size=SIZE)
    plain, together = (e.draw(rollout, torch.Generator()) for e in (one_by_one, packed))
    logps = packed.logprobs(policy, rollout, together)
    torch.testing.assert_close(logps, one_by_one.logprobs(policy, rollout, plain), atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(logps, rollout.logprobs, atol=3e-6, rtol=1e-5)
    assert len(together.masked) <= SIZE < len(plain.masked) or num_steps == 4
    assert torch.equal(together.weight.sum(0), rollout.completion_mask.float())  # every token once


def test_gradient_is_that_of_the_steps_one_by_one():
    policy = block_causal_policy()
    rollout = sampled(policy)
    vector = torch.randn(rollout.tokens.shape, generator=torch.Generator().manual_seed(2)) * rollout.completion_mask
    parameters, gradients = list(policy.module.parameters()), []
    for estimator in (lik.trajectory(), lik.trajectory(block_size=SIZE)):
        noise = estimator.draw(rollout, torch.Generator())
        packed = estimator.packed is not None
        views = zip(noise.masked, noise.weight, strict=True)
        logps = sum(score_view(policy, rollout, m, w != 0, packed=packed) for m, w in views)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad((logps * vector).sum(), parameters)]))
    assert gradients[0].norm() > 0.1
    assert ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item() < 1e-5


def test_what_a_block_cannot_see_does_not_move_it():
    """Another token in a later block changes no earlier contribution; one in an earlier block changes later ones."""
    policy = block_causal_policy()
    rollout = sampled(policy)
    estimator = lik.trajectory(block_size=SIZE)
    noise = estimator.draw(rollout, torch.Generator())
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
    rollout = sampled(policy, num_steps=12)
    noise = lik.trajectory(num_segments=1, block_size=SIZE).draw(rollout, torch.Generator())
    assert torch.equal(noise.masked[0], rollout.completion_mask) and len(noise.masked) == 1
    halves = lik.trajectory(num_segments=2, block_size=SIZE).draw(rollout, torch.Generator())
    assert len(halves.masked) == 2
    columns = zip(rollout.unmask_step, rollout.completion_mask, rollout.attention_mask, strict=True)
    for row, (steps, completion, real) in enumerate(columns):
        block = (real.long().cumsum(-1) - 1) // SIZE
        for b in set(block[completion].tolist()):
            inside = completion & (block == b)
            own = steps[inside] - steps[inside].min()
            expected = own * 2 // (own.max() + 1)
            assert halves.weight[1, row][inside].tolist() == expected.float().tolist()


@pytest.mark.parametrize("num_segments", [None, 2])
def test_contract(num_segments):
    policy = block_causal_policy()
    check_estimator(lik.trajectory(block_size=SIZE, num_segments=num_segments), policy, sampled(policy))


def test_it_is_refused_where_it_would_be_wrong():
    policy = block_causal_policy()
    rollout = sampled(policy)
    wrong = lik.trajectory(block_size=8)
    with pytest.raises(ValueError, match="block_size=8 is not the policy's block size, 4"):
        wrong.logprobs(policy, rollout, wrong.draw(rollout, torch.Generator()))
    with pytest.raises(ValueError, match=r"block_size=0 must be at least 1"):
        lik.trajectory(block_size=0)
    policy.spec = replace(policy.spec, attention="full")
    right = lik.trajectory(block_size=SIZE)
    with pytest.raises(ValueError, match=r"likelihood='trajectory' is for block_causal attention"):
        right.logprobs(policy, rollout, right.draw(rollout, torch.Generator()))


def test_padding_rows_stay_finite():
    policy = block_causal_policy()
    rollout = sampled(policy)
    wide = rollout.padded(5, pad_id=policy.pad_id)
    estimator = lik.trajectory(block_size=SIZE)
    found = estimator.logprobs(policy, wide, estimator.draw(wide, torch.Generator()))
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 5:], rollout.logprobs, atol=3e-6, rtol=1e-5)
