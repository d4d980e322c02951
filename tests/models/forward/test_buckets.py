"""Length buckets: the cheapest grouping of rows, against all groupings there are."""

from itertools import combinations

import pytest
import torch

from dllm_rl.models.base import FORWARD_COST, length_buckets


def cost(groups, starts, columns, least):
    return sum(len(rows) * (columns - min(starts[row] for row in rows)) + least for rows in groups)


def cheapest(starts, columns, least):
    """Over every way to cut the rows, ordered by length: no other grouping can be cheaper."""
    order = sorted(range(len(starts)), key=lambda row: starts[row])
    cuts = (cut for count in range(len(order)) for cut in combinations(range(1, len(order)), count))
    grouped = ([order[i:j] for i, j in zip((0, *cut), (*cut, len(order)), strict=True)] for cut in cuts)
    return min(cost(groups, starts, columns, least) for groups in grouped)


@pytest.mark.parametrize("forwards", [1, 3])
def test_no_grouping_costs_less(forwards):
    generator, sizes = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        starts = torch.randint(0, 300, (8,), generator=generator)
        found = length_buckets(starts, 310, "cpu", forwards=forwards)
        rows = torch.cat([bucket.rows for bucket in found])
        assert rows.sort().values.tolist() == list(range(8))
        begins = sorted(int(starts[bucket.rows].min()) for bucket in found)
        assert [bucket.start for bucket in found] == (begins if len(found) > 1 else [0])
        least = forwards * FORWARD_COST["cpu"]
        groups = [bucket.rows.tolist() for bucket in found]
        assert cost(groups, starts.tolist(), 310, least) == cheapest(starts.tolist(), 310, least)
        sizes.add(len(found))
    assert len(sizes) > 1


def test_rows_of_one_length_stay_one_batch():
    (only,) = length_buckets(torch.full((6,), 7), 4096, "cpu")
    assert only.rows.tolist() == list(range(6)) and only.start == 0, "with all of its columns"


def test_a_device_whose_forwards_cost_more_splits_later():
    """One row of 300 columns beside seven of 100: 7 x 200 = 1,400 positions saved, for a forward more."""
    starts = torch.tensor([0, *[200] * 7])
    assert [bucket.rows.tolist() for bucket in length_buckets(starts, 300, "cpu")] == [[0], [1, 2, 3, 4, 5, 6, 7]]
    assert len(length_buckets(starts, 300, "cuda")) == 2 and len(length_buckets(starts, 300, "cuda", forwards=2)) == 1
