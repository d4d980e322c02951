"""Processes: a process's share of a batch, gathering, reducing; weights that several processes hold between them. With
training/ the one room of accelerate."""

import copy
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dllm_rl.device import find_device

Metrics = dict[str, tuple[Tensor, Tensor]]
BUCKET = 2**25  # gradients that processes sum at once: what is held beside them is two copies of so many


def sum_gradients(module: nn.Module, accelerator: Accelerator, *, mean: bool = False) -> None:
    """Sum gradients over processes: the loss is a sum over the global batch, divided by its global counts already.

    A parameter that no token reached gets zeros, so that the optimiser and the other processes treat it like any other.
    Buckets travel one behind the other: while one does, the next is put together and the last one's sums are put back.
    """
    gradients = []
    for parameter in (p for p in module.parameters() if p.requires_grad):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    count = accelerator.num_processes
    if sharding_of(module) is not None:  # summed in the backward already
        for gradient in gradients if mean else []:
            gradient /= count
    if count == 1 or sharding_of(module) is not None:
        return
    under_way = deque[tuple[list[Tensor], Tensor, Any]]()
    for bucket in buckets(gradients):
        flat = torch.cat([g.flatten() for g in bucket])
        under_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        if len(under_way) == 2:
            put_back(*under_way.popleft(), divisor=count if mean else 1)
    for one in under_way:
        put_back(*one, divisor=count if mean else 1)


def put_back(bucket: list[Tensor], flat: Tensor, work: Any, *, divisor: int) -> None:
    """Wait for a bucket's sums, and write them, divided, over the gradients that it was made of."""
    work.wait()
    if divisor > 1:
        flat /= divisor
    for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def buckets(tensors: Sequence[Tensor], *, numbers: int = BUCKET) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of one dtype and of at most so many numbers together, or of one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(x.numel() for x in bucket) + tensor.numel() > numbers):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def sum_over(counts: Tensor, accelerator: Accelerator) -> Tensor:
    """Counts, summed over processes, on the host."""
    if accelerator.num_processes > 1:
        counts = accelerator.reduce(counts.to(accelerator.device), reduction="sum")
    return counts.cpu()


def reduce_metrics(metrics: Metrics, accelerator: Accelerator) -> dict[str, float]:
    """(sum, count) pairs, all on one device -> sums over processes, divided once; they are fetched in one transfer.

    A metric that counted nothing is left out.
    """
    if not metrics:
        return {}
    pairs = torch.stack([torch.stack([s.detach().double(), c.double()]) for s, c in metrics.values()])
    if accelerator.num_processes > 1:
        pairs = accelerator.reduce(pairs.to(accelerator.device), reduction="sum")
    pairs = pairs.cpu()
    # The loss is a sum of shares; everything else is a mean.
    return {
        name: (total if name == "loss" else total / count).item()
        for name, (total, count) in zip(metrics, pairs, strict=True)
        if count
    }


def waited(stage: str, accelerator: Accelerator) -> Metrics:
    """waiting/STAGE: the seconds that a process, done with its own work, waits here for the slowest; their mean over
    processes is `reduce_metrics`' to take. Nothing with one process."""
    if accelerator.num_processes == 1:
        return {}
    if accelerator.device.type != "cpu":
        torch.accelerator.synchronize(accelerator.device)
    begin = time.perf_counter()
    accelerator.wait_for_everyone()
    spent = torch.tensor([time.perf_counter() - begin, 1.0], dtype=torch.double, device=accelerator.device)
    return {f"waiting/{stage}": (spent[0], spent[1])}


def launched() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def make_accelerator(
    *,
    timeout: float | None = None,
    device: torch.device | None = None,
    log_with: Sequence[str] = (),
    directory: str | None = None,
) -> Accelerator:
    """The launch's processes and device. Raises RuntimeError when Accelerate does not see all processes launched or did
    not launch all, or is on another kind of device, which it keeps from the first Accelerator of a process on.

    timeout  seconds that a process waits for the others in an exchange before it stops; None: torch's own.
    log_with, directory  trackers by Accelerate's names, and the folder that tensorboard's events go below.
    device   the kind of device; None: the CPU where the launch's config says so, else that of `find_device`.
    """
    limits = [] if timeout is None else [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))]
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # what a launch's config with use_cpu sets
    wanted = device if device is not None else torch.device("cpu") if on_cpu else find_device()
    # Accelerate joins the processes of a CPU launch only when told that there is no accelerator.
    accelerator = Accelerator(
        cpu=wanted.type == "cpu",
        mixed_precision="no",
        kwargs_handlers=limits,
        log_with=list(log_with) or None,
        project_config=ProjectConfiguration(logging_dir=directory),
    )
    if accelerator.num_processes != launched():
        raise RuntimeError(
            f"{launched()} processes were launched, but Accelerate joined {accelerator.num_processes}: check the config"
        )
    if on_cpu and accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise RuntimeError(
            "Accelerate was asked for several CPU processes and started one, as it does with --cpu: give it a config "
            "with distributed_type: MULTI_GPU and use_cpu: true, like recipes/accelerate/cpu_2.yaml"
        )
    if accelerator.device.type != wanted.type:
        raise RuntimeError(
            f"device={wanted.type} is wanted, but Accelerate is on {accelerator.device}, as an earlier Accelerator of "
            "this process was made to be: start a new process"
        )
    return accelerator


@dataclass(frozen=True)
class Sharding:
    """How a module's weights lie on the processes, as its attribute `sharding`: see `shard`.

    backbone, heads  its units that are called from outside; the blocks are units of their own inside the backbone.
    plain  the module's layers on the meta device, to be copied in its place.
    group  all processes, on the host, who exchange numbers of it without a wait for the device.
    """

    backbone: Any
    heads: list[Any]
    plain: Any
    group: Any

    def anyone(self, mine: bool) -> bool:
        """Whether it is true of any process; an exchange."""
        number = torch.tensor(int(mine))
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.group)
        return bool(number)


def sharding_of(module: Any) -> Sharding | None:
    """How the module's weights are shared out; None where this process holds them whole."""
    return getattr(module, "sharding", None)


def shard(
    module: Any, blocks: Sequence[nn.Module], accelerator: Accelerator, *, size: int, timeout: float | None = None
) -> None:
    """Share the weights out, in place, by torch's FSDP2: groups of `size` processes, which follow one another, hold the
    module between them (`size` below the number of processes: HSDP). Gradients and optimiser state follow the weights.

    The module may lie on the host: a unit at a time goes to the device, whole. Units are the blocks, the backbone's
    other weights, and each head, which stays whole for the time of an `in_pace` block, so that log-probs in chunks do
    not gather it chunk by chunk. Gradients are summed over all processes in every backward: kept whole until the last
    one, as FSDP2 can, they alone would take as much as a quarter of what one process holds in all.

    timeout  seconds that a process waits for another in `in_pace`; None: torch's own.
    """
    count, device = accelerator.num_processes, accelerator.device.type
    hybrid = {"mesh_shape": (count // size, size), "mesh_dim_names": ("replicate", "shard")}
    mesh = init_device_mesh(device, **(hybrid if size < count else {"mesh_shape": (count,)}))
    meta = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    plain, backbone = copy.deepcopy(module, meta), getattr(module, module.base_model_prefix)
    heads = [child for child in module.children() if child is not backbone and any(True for _ in child.parameters())]
    for unit in [*blocks, backbone]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for head in heads:
        fully_shard(head, mesh=mesh, reshard_after_forward=False)
    for unit in (each for each in module.modules() if isinstance(each, FSDPModule)):
        unit.set_gradient_divide_factor(1.0)  # the loss is a sum over the global batch already
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    module.to(accelerator.device)  # buffers
    group = dist.new_group(backend="gloo", timeout=None if timeout is None else timedelta(seconds=timeout))
    module.sharding = Sharding(backbone, heads, plain, group)


def swap(sent: Sequence[tuple[int, Tensor]], wanted: Sequence[tuple[int, Tensor]]) -> None:
    """Exchange (rank, tensor) pairs: send those of `sent`, and receive into those of `wanted`. At most one tensor per
    direction and pair of ranks; shapes are known before."""
    sends = [dist.P2POp(dist.isend, tensor.contiguous(), process) for process, tensor in sent]
    receives = [dist.P2POp(dist.irecv, tensor, process) for process, tensor in wanted]
    for work in dist.batch_isend_irecv([*sends, *receives]):
        work.wait()


def part_like(value: Any, tensor: Tensor) -> Any:
    """This process's part of a whole tensor, laid out as `tensor` is; the value itself where that is held whole."""
    if not isinstance(tensor, DTensor) or value.shape != tensor.shape:
        return value
    mine = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local().clone()
    return DTensor.from_local(
        mine, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@contextmanager
def in_pace(policy: Any, *, backward: bool = False) -> Iterator[None]:
    """For the time of the block each process runs a sharded policy as often as its own rows ask for; every forward has
    a backward where `backward` is set, and runs without gradients elsewhere. All processes enter and leave together.
    Nothing happens with a policy that each process holds whole.

    A forward of sharded weights is an exchange of all processes. Each says so before its forwards, and one that has
    left the block runs a forward of a single token, of no weight in any gradient, as long as another goes on.
    """
    shards = sharding_of(policy.module)
    if shards is None:
        yield
        return
    for head in shards.heads:
        head.unshard()
        head.set_requires_gradient_sync(False)
        head.set_reshard_after_backward(False)
    comes = shards.backbone.register_forward_pre_hook(lambda *_: shards.anyone(True) and None, prepend=True)
    try:
        yield
    finally:
        comes.remove()
    token = torch.zeros(1, 1, dtype=torch.long, device=policy.device)
    with torch.set_grad_enabled(backward):
        while shards.anyone(False):
            states = policy.hidden(token, token == 0)
            if backward:
                states.backward(torch.zeros_like(states))
        for head in shards.heads:
            head.set_requires_gradient_sync(True)
            head.set_reshard_after_backward(True)
        if backward:  # the heads' gradients of all chunks are summed over processes at once
            weight = next(policy.module.parameters())
            leaf = torch.zeros(1, policy.module.config.hidden_size, dtype=weight.dtype, device=policy.device)
            logits = policy.head(leaf.requires_grad_())
            logits.backward(torch.zeros_like(logits))
    for head in shards.heads:
        head.reshard()


@dataclass(frozen=True)
class OneProcess:
    """What an Accelerator says of its processes, where there is one and nothing was launched."""

    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True

    def wait_for_everyone(self) -> None:
        """Nothing to wait for."""


Processes: TypeAlias = Accelerator | OneProcess


def gather_objects(objects: list[Any], processes: Processes) -> list[Any]:
    """The lists of all processes, joined; every process gets the whole."""
    return objects if processes.num_processes == 1 else gather_object(objects)


def local(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """This process's share of a tensor whose first axis runs over the global batch."""
    return rows.chunk(accelerator.num_processes)[accelerator.process_index]


def gather_on_host(parts: Sequence[Tensor], accelerator: Accelerator) -> list[Tensor]:
    """Tensors (B, T) of this process -> those of all processes' rows, on the host, in one transfer.

    They travel in fp64, which holds masks, token ids and fp32 exactly. Narrower ones end in zeros.
    """
    together = torch.stack([part.double() for part in parts], dim=1)
    if accelerator.num_processes > 1:
        together = accelerator.gather(accelerator.pad_across_processes(together.to(accelerator.device), dim=2))
    return [x.to(part.dtype) for x, part in zip(together.cpu().unbind(1), parts, strict=True)]


def from_main(work: Callable[[], Any], processes: Processes) -> Any:
    """What `work` returns in the main process, in every process; or the error that it raises there, in every process,
    so that none waits for one that stopped."""
    if processes.num_processes == 1:
        return work()
    outcome: list[Any] = [None, None]
    if processes.is_main_process:
        try:
            outcome[0] = work()
        except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """Where a number was measured: versions, device, cores, threads."""
    device = (
        torch.cuda.get_device_name()
        if accelerator.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {"versions": versions(), "device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str | None]:
    """Of this library and of those whose numbers it depends on; None where one is not installed."""
    found: dict[str, str | None] = {}
    for package in ("dllm_rl", "torch", "transformers", "accelerate", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
