"""Advantages: rewards (P, G) -> advantages (P, G), over the G completions of each prompt."""

import inspect
from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.bounds import Bound, bounded
from dllm_rl.renamed import refuse_renamed


@bounded(eps=Bound(at_least=0))
def group_relative(
    rewards: Float[Tensor, "P G"], *, scale_rewards: str = "group", eps: float = 1e-4
) -> Float[Tensor, "P G"]:
    """A = (R - mean of the group) / (std + eps), sample standard deviation (GRPO; without division: d1, Dr.GRPO)
    [paper]. A group of one, or of equal rewards, gives zeros.

    Args:
        scale_rewards: Whose standard deviation divides: group, batch or none.
        eps: Added to the standard deviation.
    """
    centred = _centred(rewards)
    match scale_rewards:
        case "none":
            return centred
        case "group":
            return _divided(centred, _std(rewards, dim=-1) + eps)
        case "batch":
            return _divided(centred, _std(rearrange(rewards, "p g -> (p g)"), dim=0) + eps)
        case _:
            raise ValueError(f"scale_rewards={scale_rewards!r} must be 'group', 'batch' or 'none'")


def leave_one_out(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """A = R - mean of the group's OTHER rewards (RLOO, ESPO) [paper]. A group of one, or of equal rewards, gives 0."""
    size = rewards.shape[-1]
    return _centred(rewards) * size / max(size - 1, 1)


@bounded(eps=Bound(at_least=0))
def decoupled(
    rewards: Float[Tensor, "P G"],
    *,
    component_rewards: Float[Tensor, "K P G"],
    reward_weights: Float[Tensor, " K"],
    eps: float = 1e-4,
) -> Float[Tensor, "P G"]:
    """GDPO (of rewards): normalise each of K rewards within its group, then their weighted sum over the batch.
        z_k = (R_k - mean_group R_k) / (std_group R_k + eps),   s = sum_k w_k z_k,   A = s / (std_batch s + eps)
    Standard deviations are samples'. GDPO also subtracts the batch mean of s, which is 0. A NaN reward does not apply:
    its z is 0. Sources: arXiv 2601.05242, TRL's multi_objective_aggregation="normalize_then_sum" [digest].

    Args:
        component_rewards: Each reward of the task on its own.
        reward_weights: Of the rewards in the sum.
        eps: Added to both standard deviations.
    """
    there = ~component_rewards.isnan()
    count = there.sum(-1, keepdim=True)
    mean = component_rewards.nanmean(-1, keepdim=True)
    centred = torch.where(
        there & _differ(component_rewards)[..., None], component_rewards - mean, 0
    )  # a mean of equal rewards may be rounded
    size = _magnitude(centred, dim=-1)
    std = (torch.ldexp(centred, -size).square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    terms = _divided(reward_weights[:, None, None] * centred, torch.ldexp(std, size) + eps)
    total = terms.sum(0)
    cancelled = total.abs() <= 8 * torch.finfo(total.dtype).eps * terms.abs().sum(0)  # a sum of roundings
    total = total.masked_fill(cancelled, 0)
    return _divided(total, _std(rearrange(total, "p g -> (p g)"), dim=0) + eps)


def takes_component_rewards(advantages: Callable) -> bool:
    """Whether a function takes each reward on its own, as `decoupled` does."""
    function = getattr(advantages, "func", advantages)
    names = inspect.signature(function).parameters.keys() if inspect.isfunction(function) else set()
    refuse_renamed(names & {"parts"}, "decoupled")
    return "component_rewards" in names


def has_unequal_rewards(rewards: Float[Tensor, "P G *K"]) -> Bool[Tensor, " P"]:
    """Groups whose rewards differ; the others have advantage 0. DAPO draws prompts until enough groups differ [paper].
    One differing reward of K is enough. NaN (the reward does not apply) is ignored.
    """
    return _differ(rearrange(rewards, "p g ... -> p (...) g")).any(-1)


def _differ(rewards: Float[Tensor, "*S G"]) -> Bool[Tensor, "*S"]:
    """Whether a group's rewards, without NaN, are not all equal."""
    there = ~rewards.isnan()
    largest = torch.where(there, rewards, -torch.inf).amax(-1)
    return largest > torch.where(there, rewards, torch.inf).amin(-1)  # False with NaN alone: -inf > inf


def _centred(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """R - the group's mean. NaN stays NaN."""
    equal = (rewards == rewards[:, :1]).all(-1, keepdim=True)  # whose mean may be rounded, and advantages not 0
    return torch.where(equal, 0, rewards - rewards.mean(-1, keepdim=True))


def _divided(centred: Tensor, scale: Tensor) -> Tensor:
    """Centred / scale, and 0 where centred is 0: equal rewards and eps=0 would divide 0 by 0."""
    return torch.where(centred == 0, 0, centred / scale)


def _std(rewards: Tensor, *, dim: int) -> Tensor:
    size = _magnitude(rewards, dim=dim)
    correction = 1 if rewards.shape[dim] > 1 else 0  # of one: 0, not NaN
    return torch.ldexp(torch.ldexp(rewards, -size).std(dim=dim, keepdim=True, correction=correction), size)


def _magnitude(values: Tensor, *, dim: int) -> Tensor:
    """Exponent of the largest value: powers of two change no digit, and squares of scaled values do not underflow."""
    return torch.frexp(values.abs().amax(dim, keepdim=True)).exponent
