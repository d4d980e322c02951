"""Packed scoring of a block-causal model: a view masks positions in all blocks; each block sees earlier ones unmasked.

A packed forward runs a clean copy of each row (the rollout's tokens) next to a noisy copy (with masks).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.likelihoods.views import View, ViewFeature
from dllm_rl.models.base import Policy, block_causal_mask, block_ranks, position_ids, shift_states
from dllm_rl.types.rollouts import Rollout


@dataclass(frozen=True)
class Packed(ViewFeature):
    """Feature of views whose forward is `packed_hidden`."""

    def apply_to(self, view: View, number: int) -> View:
        forward = lambda policy, plan, *inputs: packed_hidden(policy, *inputs)  # noqa: E731
        return replace(view, forward=forward, share=False)


def steps_in_blocks(
    rollout: Rollout,
    last_step: Int[Tensor, "B T"],
    first_step: Int[Tensor, "B T"],
    *,
    block_size: int,
    num_segments: int | None,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return the step (or segment) of each position, counted from the first step of its block, and this first step.

    Both are of the completion; elsewhere they are -1 and 0. Blocks are counted from the row's first token.
    """
    completion = rollout.completion_mask
    block = position_ids(rollout.attention_mask) // block_size
    largest = torch.iinfo(last_step.dtype).max  # ignored by the minimum below
    per_block = last_step.new_full((len(last_step), int(block.max()) + 1), largest)
    first_steps = torch.where(completion, first_step, largest)
    block_start = per_block.scatter_reduce(1, block, first_steps, "amin").gather(1, block)
    segment = last_step - block_start
    if num_segments is not None:
        last_steps = torch.where(completion, last_step, -largest)
        block_end = (-per_block).scatter_reduce(1, block, last_steps, "amax").gather(1, block)
        segment = segment * num_segments // (block_end - block_start + 1).clamp(min=1)
    return torch.where(completion, segment, -1), torch.where(completion, block_start, 0)


def packed_mask(
    attention_mask: Bool[Tensor, "B T"], block: Int[Tensor, "B T"], start: int, *ranks: tuple[Tensor, Tensor]
) -> Bool[Tensor, "B 1 Q Q"]:
    """Return the attention mask of a packed forward.

    Its Q = 2 T - start columns are T clean columns, then the noisy columns start..T-1.

    Args:
        attention_mask: False on padding.
        block: Block of each column.
        start: First noisy column.
        *ranks: `block_ranks` of the clean tokens, and of the noisy tokens.
    """
    clean, noisy = (block_causal_mask(attention_mask, *rank)[:, 0] for rank in ranks)
    earlier_blocks = block_causal_mask(attention_mask, block, block - 1)[:, 0]
    is_token = attention_mask[:, :, None]
    clean_queries = torch.cat([clean, torch.zeros_like(noisy[:, :, start:])], dim=-1)
    # Padding sees its clean block: without a key the softmax of its row would be NaN.
    clean_keys = earlier_blocks | (clean & ~is_token)
    noisy_keys = noisy & ~earlier_blocks & is_token
    noisy_queries = torch.cat([clean_keys, noisy_keys[:, :, start:]], dim=-1)[:, start:]
    return torch.cat([clean_queries, noisy_queries], dim=1)[:, None]


def packed_hidden(
    policy: Policy,
    noisy: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    tokens: Int[Tensor, "B T"],
    read: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T D"]:
    """Return the final states of noisy tokens if each block sees only the clean tokens of earlier blocks.

    A clean and a noisy copy of each row go through one forward. Clean tokens see the clean tokens of their block and of
    earlier blocks. Noisy tokens see the clean tokens of earlier blocks and the noisy tokens of their block. The result
    is exact: each token sees what it would see in a separate forward of its block. With `spec.shift`, the state at a
    token is that of the token before it, which is a clean one if it belongs to an earlier block.

    Args:
        policy: Block-causal policy.
        noisy: Tokens with masks.
        attention_mask: False on padding.
        tokens: Clean tokens.
        read: Positions whose states are needed. States before the block of the first such position are zeros.

    Raises:
        ValueError: The policy is not block-causal.
    """
    spec = policy.spec
    if spec.attention != "block_causal" or spec.block_size is None or spec.mask_id is None:
        raise ValueError(f"packed scoring is for block-causal models; the policy is {spec.name!r}")
    positions = position_ids(attention_mask)
    block = positions // spec.block_size
    first_block = torch.where(read, block, block.max() + 1).amin(-1, keepdim=True)
    start = int((attention_mask & (block >= first_block)).any(0).long().argmax())  # the first noisy column that runs
    packed_tokens = torch.cat([tokens, noisy[:, start:]], dim=1)
    packed_positions = torch.cat([positions, positions[:, start:]], dim=1)
    clean_ranks = block_ranks(spec, tokens, positions)
    noisy_ranks = block_ranks(spec, noisy, positions)
    mask = packed_mask(attention_mask, block, start, clean_ranks, noisy_ranks)
    clean, states = policy.encode(packed_tokens, mask, packed_positions).tensor_split([tokens.shape[1]], dim=1)
    states = torch.cat([states.new_zeros(len(states), start, states.shape[-1]), states], dim=1)
    if not spec.shift:
        return states
    begins_block = block.diff(dim=1, prepend=block[:, :1]) != 0
    return torch.where(begins_block[..., None], clean.roll(1, dims=1), shift_states(states, attention_mask))
