"""Attention by plain products against torch's own kernel in fp64, and where it stands in for it."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tiny_recipe import tiny_recipe

from dllm_rl.diagnostics.batch_invariance import BatchInvariantOps
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.models.forward import attention
from dllm_rl.models.forward.attention import SHORT, PlainAttention, plain_attention
from dllm_rl.models.forward.recompute import recomputed_blocks
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.models.tokens import encode
from dllm_rl.rng import generator_for
from dllm_rl.training.arithmetic import arithmetic


def drawn(keys: int = 7, heads: int = 4, dtype=torch.float64):
    """Query, key and value; the last two have two heads."""
    shapes = ((2, heads, 5, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


MASKS = {
    "none": {},
    "bool": {"attn_mask": torch.arange(7).expand(2, 1, 5, 7) > 1},
    "float": {"attn_mask": torch.linspace(-2, 2, 35, dtype=torch.float64).view(1, 1, 5, 7)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.7},
}


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("case", MASKS)
def test_it_is_torchs_attention(case, heads):
    ours, theirs = drawn(heads=heads), drawn(heads=heads)
    options = MASKS[case] | {"enable_gqa": heads == 4}
    out, expected = plain_attention(*ours, **options), F.scaled_dot_product_attention(*theirs, **options)
    torch.testing.assert_close(out, expected)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"dropout_p=0.1: attention with dropout does not repeat"):
        plain_attention(*drawn(heads=2), dropout_p=0.1)


@pytest.mark.parametrize(
    ("keys", "dtype", "autocast", "plain"),
    [
        (SHORT, torch.bfloat16, False, True),
        (SHORT, torch.float16, False, True),
        (SHORT + 1, torch.bfloat16, False, False),
        (SHORT, torch.float32, False, False),
        (SHORT, torch.float32, True, True),
    ],
)
def test_where_it_stands_in_for_the_fused_kernel(keys, dtype, autocast, plain, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "plain_attention", lambda *a, **k: calls.append(a) or plain_attention(*a, **k))
    query, key, value = drawn(keys, heads=2, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), PlainAttention():
        out = F.scaled_dot_product_attention(query, key, value)
    assert len(calls) == plain
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("changes", "plain"), [({"bf16": True}, True), ({}, False), ({"dtype": "bfloat16"}, True)])
def test_a_recipe_in_16_bits_computes_with_it_in_rollout_and_learner(tmp_path, changes, plain, monkeypatch):
    """The sampler's record is the learner's own score, bit for bit: both round alike."""
    calls = []
    monkeypatch.setattr(attention, "plain_attention", lambda *a, **k: calls.append(a) or plain_attention(*a, **k))
    recipe = tiny_recipe(tmp_path, rollout_quantization=None, **changes)
    policy = recipe.model()
    if "dtype" in changes:
        policy.module.bfloat16()
    with arithmetic(recipe, Accelerator(cpu=True)):
        rollout = recipe.sampler(policy, encode(policy, [recipe.task[i] for i in range(4)]), generator_for(0))
        noise = recipe.likelihood.draw(rollout, generator_for(1))
        scores = recipe.likelihood.scores(policy, rollout, noise, keep_graphs=True)
        torch.testing.assert_close(recipe.likelihood.combine(scores, noise), recorded(rollout, noise), rtol=0, atol=0)
        scores.sum().backward()
    assert bool(calls) == plain


@pytest.mark.parametrize("mode", [PlainAttention, lambda: BatchInvariantOps(16)], ids=["plain", "batch invariant"])
def test_a_block_that_is_run_again_in_the_backward_runs_in_the_mode_of_its_forward(mode):
    """A backward is outside of every mode: a block recomputed by other kernels stops torch."""
    gradients = []
    for again in (False, True):
        policy = tiny_masked_lm(characters="abc", hidden_size=32, num_layers=2, num_heads=2, intermediate_size=32)
        tokens = torch.arange(3, 6).repeat(2, 3)
        with torch.autocast("cpu", torch.bfloat16), mode():
            with recomputed_blocks(policy.module) if again else nullcontext():
                logits = policy.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
            logits.float().square().mean().backward()
        gradients.append([p.grad for p in policy.module.parameters() if p.grad is not None])
    assert gradients[0] and all(map(torch.equal, *gradients))
