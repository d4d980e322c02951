"""Advantages: rewards (P, G) -> advantages (P, G), over the G completions of each prompt."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor


def group_relative(
    rewards: Float[Tensor, "P G"], *, scale_rewards: str = "group", eps: float = 1e-4
) -> Float[Tensor, "P G"]:
    """A = (R - mean) / (std + eps), with the group's mean and the sample standard deviation of the group (GRPO), of the
    whole batch, or without division (d1, Dr.GRPO) [paper]. A group of one, or of equal rewards, gives zeros.

    scale_rewards  what a reward is divided by: the standard deviation of its group, of the batch, or none
    eps            added to that standard deviation
    """
    centred = _centred(rewards)
    match scale_rewards:
        case "none":
            return centred
        case "group":
            return centred / (_std(rewards, dim=-1) + eps)
        case "batch":
            return centred / (_std(rearrange(rewards, "p g -> (p g)"), dim=0) + eps)
        case _:
            raise ValueError(f"scale_rewards={scale_rewards!r} must be 'group', 'batch' or 'none'")


def leave_one_out(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """A = R - mean of the group's OTHER rewards (RLOO, ESPO) [paper]. A group of one, or of equal rewards, gives
    zeros."""
    size = rewards.shape[-1]
    return _centred(rewards) * size / max(size - 1, 1)


def informative(rewards: Float[Tensor, "P G"]) -> Bool[Tensor, " P"]:
    """Groups whose rewards are not all equal: the others have advantage 0 and teach nothing (DAPO's dynamic sampling
    draws prompts until enough groups are informative [paper]). A group of one is not."""
    return (rewards != rewards[:, :1]).any(-1)


def _centred(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """R - the group's mean; exactly 0 where all of a group's rewards are equal, whose mean may be rounded."""
    return torch.where(informative(rewards)[:, None], rewards - rewards.mean(-1, keepdim=True), 0)


def _std(rewards: Tensor, *, dim: int) -> Tensor:
    return rewards.std(dim=dim, keepdim=True, correction=1 if rewards.shape[dim] > 1 else 0)
