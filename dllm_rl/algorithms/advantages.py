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
    """Subtract the group's mean reward and divide by a standard deviation (GRPO).

    A = (R - mean of the group) / (std + eps), with the sample standard deviation [paper]; without the division it is
    the advantage of d1 and Dr.GRPO. A group of one completion, or of equal rewards, gives zeros.

    Args:
        rewards: Rewards (P, G).
        scale_rewards: Source of the standard deviation: "group" (default), "batch", or "none" for no division.
        eps: Constant added to the standard deviation, at least 0. Default: 1e-4.

    Returns:
        Advantages (P, G).

    Raises:
        ValueError: `scale_rewards` is unknown, or eps is negative.
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
    """Subtract the mean of the group's OTHER rewards from each reward (RLOO, ESPO) [paper].

    A group of one completion, or of equal rewards, gives zeros.
    """
    size = rewards.shape[-1]
    return _centred(rewards) * size / max(size - 1, 1)


@bounded(eps=Bound(at_least=0))
def decoupled(
    rewards: Float[Tensor, "P G"],
    *,
    parts: Float[Tensor, "K P G"],
    weights: Float[Tensor, " K"],
    eps: float = 1e-4,
) -> Float[Tensor, "P G"]:
    """Normalize each of K rewards within its group, then normalize their weighted sum over the batch (GDPO of rewards).

    Use it for a task with several reward functions of different scales.

        z_k = (R_k - mean_group R_k) / (std_group R_k + eps),   s = sum_k w_k z_k,   A = s / (std_batch s + eps)

    Both are sample standard deviations. GDPO also subtracts the batch mean of s, which is 0. A NaN reward does not
    apply: its z is 0.

    Args:
        rewards: Total rewards (P, G). They are not used.
        parts: Each reward of the task separately (K, P, G).
        weights: Weight of each reward in the sum (K,).
        eps: Constant added to both standard deviations, at least 0. Default: 1e-4.

    Returns:
        Advantages (P, G).

    Raises:
        ValueError: eps is negative.

    Sources: arXiv 2601.05242, TRL's multi_objective_aggregation="normalize_then_sum" [digest].
    """
    there = ~parts.isnan()
    count = there.sum(-1, keepdim=True)
    mean = parts.nanmean(-1, keepdim=True)
    centred = torch.where(
        there & _differ(parts)[..., None], parts - mean, 0
    )  # the mean of equal rewards may be rounded
    size = _magnitude(centred, dim=-1)
    std = (torch.ldexp(centred, -size).square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    terms = _divided(weights[:, None, None] * centred, torch.ldexp(std, size) + eps)
    total = terms.sum(0)
    cancelled = total.abs() <= 8 * torch.finfo(total.dtype).eps * terms.abs().sum(0)  # only rounding errors remain
    total = total.masked_fill(cancelled, 0)
    return _divided(total, _std(rearrange(total, "p g -> (p g)"), dim=0) + eps)


def takes_component_rewards(advantages: Callable) -> bool:
    """Return whether a function takes each reward separately, as `decoupled` does."""
    function = getattr(advantages, "func", advantages)
    names = inspect.signature(function).parameters.keys() if inspect.isfunction(function) else set()
    return "parts" in names


def has_unequal_rewards(rewards: Float[Tensor, "P G *K"]) -> Bool[Tensor, " P"]:
    """Return which groups have rewards that differ; the other groups have advantage 0.

    DAPO draws prompts until enough groups differ [paper]. One differing reward of K is enough. NaN (the reward does not
    apply) is ignored.
    """
    return _differ(rearrange(rewards, "p g ... -> p (...) g")).any(-1)


def _differ(rewards: Float[Tensor, "*S G"]) -> Bool[Tensor, "*S"]:
    """Return whether a group's rewards, ignoring NaN, are not all equal."""
    there = ~rewards.isnan()
    largest = torch.where(there, rewards, -torch.inf).amax(-1)
    return largest > torch.where(there, rewards, torch.inf).amin(-1)  # False if all are NaN: -inf > inf


def _centred(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Subtract the group's mean. NaN stays NaN."""
    equal = (rewards == rewards[:, :1]).all(
        -1, keepdim=True
    )  # the rounded mean of equal rewards could make advantages nonzero
    return torch.where(equal, 0, rewards - rewards.mean(-1, keepdim=True))


def _divided(centred: Tensor, scale: Tensor) -> Tensor:
    """Divide, and return 0 where `centred` is 0: equal rewards with eps=0 would divide 0 by 0."""
    return torch.where(centred == 0, 0, centred / scale)


def _std(rewards: Tensor, *, dim: int) -> Tensor:
    size = _magnitude(rewards, dim=dim)
    correction = 1 if rewards.shape[dim] > 1 else 0  # the deviation of a single reward is 0, not NaN
    return torch.ldexp(torch.ldexp(rewards, -size).std(dim=dim, keepdim=True, correction=correction), size)


def _magnitude(values: Tensor, *, dim: int) -> Tensor:
    """Return the exponent of the largest value.

    Scaling by a power of two changes no digit, and squares of the scaled values do not underflow.
    """
    return torch.frexp(values.abs().amax(dim, keepdim=True)).exponent
