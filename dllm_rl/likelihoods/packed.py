"""Scoring every block of a block-causal model at once: a clean copy and a noisy copy of the row in one forward.

A block attends to the final tokens of earlier blocks and to its own tokens as they were at that step. So the states of
all blocks at the same number of steps into each are those of one forward over [clean | noisy], where clean tokens see
clean ones of their own block and those before, and noisy tokens see clean ones of the blocks before and noisy ones of
their own. Exact: no token sees anything that it would not see in a forward of its block alone.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.models.base import Policy, position_ids


def packed_mask(attention_mask: Bool[Tensor, "B T"], block: Int[Tensor, "B T"], start: int) -> Bool[Tensor, "B 1 Q Q"]:
    """Who sees whom among T clean columns and the noisy columns start..T-1; Q = 2 T - start.

    Padding sees the clean block that it is counted in, so that no row of the mask is empty.
    """
    real, before = attention_mask[:, :, None], block[:, None, :] < block[:, :, None]
    same = block[:, None, :] == block[:, :, None]
    key = attention_mask[:, None, :]
    to_noisy = torch.zeros_like(same[:, :, start:])
    clean = torch.cat([key & (before | same), to_noisy], dim=-1)
    noisy = torch.cat([key & (before | (same & ~real)), (key & same & real)[:, :, start:]], dim=-1)[:, start:]
    return torch.cat([clean, noisy], dim=1)[:, None]


def packed_hidden(
    policy: Policy,
    tokens: Int[Tensor, "B T"],
    masked: Bool[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T D"]:
    """Final states at each position with `masked` positions hidden in its own block only; zeros before the first block
    that has one.

    Raises ValueError for a model that is not block-causal, or predicts a token from the one before.
    """
    spec = policy.spec
    if spec.attention != "block_causal" or spec.shift or spec.block_size is None or spec.mask_id is None:
        raise ValueError(f"packed scoring is for block-causal models without a shift; the policy is {spec.name!r}")
    positions = position_ids(attention_mask)
    block = positions // spec.block_size
    first = torch.where(masked, block, block.max() + 1).amin(-1, keepdim=True)
    start = int((attention_mask & (block >= first)).any(0).long().argmax())
    both = torch.cat([tokens, tokens.masked_fill(masked, spec.mask_id)[:, start:]], dim=1)
    mask = packed_mask(attention_mask, block, start)
    states = policy.encode(both, mask, torch.cat([positions, positions[:, start:]], dim=1))
    noisy = states[:, tokens.shape[1] :]
    return torch.cat([noisy.new_zeros(len(noisy), start, noisy.shape[-1]), noisy], dim=1)
