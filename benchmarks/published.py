"""Published samplers, stated anew and plainly: what the library's are held against (benchmarks/sampler.py)."""

from typing import Any

import torch
from transformers import DynamicCache

from dllm_rl.models.policy import ModulePolicy
from dllm_rl.types.rollouts import Prompts


@torch.no_grad()
def plain(
    policy: ModulePolicy, prompts: Prompts, shape: Any, *, masked_only: bool = False, double: bool = False
) -> torch.Tensor:
    """LLaDA's generate at temperature 0 as its authors have it: logits everywhere, softmax of them in their own dtype,
    confidence, top k of the block; a batch is padded on the left, and padding is not attended to.

    masked_only: the same with logits at the masked positions of the block alone. double: softmax in fp64, as their code
    once had it. Returns (B, T) tokens.
    """
    mask_id, start = policy.spec.mask_id, prompts.tokens.shape[1]
    device = policy.device
    x = torch.cat([prompts.tokens, torch.full((len(prompts.tokens), shape.new), mask_id)], dim=1).to(device)
    attention = torch.cat([prompts.attention_mask, torch.ones(len(x), shape.new, dtype=torch.bool)], dim=1).to(device)
    num_blocks = shape.new // shape.block
    steps = shape.steps // num_blocks
    for block in range(num_blocks):
        _begin, end = start + block * shape.block, start + (block + 1) * shape.block
        for step in range(steps):
            transfer = shape.block // steps + (step < shape.block % steps)
            hidden = policy.hidden(x, attention)
            open_ = (x == mask_id) & attention
            open_[:, end:] = False
            logits = policy.spec.head(policy.module, hidden[open_] if masked_only else hidden)
            logits[..., mask_id] = -torch.inf
            drawn = logits.argmax(-1)
            probs = (logits.double() if double else logits).softmax(-1).gather(-1, drawn[..., None])[..., 0]
            if masked_only:
                tokens = x.masked_scatter(open_, drawn)
                confidence = torch.full(x.shape, -torch.inf, dtype=probs.dtype, device=device).masked_scatter(
                    open_, probs
                )
            else:
                tokens, confidence = torch.where(open_, drawn, x), torch.where(open_, probs, -torch.inf)
            for row in range(len(x)):
                best = confidence[row].topk(transfer).indices
                x[row, best] = tokens[row, best]
    return x


@torch.no_grad()
def plain_cached(policy: ModulePolicy, prompts: Prompts, shape: Any, *, dual: bool) -> torch.Tensor:
    """Fast-dLLM's caches at temperature 0 as published: a forward of everything at the start of a block, then forwards
    against the keys and values kept from it. The prefix cache keeps those before the block, and all from the block on
    runs in every step; the dual cache keeps those behind it too, and the block runs alone. Logits, softmax and the
    likeliest token are of all that runs. Prompts of one length. Returns (B, T) tokens."""
    mask_id, start, num_blocks = policy.spec.mask_id, prompts.tokens.shape[1], shape.new // shape.block
    steps, device = shape.steps // num_blocks, policy.device
    x = torch.cat([prompts.tokens, torch.full((len(prompts.tokens), shape.new), mask_id)], dim=1).to(device)
    positions = torch.arange(x.shape[1], device=device).expand_as(x)
    for begin in range(start, x.shape[1], shape.block):
        end, kept = begin + shape.block, []
        others = torch.cat([positions[0, :begin], positions[0, end:]]) if dual else positions[0, :begin]
        for step in range(steps):
            past = DynamicCache(config=policy.module.config)
            for number, (keys, values) in enumerate(kept):
                past.update(keys, values, number)
            first, last = (0, x.shape[1]) if step == 0 else (begin, end if dual else x.shape[1])
            seen = torch.zeros(len(x), 1, last - first, x.shape[1], dtype=shape.dtype, device=device)
            fresh, place = x[:, first:last], positions[:, first:last]
            hidden = policy.encode(fresh, seen, place, cache=past)
            if step == 0:
                kept = [(layer.keys[:, :, others], layer.values[:, :, others]) for layer in past.layers]
            logits = policy.spec.head(policy.module, hidden)
            logits[..., mask_id] = -torch.inf
            drawn = logits.argmax(-1)
            probs = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]
            open_ = (fresh == mask_id) & (place >= begin) & (place < end)
            confidence = torch.where(open_, probs, -torch.inf)
            for row in range(len(x)):
                best = confidence[row].topk(shape.block // steps + (step < shape.block % steps)).indices
                x[row, first + best] = drawn[row, best]
    return x
