"""Weights sharded over processes, by torch's FSDP2."""

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
    """How a module's weights are sharded; its attribute `sharding`."""

    backbone: Any  # called from outside, as each head is
    heads: list[Any]
    plain: Any  # layers on the meta device, to be copied in the module's place
    group: Any  # all processes, on gloo: an exchange of numbers on the host does not wait for the device

    def anyone(self, mine: bool) -> bool:
        """Whether `mine` is true in any process; an exchange."""
        number = torch.tensor(int(mine))
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.group)
        return bool(number)


def sharding_of(module: Any) -> Sharding | None:
    return getattr(module, "sharding", None)


def shard(
    module: Any, blocks: Sequence[nn.Module], accelerator: Accelerator, *, size: int, timeout: float | None = None
) -> None:
    """Shard weights, gradients and state over `size` consecutive processes (HSDP: several groups), unit by unit. A
    process waits `timeout` seconds in `Sharding.anyone`, by default as long as torch does.
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
    for unit in [*blocks, backbone]:  # one full unit at a time goes from the host to the device
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for head in heads:
        fully_shard(head, mesh=mesh, reshard_after_forward=False)
    # Gradients are summed in every backward: kept unsharded, they take up to a quarter of what an unsharded run holds.
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)  # the loss is a sum over the global batch already
            unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    module.to(accelerator.device)  # buffers
    group = dist.new_group(backend="gloo", timeout=None if timeout is None else timedelta(seconds=timeout))
    module.sharding = Sharding(backbone, heads, plain, group)


def part_like(value: Any, tensor: Tensor) -> Any:
    """This process's part of a full tensor, sharded as `tensor` is; the value itself where `tensor` is not sharded."""
    if not isinstance(tensor, DTensor) or value.shape != tensor.shape:
        return value
    mine = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local().clone()
    return DTensor.from_local(
        mine, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
