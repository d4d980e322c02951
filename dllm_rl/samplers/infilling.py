"""Infilling: prompts with open positions, which the policy fills in.

A row's completion consists of the open positions, from left to right, followed by the appended positions. Blocks and
steps count only the completion's positions.
"""

import torch
import torch.nn.functional as F

from dllm_rl.models.base import Policy
from dllm_rl.samplers.cache import Cache
from dllm_rl.samplers.canvas import Canvas
from dllm_rl.types import Prompts


def check_infilling(
    policy: Policy, prompts: Prompts, length: int, cache: Cache | None, approximate_early_exit: bool
) -> None:
    """Raise ValueError if the settings exclude infilling, or a prompt leaves nothing to fill in."""
    assert prompts.infill_mask is not None
    if policy.spec.attention != "full":
        raise ValueError(
            f"prompts have open positions, but attention is {policy.spec.attention!r} and a gap would not see the "
            "tokens after it; use a model of full attention"
        )
    if cache is not None:
        raise ValueError(
            f"cache={cache} stores the columns around a block, but open positions are not contiguous; use cache=None"
        )
    if approximate_early_exit:
        raise ValueError("approximate_early_exit would leave gaps after an end token unfilled; leave it out")
    complete_rows = (~(prompts.infill_mask & prompts.attention_mask).any(-1)).nonzero()[:, 0].tolist()
    if length == 0 and complete_rows:
        raise ValueError(f"max_new_tokens=0, and row {complete_rows[0]} has no open position: there is nothing to fill")


def infilling_canvas(policy: Policy, prompts: Prompts, length: int, block_size: int) -> Canvas:
    """Return the canvas of prompts with open positions, followed by `length` masks."""
    assert prompts.infill_mask is not None and policy.spec.mask_id is not None, "a diffusion model has a mask token"
    appended = torch.ones(len(prompts.tokens), length, dtype=torch.bool)
    prompt_mask = prompts.attention_mask.cpu()
    infill_mask = torch.cat([prompts.infill_mask.cpu() & prompt_mask, appended], dim=1)
    attention_mask = torch.cat([prompt_mask, appended], dim=1)
    tokens = F.pad(prompts.tokens.cpu(), (0, length)).masked_fill(infill_mask, policy.spec.mask_id)
    # A stable sort lists the columns to fill in first, from left to right.
    columns = (~infill_mask).long().argsort(dim=-1, stable=True)[:, : int(infill_mask.sum(-1).max())]
    block = (torch.arange(columns.shape[1]) // block_size).expand_as(columns)

    return Canvas(
        prompts=prompts,
        tokens=tokens.to(policy.device),
        attention_mask=attention_mask.to(policy.device),
        columns=columns.contiguous().to(policy.device),
        block=block.contiguous().to(policy.device),
        bounds=[],  # only caches read them
        starts=attention_mask.long().argmax(-1),
        pad_id=policy.pad_id,
        mask_id=policy.spec.mask_id,
        pad_finished=False,
        infill_mask=infill_mask.to(policy.device),
    )
