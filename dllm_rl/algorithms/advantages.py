"""Advantage functions: rewards (B,) of B completions, and the group (B,) of each -> advantages (B,).

NaN marks a completion without a reward: no mean counts it, and its advantage is 0.

docs/papers.md explains the tags [paper] and [digest].
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.records import FunctionRecord, Record, option
from dllm_rl.types.groups import group_numbers

# Two rewards whose difference is this share of them are the same sum, added up in another order in fp64.
ROUNDING = 64 * torch.finfo(torch.float64).eps


class Advantages(Record):
    """A rule that computes the advantages of a step's completions from their rewards.

    Subclass it for a custom rule. Where advantages are expected, a plain function of rewards and group is one too.
    `to_groups` and `to_rows` help with groups of different sizes. A class with `takes_component_rewards = True` also
    gets `parts` (K, B) and `weights` (K,) by name, the task's K rewards and their weights, as `Decoupled` does.
    """

    takes_component_rewards = False

    def __call__(self, *arguments: Any, **parts: Any) -> Float[Tensor, " B"]:
        """Return the advantages (B,) of `arguments`: rewards (B,) and group (B,), the group of each completion. The
        completions of a group are adjacent.
        """
        raise TypeError(f"{type(self).__name__} must define __call__(rewards, group)")


class FunctionAdvantages(FunctionRecord, Advantages):
    """Advantages that a function computes.

    Args:
        function: Function (rewards, group) -> advantages, each (B,).
    """


class GroupRelative(Advantages):
    """Subtract the group's mean reward and divide by a standard deviation (GRPO).

    This is the default. A = (R - mean of the group) / (std + eps), with the sample standard deviation [paper]. d1 and
    Dr.GRPO do not divide (scale_rewards="none"). A group of one completion, or of equal rewards, gives zeros.

    Args:
        scale_rewards: Source of the standard deviation: "group" (default), "batch", or "none" for no division.
        eps: Constant added to the standard deviation, at least 0. Default: 1e-4.
    """

    scale_rewards: Literal["group", "batch", "none"] = "group"
    eps: float = option(default=1e-4, at_least=0)

    def __call__(self, rewards: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        grouped = to_groups(rewards, group)
        centered = _center(grouped)
        if self.scale_rewards == "group":
            centered = _divide(centered, _std(grouped, dim=-1) + self.eps)
        advantages = to_rows(centered, group)
        if self.scale_rewards == "batch":
            advantages = _divide(advantages, _std(rewards, dim=0) + self.eps)
        return advantages


class LeaveOneOut(Advantages):
    """Subtract the mean of the group's OTHER rewards from each reward (RLOO, ESPO) [paper].

    A group of one completion, or of equal rewards, gives zeros.
    """

    def __call__(self, rewards: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        grouped = to_groups(rewards, group)
        size = (~grouped.isnan()).sum(-1, keepdim=True)
        return to_rows(_center(grouped) * size / (size - 1).clamp(min=1), group)


class Decoupled(Advantages):
    """Normalize each of K rewards within its group, then normalize their weighted sum over the batch (GDPO).

    Use it for a task with several reward functions of different scales.

        z_k = (R_k - mean_group R_k) / (std_group R_k + eps),   s = sum_k w_k z_k,   A = s / (std_batch s + eps)

    Both are sample standard deviations. GDPO also subtracts the batch mean of s, which is 0. A reward that is NaN does
    not apply to the completion, and its z is 0. A completion without any reward is in neither deviation.

    Args:
        eps: Constant added to both standard deviations, at least 0. Default: 1e-4.

    Sources: arXiv 2601.05242, TRL's multi_objective_aggregation="normalize_then_sum" [digest].
    """

    eps: float = option(default=1e-4, at_least=0)
    takes_component_rewards = True

    def __call__(
        self,
        rewards: Float[Tensor, " B"],
        group: Int[Tensor, " B"],
        *,
        parts: Float[Tensor, "K B"],
        weights: Float[Tensor, " K"],
    ) -> Float[Tensor, " B"]:
        """Return the advantages of each reward separately, `parts`, and its weight in the sum, `weights`."""
        lacks_reward = rewards.isnan()
        parts = torch.stack([to_groups(part.masked_fill(lacks_reward, torch.nan), group) for part in parts])
        applies = ~parts.isnan()
        count = applies.sum(-1, keepdim=True)
        mean = parts.nanmean(-1, keepdim=True)
        # Groups of equal rewards are set to 0, because their mean may be rounded.
        centered = torch.where(applies & _has_differing_rewards(parts)[..., None], parts - mean, 0)
        exponent = _max_exponent(centered, dim=-1)
        std = (torch.ldexp(centered, -exponent).square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        terms = _divide(weights[:, None, None] * centered, torch.ldexp(std, exponent) + self.eps)
        total = terms.sum(0)
        only_rounding = total.abs() <= 8 * torch.finfo(total.dtype).eps * terms.abs().sum(0)  # of terms that cancel
        total = to_rows(total.masked_fill(only_rounding, 0), group)
        return _divide(total, _std(total.masked_fill(lacks_reward, torch.nan), dim=0) + self.eps)


def to_groups(values: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, "P G"]:
    """Return values of rows as one row for each group, padded with NaN up to the size of the largest group."""
    number = group_numbers(group)
    sizes = number.bincount()
    slot = torch.arange(len(group)) - (sizes.cumsum(0) - sizes)[number]
    grouped = values.new_full((len(sizes), int(sizes.max())), torch.nan)
    grouped[number, slot] = values
    return grouped


def to_rows(grouped: Float[Tensor, "P G"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return the rows of values that `to_groups` arranged."""
    sizes = group_numbers(group).bincount()
    return grouped[torch.arange(grouped.shape[1]) < sizes[:, None]]


def has_unequal_rewards(rewards: Float[Tensor, "B *K"], group: Int[Tensor, " B"]) -> Bool[Tensor, " P"]:
    """Return which groups have rewards that differ. The other groups have advantage 0.

    DAPO draws prompts until enough groups have such rewards [paper]. With K rewards per completion, it is enough that
    one of the K differs. A NaN reward does not apply, and is ignored. Rewards that differ by a rounding of fp64, as 0.3
    and 0.1 + 0.2 do, are equal.
    """
    return torch.stack([_has_differing_rewards(to_groups(part, group)) for part in rewards.view(len(group), -1).T]).any(
        0
    )


def _has_differing_rewards(rewards: Float[Tensor, "*S G"]) -> Bool[Tensor, "*S"]:
    """Return whether a group's rewards, ignoring NaN, are not all equal up to rounding."""
    applies = ~rewards.isnan()
    largest = torch.where(applies, rewards, -torch.inf).amax(-1)
    smallest = torch.where(applies, rewards, torch.inf).amin(-1)
    magnitude = torch.maximum(largest.abs(), smallest.abs())
    # False if all are NaN: -inf > inf.
    return (largest > smallest) & ((largest - smallest) > ROUNDING * magnitude)


def _center(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Subtract the group's mean."""
    # Groups of equal rewards are set to 0: their mean may be rounded, which would make advantages nonzero.
    is_centered = _has_differing_rewards(rewards)[..., None] & ~rewards.isnan()
    mean = rewards.nanmean(-1, keepdim=True) if rewards.isnan().any() else rewards.mean(-1, keepdim=True)
    return torch.where(is_centered, rewards - mean, 0)


def _divide(centered: Tensor, scale: Tensor) -> Tensor:
    """Divide, and return 0 where `centered` is 0: equal rewards with eps=0 would divide 0 by 0."""
    return torch.where(centered == 0, 0, centered / scale)


def _std(rewards: Tensor, *, dim: int) -> Tensor:
    """Return the sample standard deviation over an axis; 0 for a single reward."""
    exponent = _max_exponent(torch.where(rewards.isnan(), 0, rewards), dim=dim)
    scaled = torch.ldexp(rewards, -exponent)
    if rewards.isnan().any():
        count = (~rewards.isnan()).sum(dim, keepdim=True)
        squares = (scaled - scaled.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
        return torch.ldexp((squares / (count - 1).clamp(min=1)).sqrt(), exponent)
    correction = 1 if rewards.shape[dim] > 1 else 0  # the deviation of a single reward is 0, not NaN
    return torch.ldexp(scaled.std(dim=dim, keepdim=True, correction=correction), exponent)


def _max_exponent(values: Tensor, *, dim: int) -> Tensor:
    """Return the binary exponent of the largest absolute value.

    Values are scaled by this power of two before they are squared: the scaling is exact, and the squares do not
    underflow.
    """
    return torch.frexp(values.abs().amax(dim, keepdim=True)).exponent
