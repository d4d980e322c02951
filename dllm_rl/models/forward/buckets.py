"""Length buckets: rows of similar length go through the model together, without their common padding.

Buckets depend only on the batch's padding, so that sampling and scoring the same rows use the same shapes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

# The fixed cost of a forward (Python, kernel launches, reading weights), as a number of positions. An H200 takes the
# same time for 600 positions of an 8B model as for one. A CPU takes the same time for 100 positions as for one with a
# model of width 96, and for 10 positions with width 512.
FORWARD_COST = {"cpu": 128, "cuda": 1024}


@dataclass(frozen=True)
class Bucket:
    """Rows of similar length.

    Args:
        rows: Indices into the batch, in ascending order, on the CPU.
        start: First column that is not padding in every row.
    """

    rows: Int[Tensor, " R"]
    start: int


def length_buckets(
    starts: Int[Tensor, " B"], columns: int, device: torch.device | str, *, forwards: int = 1
) -> list[Bucket]:
    """Divide rows into buckets with the least total cost, and return the bucket of the longest rows first.

    The cost of a bucket is rows * columns + forwards * FORWARD_COST.

    Args:
        starts: First column of each row that is not padding, on the CPU.
        columns: Number of columns of the batch.
        device: Device of the model.
        forwards: Number of model calls per bucket; with a cache it is the number of steps.
    """
    # The minimum is exact, by dynamic programming over the distinct starts. Attention's quadratic cost is not counted.
    unique_starts, counts = starts.unique(return_counts=True)  # in ascending order: the longest rows first
    distinct = unique_starts.tolist()
    rows_before = [0, *counts.cumsum(0).tolist()]
    fixed_cost = forwards * FORWARD_COST.get(torch.device(device).type, FORWARD_COST["cuda"])
    least_cost = [0]  # least_cost[n]: least total cost of the rows with the first n distinct starts
    last_begin = [0]  # last_begin[n]: index of the distinct start at which the last of their buckets begins
    for end in range(1, len(distinct) + 1):
        costs = []
        for begin in range(end):
            rows = rows_before[end] - rows_before[begin]
            costs.append(least_cost[begin] + rows * (columns - distinct[begin]) + fixed_cost)
        least_cost.append(min(costs))
        last_begin.append(costs.index(least_cost[-1]))
    buckets = []
    end = len(distinct)
    while end:  # backwards from the shortest rows
        start = distinct[last_begin[end]]
        buckets.append(Bucket(((starts >= start) & (starts <= distinct[end - 1])).nonzero()[:, 0], start))
        end = last_begin[end]
    # A single bucket has all columns, so that its shapes are those of a batch without buckets.
    return buckets[::-1] if len(buckets) > 1 else [Bucket(torch.arange(len(starts)), 0)]
