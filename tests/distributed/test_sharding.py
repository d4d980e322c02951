"""Sharded weights in one process; several processes are in tests/training/test_sharded_learner.py."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from tiny_recipe import SIZES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dllm_rl.distributed.sharding import part_like, shard, sharding_of
from dllm_rl.models.forward.blocks import blocks_of
from dllm_rl.models.tiny import tiny_masked_lm


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


@pytest.fixture
def fourth_of_six(monkeypatch):
    """The accelerator of process 3 of six; the other five are torch's fakes, with which nothing is exchanged."""
    if dist.is_initialized():
        pytest.skip("another test's group")
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=6)
    monkeypatch.setattr(dist, "new_group", lambda **given: given)  # gloo's own would call the others
    monkeypatch.setattr(Accelerator, "num_processes", 6)
    yield Accelerator(cpu=True)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("size", "groups", "placements"),
    [
        (2, [[1, 3, 5], [2, 3]], (Replicate(), Shard(0))),
        (3, [[0, 3], [3, 4, 5]], (Replicate(), Shard(0))),
        (6, [[0, 1, 2, 3, 4, 5]], (Shard(0),)),
    ],
)
@pytest.mark.repeated
def test_neighbors_hold_the_shards_and_each_group_of_them_all_weights(fourth_of_six, size, groups, placements):
    """Processes of one machine have consecutive numbers: gathering weights is what must be fast."""
    module = tiny_masked_lm(**SIZES).module
    shard(module, blocks_of(module), fourth_of_six, size=size, timeout=7.0)
    weight = module.lm_head.dense.weight
    assert (weight.shape, weight.to_local().shape) == ((32, 32), (-(-32 // size), 32))
    mesh = weight.device_mesh
    assert weight.placements == placements
    assert [dist.get_process_group_ranks(mesh.get_group(axis)) for axis in range(mesh.ndim)] == groups
    assert module.sharding.group == {"backend": "gloo", "timeout": timedelta(seconds=7)}
