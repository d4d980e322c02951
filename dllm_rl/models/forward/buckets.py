"""Length buckets: rows of similar length go through the model together, without their common padding.

They depend only on the batch's padding, so that sampling and scoring the same rows have the same shapes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

# The fixed cost of a forward (Python, launches, reading weights), in positions. An H200 takes as long for 600 positions
# of an 8B model as for one; a CPU as long for 100 of a model 96 wide, and for 10 of one 512 wide.
FORWARD = {"cpu": 128, "cuda": 1024}


@dataclass(frozen=True)
class Bucket:
    """Rows of similar length.

    Args:
        rows: Indices into the batch, rising, on the host.
        start: First column that some row does not pad.
    """

    rows: Int[Tensor, " R"]
    start: int


def length_buckets(
    starts: Int[Tensor, " B"], columns: int, device: torch.device | str, *, forwards: int = 1
) -> list[Bucket]:
    """Return the buckets, longest rows first, with the least sum of (rows x columns + forwards x FORWARD[device]).

    Args:
        starts: First column of each row that is not padding, on the host.
        columns: Number of columns of the batch.
        device: Device of the model.
        forwards: Number of model calls per bucket, many with a cache.
    """
    # Exact, by dynamic programming over the distinct lengths, without attention's quadratic cost.
    distinct, count = starts.unique(return_counts=True)  # rising: the longest rows first
    begins = distinct.tolist()
    rows_before = [0, *count.cumsum(0).tolist()]
    each = forwards * FORWARD.get(torch.device(device).type, FORWARD["cuda"])
    best = [0]  # for the first n distinct lengths: the cost
    cut = [0]  # and where the last bucket begins
    for end in range(1, len(begins) + 1):
        costs = []
        for begin in range(end):
            costs.append(best[begin] + (rows_before[end] - rows_before[begin]) * (columns - begins[begin]) + each)
        best.append(min(costs))
        cut.append(costs.index(best[-1]))
    found = []
    end = len(begins)
    while end:  # backwards from the shortest rows
        start = begins[cut[end]]
        found.append(Bucket(((starts >= start) & (starts <= begins[end - 1])).nonzero()[:, 0], start))
        end = cut[end]
    # A single bucket keeps all columns, so that its shapes are those of a batch without buckets.
    return found[::-1] if len(found) > 1 else [Bucket(torch.arange(len(starts)), 0)]
