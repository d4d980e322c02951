"""Infilling: prompts with open positions, which are part of the completion.

A row's completion is its open columns, from left to right, then the appended ones. Blocks and steps count only these.
"""

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from dllm_rl.models.base import Policy
from dllm_rl.samplers.cache import Cache
from dllm_rl.samplers.canvas import Canvas
from dllm_rl.types import Prompts


def check_infilling(
    policy: Policy, prompts: Prompts, length: int, cache: Cache | None, approximate_early_exit: bool
) -> None:
    """Raise ValueError where prompts with open positions cannot be filled in, or a row has nothing to fill."""
    assert prompts.infill_mask is not None
    if policy.spec.attention != "full":
        wrong = f"attention is {policy.spec.attention!r} and a gap would not see what follows it"
        raise ValueError(f"prompts have open positions, but {wrong}; use a model of full attention")
    if cache is not None:
        raise ValueError(f"cache={cache} keeps what surrounds a block, but open positions lie apart; use cache=None")
    if approximate_early_exit:
        raise ValueError("approximate_early_exit would leave gaps behind an end token unfilled; leave it out")
    empty = (~(prompts.infill_mask & prompts.attention_mask).any(-1)).nonzero()[:, 0].tolist()
    if length == 0 and empty:
        raise ValueError(f"max_new_tokens=0, and prompt {empty[0]} has no open position: there is nothing to fill")


def infilling_canvas(policy: Policy, prompts: Prompts, length: int, block_size: int) -> Canvas:
    """Return the canvas of prompts with open positions, followed by `length` masks."""
    assert prompts.infill_mask is not None and policy.spec.mask_id is not None, "a diffusion model has a mask token"
    behind = torch.ones(len(prompts.tokens), length, dtype=torch.bool)
    attended = prompts.attention_mask.cpu()
    opened = torch.cat([prompts.infill_mask.cpu() & attended, behind], dim=1)
    mask = torch.cat([attended, behind], dim=1)
    tokens = F.pad(prompts.tokens.cpu(), (0, length)).masked_fill(opened, policy.spec.mask_id)
    columns = (~opened).long().argsort(dim=-1, stable=True)[:, : int(opened.sum(-1).max())]
    block = (torch.arange(columns.shape[1]) // block_size).expand_as(columns)

    def per_row(x: Tensor) -> Tensor:
        return repeat(x, "p t -> (p g) t", g=prompts.group_size).contiguous().to(policy.device)

    return Canvas(
        prompts=prompts,
        tokens=per_row(tokens),
        attention_mask=per_row(mask),
        columns=per_row(columns),
        block=per_row(block),
        bounds=[],  # only caches read them
        starts=repeat(mask.long().argmax(-1), "p -> (p g)", g=prompts.group_size),
        pad_id=policy.pad_id,
        mask_id=policy.spec.mask_id,
        pads_ended=False,
        open=per_row(opened),
    )
