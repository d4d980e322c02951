"""Shard weights over processes with PyTorch's FSDP2."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class Sharding:
    """How a module's weights are sharded. `shard` sets it as the module's attribute `sharding`.

    Args:
        backbone: The module without its heads.
        heads: Heads, which are called separately from the backbone.
        plain: Copy of the unsharded module on the meta device. A sharded module cannot be copied, but this one can.
        group: Process group of all processes with gloo, whose collectives on CPU tensors do not wait for the GPU.
    """

    backbone: Any
    heads: list[Any]
    plain: Any
    group: Any

    def anyone(self, mine: bool) -> bool:
        """Return whether `mine` is true in any process. Collective."""
        number = torch.tensor(int(mine))
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.group)
        return bool(number)


def sharding_of(module: Any) -> Sharding | None:
    return getattr(module, "sharding", None)


def shard(
    module: Any, blocks: Sequence[nn.Module], accelerator: Accelerator, *, size: int, timeout: float | None = None
) -> None:
    """Shard a module's weights, gradients and optimizer state in place.

    Args:
        module: Module to shard.
        blocks: Transformer blocks, each a separate FSDP unit.
        accelerator: Processes and device.
        size: Number of consecutive processes that share one copy of the weights. If it is less than the number of
            processes, every group of `size` processes has a full copy (HSDP).
        timeout: Seconds that a process waits in `Sharding.anyone`. None (default): torch's default.
    """
    count = accelerator.num_processes
    hybrid = {"mesh_shape": (count // size, size), "mesh_dim_names": ("replicate", "shard")}
    mesh = init_device_mesh(accelerator.device.type, **(hybrid if size < count else {"mesh_shape": (count,)}))
    meta = {}
    for weight in module.parameters():
        meta[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    plain = copy.deepcopy(module, meta)
    backbone = getattr(module, module.base_model_prefix)
    heads = [child for child in module.children() if child is not backbone and list(child.parameters())]
    for unit in [*blocks, backbone]:  # moves one full unit at a time from the CPU to the device
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for head in heads:
        fully_shard(head, mesh=mesh, reshard_after_forward=False)
    # Gradients are reduced in every backward, not only in the last of a step: accumulating unsharded gradients would
    # need up to a quarter of the memory of an unsharded run.
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)  # the loss is a sum over the global batch already
            unit.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction
    module.to(accelerator.device)  # buffers
    group = dist.new_group(backend="gloo", timeout=None if timeout is None else timedelta(seconds=timeout))
    module.sharding = Sharding(backbone, heads, plain, group)


def part_like(value: Any, tensor: Tensor) -> Any:
    """Shard a full tensor like `tensor`. Return `value` unchanged if `tensor` is not sharded or has another shape."""
    if not isinstance(tensor, DTensor) or value.shape != tensor.shape:
        return value
    mine = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local().clone()
    return DTensor.from_local(
        mine, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
