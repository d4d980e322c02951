"""Length buckets: rows of like length go through the model together, without the padding that all of them begin with.

Which rows go together follows from the batch's padding alone, so that whoever runs the same rows, to sample or to
score, sees the same shapes. Padding is never attended to: without it a row's states are the same but for the rounding
of sums over other numbers of columns, and where nothing can be left out they are the same to the bit.
"""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from dllm_rl.models.base import Policy

# What a forward costs beside its products, as so many multiplications by a matrix of hidden x hidden for a position of
# hidden size 1: Python and launches, a block's on a CPU about 0.4 ms. An H200 takes as long for 600 positions of an 8B
# model (4096 wide) as for one.
FORWARD = {"cpu": 2**20, "cuda": 2**34}
LEAST = 16  # positions: a product of fewer rows is no faster


@dataclass(frozen=True)
class Bucket:
    """rows: which of the batch, in rising order, on the host. start: the first column that one of them does not pad."""

    rows: Int[Tensor, " R"]
    start: int


def forward_cost(policy: Policy) -> int:
    """So many more positions cost as much as a forward more: FORWARD[device] / hidden size ** 2. A module without a
    config is taken for one of 512."""
    width = getattr(getattr(policy.module, "config", None), "hidden_size", 512)
    return max(LEAST, FORWARD.get(policy.device.type, FORWARD["cuda"]) // width**2)


def length_buckets(starts: Int[Tensor, " B"], columns: int, *, forward: int) -> list[Bucket]:
    """The batch in buckets, the longest rows first, as cost least by the rule

        sum over buckets of (rows x columns + forward).

    starts   each row's first column that is no padding, on the host; columns: of the batch.
    forward  positions that a bucket more costs as much as (`forward_cost`; with a cache, in each step of a block).

    Exact, by dynamic programming over the distinct lengths. What attention costs beyond a product a column is left out:
    it speaks for more buckets.
    """
    distinct, count = starts.unique(return_counts=True)  # rising: the longest rows first
    begins, rows_before = distinct.tolist(), [0, *count.cumsum(0).tolist()]
    best, cut = [0], [0]  # of the first n distinct lengths: the cost, and where their last bucket begins
    for end in range(1, len(begins) + 1):
        costs = [best[i] + (rows_before[end] - rows_before[i]) * (columns - begins[i]) + forward for i in range(end)]
        best.append(min(costs))
        cut.append(costs.index(best[-1]))
    found, end = [], len(begins)
    while end:
        begin, last = begins[cut[end]], begins[end - 1]
        found.append(Bucket(((starts >= begin) & (starts <= last)).nonzero()[:, 0], begin))
        end = cut[end]
    return found[::-1]
