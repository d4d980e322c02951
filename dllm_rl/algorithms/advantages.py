"""Advantages: rewards (P, G) -> advantages (P, G), over the G completions of each prompt."""

import inspect
from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.bounds import Bound, bounded


@bounded(eps=Bound(at_least=0))
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


@bounded(eps=Bound(at_least=0))
def decoupled(
    rewards: Float[Tensor, "P G"], *, parts: Float[Tensor, "K P G"], weights: Float[Tensor, " K"], eps: float = 1e-4
) -> Float[Tensor, "P G"]:
    """GDPO: each of K rewards is normalised within its group on its own, so that none drowns another and combinations
    with equal sums stay apart; their weighted sum is normalised over the batch.

        z_k = (R_k - mean_group R_k) / (std_group R_k + eps),   s = sum_k weights_k z_k,   A = s / (std_batch s + eps)
    Standard deviations are samples'. The batch's mean of s, which GDPO subtracts, is 0 as each group's is, so that a
    group without differences keeps exactly 0. Where a reward is NaN (it does not apply), its z is 0 and its group is
    the rest. Sources: arXiv 2601.05242, TRL's multi_objective_aggregation="normalize_then_sum" [digest].

    parts    each reward of the task on its own
    weights  of the rewards in the sum
    eps      added to both standard deviations
    """
    there = ~parts.isnan()
    count, mean = there.sum(-1, keepdim=True), parts.nanmean(-1, keepdim=True)
    # Exactly 0 also where all are equal, whose mean may be rounded.
    centred = torch.where(there & _differ(parts)[..., None], parts - mean, 0)
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    total = (weights[:, None, None] * centred / (std + eps)).sum(0)
    return total / (_std(rearrange(total, "p g -> (p g)"), dim=0) + eps)


def takes_parts(advantages: Callable) -> bool:
    """Whether a function is to be given each reward on its own, as `decoupled` is."""
    function = getattr(advantages, "func", advantages)
    return inspect.isfunction(function) and "parts" in inspect.signature(function).parameters


def informative(rewards: Float[Tensor, "P G *K"]) -> Bool[Tensor, " P"]:
    """Groups whose rewards are not all equal: the others have advantage 0 and teach nothing (DAPO's dynamic sampling
    draws prompts until enough groups are informative [paper]). A group of one is not. Of K rewards one that differs is
    enough; NaN (it does not apply) differs from nothing."""
    return _differ(rearrange(rewards, "p g ... -> p (...) g")).any(-1)


def _differ(rewards: Float[Tensor, "*S G"]) -> Bool[Tensor, "*S"]:
    """Whether a group's rewards, of those that apply, are not all equal."""
    there = ~rewards.isnan()
    largest = torch.where(there, rewards, -torch.inf).amax(-1)
    return largest > torch.where(there, rewards, torch.inf).amin(-1)


def _centred(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """R - the group's mean; exactly 0 where a group's rewards are equal, whose mean may be rounded. NaN stays NaN."""
    equal = (rewards == rewards[:, :1]).all(-1, keepdim=True)
    return torch.where(equal, 0, rewards - rewards.mean(-1, keepdim=True))


def _std(rewards: Tensor, *, dim: int) -> Tensor:
    return rewards.std(dim=dim, keepdim=True, correction=1 if rewards.shape[dim] > 1 else 0)
