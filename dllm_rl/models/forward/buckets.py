"""Length buckets: rows of like length go through the model together, without the padding that all of them begin with.

Which rows go together follows from the batch's padding alone, so that whoever runs the same rows, to sample or to
score, sees the same shapes. Padding is never attended to: without it a row's states are the same but for the rounding
of sums over other numbers of columns, and where nothing can be left out they are the same to the bit.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

# A forward costs as much as so many more positions: Python, launches and the reading of the weights. An H200 takes as
# long for 600 positions of an 8B model as for one, and for more of a smaller model; a CPU as long for 100 of a model 96
# wide, and for 10 of one 512 wide.
FORWARD = {"cpu": 128, "cuda": 1024}


@dataclass(frozen=True)
class Bucket:
    """rows: which of the batch, in rising order, on the host. start: the first column that one of them does not pad."""

    rows: Int[Tensor, " R"]
    start: int


def length_buckets(
    starts: Int[Tensor, " B"], columns: int, device: torch.device | str, *, forwards: int = 1
) -> list[Bucket]:
    """The batch in buckets, the longest rows first, as cost least by the rule

        sum over buckets of (rows x columns + forwards x FORWARD[device]).

    starts    each row's first column that is no padding, on the host; columns: of the batch.
    forwards  model calls that a bucket costs for each in which its padding is run: a cache makes them many.

    Rows that all go together keep their columns. Exact, by dynamic programming over the distinct lengths. What
    attention costs beyond a product a column is left out: it speaks for more buckets.
    """
    distinct, count = starts.unique(return_counts=True)  # rising: the longest rows first
    begins, rows_before = distinct.tolist(), [0, *count.cumsum(0).tolist()]
    least = forwards * FORWARD.get(torch.device(device).type, FORWARD["cuda"])
    best, cut = [0], [0]  # of the first n distinct lengths: the cost, and where their last bucket begins
    for end in range(1, len(begins) + 1):
        costs = [best[i] + (rows_before[end] - rows_before[i]) * (columns - begins[i]) + least for i in range(end)]
        best.append(min(costs))
        cut.append(costs.index(best[-1]))
    found, end = [], len(begins)
    while end:
        begin, last = begins[cut[end]], begins[end - 1]
        found.append(Bucket(((starts >= begin) & (starts <= last)).nonzero()[:, 0], begin))
        end = cut[end]
    return found[::-1] if len(found) > 1 else [Bucket(torch.arange(len(starts)), 0)]
