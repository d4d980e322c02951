"""Collectives: a process's share of a batch, gathering, reducing."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
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

from dllm_rl.device import device_name, find_device
from dllm_rl.distributed.sharding import sharding_of
from dllm_rl.versions import versions

Metrics = dict[str, tuple[Tensor, Tensor]]
BUCKET = 2**25  # numbers per bucket of gradients: memory for two buckets is enough


def sum_gradients(module: nn.Module, accelerator: Accelerator, *, mean: bool = False) -> None:
    """Sum gradients over processes, in place. mean: divide by their number, for a loss that each process averaged over
    its own rows; otherwise the loss is divided by global counts already.
    """
    gradients = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # no token of this process reached it
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    divisor = accelerator.num_processes if mean else 1
    if sharding_of(module) is None and accelerator.num_processes > 1:
        sum_buckets(gradients, divisor)
    elif divisor > 1:  # the backward of a sharded module has summed them
        for gradient in gradients:
            gradient /= divisor


def sum_buckets(gradients: Sequence[Tensor], divisor: int) -> None:
    """Sum in place; one bucket travels while the next is packed."""
    under_way = deque[tuple[list[Tensor], Tensor, Any]]()
    for bucket in buckets(gradients):
        flat = torch.cat([g.flatten() for g in bucket])
        under_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        if len(under_way) == 2:
            put_back(*under_way.popleft(), divisor=divisor)
    for one in under_way:
        put_back(*one, divisor=divisor)


def put_back(bucket: list[Tensor], flat: Tensor, work: Any, *, divisor: int) -> None:
    work.wait()
    if divisor > 1:
        flat /= divisor
    for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def buckets(tensors: Sequence[Tensor], *, numbers: int = BUCKET) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of one dtype and at most `numbers` numbers, or of one larger tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        # One exchange has one dtype.
        if bucket and (tensor.dtype != bucket[0].dtype or sum(x.numel() for x in bucket) + tensor.numel() > numbers):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def sum_over(counts: Tensor, accelerator: Accelerator) -> Tensor:
    if accelerator.num_processes > 1:
        counts = accelerator.reduce(counts.to(accelerator.device), reduction="sum")
    return counts.cpu()


def reduce_metrics(metrics: Metrics, accelerator: Accelerator) -> dict[str, float]:
    """(sum, count) pairs on one device -> means over all processes, in one transfer."""
    if not metrics:
        return {}
    pairs = torch.stack([torch.stack([s.detach().double(), c.double()]) for s, c in metrics.values()])
    means = {}
    for name, (total, count) in zip(metrics, sum_over(pairs, accelerator), strict=True):
        if count:  # else nothing was measured
            means[name] = (total if name == "loss" else total / count).item()  # the loss is a sum of shares
    return means


def wait_metrics_of(stage: str, accelerator: Accelerator) -> Metrics:
    """waiting/STAGE: the seconds that this process waits here for the slowest. Empty with one process."""
    if accelerator.num_processes == 1:
        return {}
    if accelerator.device.type != "cpu":
        torch.accelerator.synchronize(accelerator.device)  # the device's own work is no wait
    begin = time.perf_counter()
    accelerator.wait_for_everyone()
    spent = torch.tensor([time.perf_counter() - begin, 1.0], dtype=torch.double, device=accelerator.device)
    return {f"waiting/{stage}": (spent[0], spent[1])}


def num_launched() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def make_accelerator(
    *,
    timeout: float | None = None,  # seconds that a process waits in an exchange; None: torch's default
    device: torch.device | None = None,  # its kind; None: the CPU if the launch asks for it, else `find_device`
    log_with: Sequence[str] = (),  # trackers, by Accelerate's names
    directory: str | None = None,  # parent of tensorboard's events
) -> Accelerator:
    """The launch's processes and device. Raises ValueError if Accelerate has others: a setting of
    the launch is wrong.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # what a launch's config with use_cpu sets
    wanted = device if device is not None else torch.device("cpu") if on_cpu else find_device()
    # Accelerate joins the processes of a CPU launch only when told that there is no accelerator.
    accelerator = Accelerator(
        cpu=wanted.type == "cpu",
        mixed_precision="no",
        kwargs_handlers=[] if timeout is None else [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
        log_with=list(log_with) or None,
        project_config=ProjectConfiguration(logging_dir=directory),
    )
    if accelerator.num_processes != num_launched():
        raise ValueError(
            f"{num_launched()} processes were launched, but Accelerate joined {accelerator.num_processes}: check the "
            "config"
        )
    if on_cpu and accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "Accelerate was asked for several CPU processes and started one, as it does with --cpu: give it a config "
            "with distributed_type: MULTI_GPU and use_cpu: true, like recipes/accelerate/cpu_2.yaml"
        )
    if accelerator.device.type != wanted.type:
        raise ValueError(
            f"device={wanted.type} is wanted, but Accelerate is on {accelerator.device}, as an earlier Accelerator of "
            "this process was made to be: start a new process"
        )
    return accelerator


def swap(sent: Sequence[tuple[int, Tensor]], wanted: Sequence[tuple[int, Tensor]]) -> None:
    """Send the (rank, tensor) pairs `sent` and receive into `wanted`: at most one tensor per direction and rank."""
    transfers = [dist.P2POp(dist.isend, tensor.contiguous(), process) for process, tensor in sent]
    transfers += [dist.P2POp(dist.irecv, tensor, process) for process, tensor in wanted]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()


@dataclass(frozen=True)
class OneProcess:
    """An Accelerator's fields for a single process without a launcher."""

    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True

    def wait_for_everyone(self) -> None:
        """Nothing to wait for."""


Processes: TypeAlias = Accelerator | OneProcess


def gather_objects(objects: list[Any], processes: Processes) -> list[Any]:
    return objects if processes.num_processes == 1 else gather_object(objects)


def local(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """This process's share of a tensor whose first axis runs over the global batch."""
    return rows.chunk(accelerator.num_processes)[accelerator.process_index]


def gather_on_host(parts: Sequence[Tensor], accelerator: Accelerator) -> list[Tensor]:
    """Tensors (B, T) of this process -> the rows of all processes, on the host; narrower rows are padded with zeros."""
    # fp64 holds masks, token ids and fp32 exactly: one transfer is enough.
    together = torch.stack([part.double() for part in parts], dim=1)
    if accelerator.num_processes > 1:
        together = accelerator.gather(accelerator.pad_across_processes(together.to(accelerator.device), dim=2))
    return [x.to(part.dtype) for x, part in zip(together.cpu().unbind(1), parts, strict=True)]


def from_main(work: Callable[[], Any], processes: Processes) -> Any:
    """What `work` returns in the main process, in every process. Every process raises the main one's error."""
    if processes.num_processes == 1:
        return work()
    outcome: list[Any] = [None, None]
    if processes.is_main_process:
        try:
            outcome[0] = work()
        except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
            outcome[1] = error  # raised below, so that no process waits for one that has left
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """Where a number was measured: versions, device, cores, threads."""
    counts = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"versions": versions(), "device": device_name(accelerator.device), **counts}
