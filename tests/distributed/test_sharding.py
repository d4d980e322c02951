"""Sharded weights in one process; several processes are in tests/training/test_sharded_learner.py."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dllm_rl.distributed.sharding import part_like, sharding_of


@pytest.fixture
def alone():
    """A group of one process."""
    if dist.is_initialized():
        pytest.skip("another test's group")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_part_is_sharded_as_its_weight_and_holds_the_values(alone):
    weight = distribute_tensor(torch.zeros(4, 3), alone, [Shard(0)])
    value = torch.arange(12.0).reshape(4, 3)
    part = part_like(value, weight)
    assert isinstance(part, DTensor) and part.placements == weight.placements
    assert torch.equal(part.full_tensor(), value) and part.to_local().data_ptr() != value.data_ptr()
    step = torch.tensor(3.0)
    assert part_like(step, weight) is step, "a number is the same in all processes"


def test_without_sharding_a_value_is_itself():
    value = torch.ones(3)
    assert part_like(value, torch.zeros(3)) is value and sharding_of(nn.Linear(2, 2)) is None
