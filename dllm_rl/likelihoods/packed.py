"""Packed scoring of a block-causal model: a view masks all blocks, and each block sees the others clean."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.likelihoods import events
from dllm_rl.likelihoods.trajectory import all_segments, views_of_segments
from dllm_rl.likelihoods.views import Plan, View, ViewFeature
from dllm_rl.models.base import Policy, block_causal_mask, block_ranks, position_ids
from dllm_rl.types import Rollout, Views


@dataclass(frozen=True)
class Packed(ViewFeature):
    """Feature of views whose forward is `packed_hidden`."""

    def apply_to(self, view: View, number: int) -> View:
        return replace(view, forward=packed_forward, share=False)


def packed_views(rollout: Rollout, *, num_segments: int | None, block_size: int) -> Views:
    """Return the views of a trajectory for all blocks together.

    View r hides what was committed r or more steps after the block's first step, and scores step r. Blocks count from
    the row's first token.
    """
    completion = rollout.completion_mask
    step, begun = events.last_and_first_step(rollout)
    block = position_ids(rollout.attention_mask) // block_size
    far = torch.iinfo(step.dtype).max  # positions off the completion must not count as a first step
    blank = step.new_full((len(step), int(block.max()) + 1), far)
    first = blank.scatter_reduce(1, block, torch.where(completion, begun, far), "amin").gather(1, block)
    segment = step - first
    if num_segments is not None:
        last = (-blank).scatter_reduce(1, block, torch.where(completion, step, -far), "amax").gather(1, block)
        segment = segment * num_segments // (last - first + 1).clamp(min=1)
    segment = torch.where(completion, segment, -1)
    index = all_segments(segment)
    if rollout.events is None:
        views = views_of_segments(rollout, segment, index)
    else:
        views = events.replayed(rollout, (index + torch.where(completion, first, 0)).expand(-1, *segment.shape))
    return replace(views, features=(*views.features, Packed()))


def packed_mask(
    attention_mask: Bool[Tensor, "B T"], block: Int[Tensor, "B T"], start: int, *ranks: tuple[Tensor, Tensor]
) -> Bool[Tensor, "B 1 Q Q"]:
    """Return which of Q columns see which: T clean columns and the noisy columns start..T-1; Q = 2 T - start.

    Each kind has its `block_ranks`.
    """
    clean, noisy = (block_causal_mask(attention_mask, *one)[:, 0] for one in ranks)
    before = block_causal_mask(attention_mask, block, block - 1)[:, 0]
    real = attention_mask[:, :, None]
    upper = torch.cat([clean, torch.zeros_like(noisy[:, :, start:])], dim=-1)
    # Padding sees its clean block, so that no row of the mask is empty: its softmax would be NaN.
    lower = torch.cat([before | (clean & ~real), (noisy & ~before & real)[:, :, start:]], dim=-1)[:, start:]
    return torch.cat([upper, lower], dim=1)[:, None]


def packed_forward(policy: Policy, plan: Plan, *inputs: Tensor) -> Tensor:
    """Run `packed_hidden` as the forward of a view."""
    return packed_hidden(policy, *inputs)


def packed_hidden(
    policy: Policy,
    noisy: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    tokens: Int[Tensor, "B T"],
    read: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T D"]:
    """Return final states where each block sees `noisy` of itself and `tokens` of the others.

    States before the first block with a position to `read` are zeros. A clean and a noisy copy of the row go through
    one forward. Clean tokens see clean tokens of their block and earlier ones; noisy tokens see clean tokens of earlier
    blocks and noisy ones of their block. The result is exact: each token sees what it would see in a forward of its
    block only. Raise ValueError for a model that is not block-causal, or with a shift.
    """
    spec = policy.spec
    if spec.attention != "block_causal" or spec.shift or spec.block_size is None or spec.mask_id is None:
        raise ValueError(f"packed scoring is for block-causal models without a shift; the policy is {spec.name!r}")
    positions = position_ids(attention_mask)
    block = positions // spec.block_size
    first = torch.where(read, block, block.max() + 1).amin(-1, keepdim=True)
    start = int((attention_mask & (block >= first)).any(0).long().argmax())  # before it no noisy column is needed
    both = torch.cat([tokens, noisy[:, start:]], dim=1)
    ranks = (block_ranks(spec, some, positions) for some in (tokens, noisy))
    mask = packed_mask(attention_mask, block, start, *ranks)
    states = policy.encode(both, mask, torch.cat([positions, positions[:, start:]], dim=1))[:, tokens.shape[1] :]
    return torch.cat([states.new_zeros(len(states), start, states.shape[-1]), states], dim=1)
