"""Groups of adjacent rows that share a prompt."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def equal_groups(num_groups: int, num_generations: int) -> Int[Tensor, " B"]:
    """Return the group of each row for groups of equal size: 0, 0, ..., 1, 1, ..."""
    return torch.arange(num_groups).repeat_interleave(num_generations)


def starts_group(group: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Return which rows are the first of their group."""
    return group.diff(prepend=group[:1] - 1) != 0


def group_numbers(group: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Return the number of each row's group, counted from 0 in the order of the rows."""
    return starts_group(group).long().cumsum(0) - 1


def group_sizes(group: Int[Tensor, " B"]) -> list[int]:
    """Return the number of rows of each group."""
    return group.unique_consecutive(return_counts=True)[1].tolist()


def any_in_group(flags: Bool[Tensor, " B"], group: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Return for each row whether a flag of any row of its group is set."""
    number = group_numbers(group)
    return torch.zeros_like(number).scatter_reduce(0, number, flags.long(), "amax").bool()[number]
