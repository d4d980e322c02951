"""Scoring every block of a block-causal model at once: a clean copy and a noisy copy of the row in one forward.

Clean tokens see clean tokens of their own and earlier blocks. Noisy tokens see clean tokens of earlier blocks and noisy
tokens of their own. Exact: each token sees what it would see in a forward of its block alone.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.models.base import Policy, position_ids


def packed_mask(attention_mask: Bool[Tensor, "B T"], block: Int[Tensor, "B T"], start: int) -> Bool[Tensor, "B 1 Q Q"]:
    """Which columns see which, among T clean columns and the noisy columns start..T-1; Q = 2 T - start."""
    real = attention_mask[:, :, None]
    before = block[:, None, :] < block[:, :, None]
    same = block[:, None, :] == block[:, :, None]
    key = attention_mask[:, None, :]
    to_noisy = torch.zeros_like(same[:, :, start:])
    clean = torch.cat([key & (before | same), to_noisy], dim=-1)
    # Padding sees its own clean block, so that no row of the mask is empty, whose softmax is NaN.
    noisy = torch.cat([key & (before | (same & ~real)), (key & same & real)[:, :, start:]], dim=-1)[:, start:]
    return torch.cat([clean, noisy], dim=1)[:, None]


def packed_hidden(
    policy: Policy, tokens: Int[Tensor, "B T"], masked: Bool[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T D"]:
    """Final states with `masked` positions hidden in their own block only; zeros before the first block that has one.

    Raises ValueError for a model that is not block-causal, or predicts a token from the previous one.
    """
    spec = policy.spec
    if spec.attention != "block_causal" or spec.shift or spec.block_size is None or spec.mask_id is None:
        raise ValueError(f"packed scoring is for block-causal models without a shift; the policy is {spec.name!r}")
    positions = position_ids(attention_mask)
    block = positions // spec.block_size
    first = torch.where(masked, block, block.max() + 1).amin(-1, keepdim=True)
    start = int((attention_mask & (block >= first)).any(0).long().argmax())  # before it no noisy column is needed
    both = torch.cat([tokens, tokens.masked_fill(masked, spec.mask_id)[:, start:]], dim=1)
    mask = packed_mask(attention_mask, block, start)
    states = policy.encode(both, mask, torch.cat([positions, positions[:, start:]], dim=1))
    noisy = states[:, tokens.shape[1] :]
    return torch.cat([noisy.new_zeros(len(noisy), start, noisy.shape[-1]), noisy], dim=1)
