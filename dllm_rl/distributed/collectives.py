"""Collectives over the processes of a run, and each process's share of a batch.

`SumsAndCounts` maps a name to (sum, count); `reduce_metrics` divides after it has summed both over all processes.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
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

SumsAndCounts = dict[str, tuple[Tensor, Tensor]]
BUCKET = 2**25  # elements of a bucket of gradients; at most two buckets are in memory
Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def collective(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """Mark a function that every process must call, and all in the same order: a process that leaves it out would let
    the others wait for it.

    With TORCH_DISTRIBUTED_DEBUG=DETAIL, torch's own switch, the processes tell each other in its main thread which
    function they enter, and raise RuntimeError with the names if they differ.
    """

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        is_debugged = dist.is_initialized() and dist.get_debug_level() == dist.DebugLevel.DETAIL
        is_alone = any(isinstance(value, OneProcess) for value in args)
        # Other threads have process groups of their own.
        if is_debugged and not is_alone and threading.current_thread() is threading.main_thread():
            check_same_name(function.__qualname__)
        return function(*args, **kwargs)

    return call


def check_same_name(name: str) -> None:
    """Raise RuntimeError if the processes enter different collectives."""
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, name)
    if len({*names}) > 1:
        entered = ", ".join(f"process {rank}: {each}" for rank, each in enumerate(names))
        raise RuntimeError(f"the processes entered different collectives: {entered}")


@collective
def sum_gradients(module: nn.Module, processes: "Processes") -> None:
    """Sum gradients over all processes, in place. The backward of a sharded module has summed them already."""
    gradients = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # unused by the tokens of this process, for example an expert
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    if processes.num_processes > 1 and sharding_of(module) is None:
        sum_buckets(gradients)


def sum_buckets(gradients: Sequence[Tensor]) -> None:
    """Sum tensors over all processes, in place. Packing overlaps with communication."""
    pending = deque[tuple[list[Tensor], Tensor, Any]]()
    for bucket in buckets(gradients):
        flat = torch.cat([g.flatten() for g in bucket])
        pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        if len(pending) == 2:
            unpack(*pending.popleft())
    for reduction in pending:
        unpack(*reduction)


def unpack(bucket: list[Tensor], flat: Tensor, work: Any) -> None:
    """Wait for the sum `flat` of a bucket, and copy it to the bucket's tensors."""
    work.wait()
    for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def buckets(tensors: Sequence[Tensor], *, numbers: int = BUCKET) -> Iterator[list[Tensor]]:
    """Yield the tensors in order, in lists of one dtype and at most `numbers` elements. A larger tensor is alone."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(x.numel() for x in bucket) + tensor.numel() > numbers):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def sum_over(counts: Tensor, accelerator: "Processes") -> Tensor:
    """Return the sum over all processes, on the CPU."""
    if not isinstance(accelerator, OneProcess) and accelerator.num_processes > 1:
        counts = accelerator.reduce(counts.to(accelerator.device), reduction="sum")
    return counts.cpu()


@collective
def reduce_metrics(metrics: SumsAndCounts, accelerator: "Processes", *, shares: Sequence[str] = ()) -> dict[str, float]:
    """Return the means of (sum, count) pairs over all processes, without metrics whose count is 0.

    The sums of the metrics named in `shares` are each process's share of the value, and are not divided.
    """
    if not metrics:
        return {}
    pairs = torch.stack([torch.stack([s.detach().double(), c.double()]) for s, c in metrics.values()])
    means = {}
    for name, (total, count) in zip(metrics, sum_over(pairs, accelerator), strict=True):
        if count:
            means[name] = (total if name in shares else total / count).item()
    return means


def wait_metrics_of(stage: str, accelerator: Accelerator) -> SumsAndCounts:
    """Wait for all processes; return the seconds as metric waiting/STAGE. Return {} if there is only one process."""
    if accelerator.num_processes == 1:
        return {}
    if accelerator.device.type != "cpu":
        torch.accelerator.synchronize(accelerator.device)  # so that queued GPU work does not count as waiting
    begin = time.perf_counter()
    accelerator.wait_for_everyone()
    spent = torch.tensor([time.perf_counter() - begin, 1.0], dtype=torch.double, device=accelerator.device)
    return {f"waiting/{stage}": (spent[0], spent[1])}


def num_launched() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def make_accelerator(
    *,
    timeout: float | None = None,
    device: torch.device | None = None,
    log_with: Sequence[str] = (),
    directory: str | None = None,
) -> Accelerator:
    """Return the Accelerator of this launch.

    Args:
        timeout: Seconds that a process waits in a collective. None (default): torch's default.
        device: Device whose type to use. None (default): the CPU if the launch requests it, else `find_device`.
        log_with: Trackers, by Accelerate's names.
        directory: Parent folder of tensorboard's events.

    Raises:
        ValueError: Accelerate joined other processes or chose another device, because a launch setting is wrong.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # set by Accelerate's launcher if its config has use_cpu
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
            f"device={wanted.type} was requested, but Accelerate is on {accelerator.device}, as an earlier Accelerator "
            "of this process is: start a new process"
        )
    return accelerator


@dataclass(frozen=True)
class OneProcess:
    """The fields of an Accelerator that evaluation and supervised steps need, for one process without a launcher."""

    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True

    def wait_for_everyone(self) -> None:
        """Do nothing."""


Processes: TypeAlias = Accelerator | OneProcess


def gather_objects(objects: list[Any], processes: Processes) -> list[Any]:
    """Return the concatenated lists of all processes, in every process."""
    return objects if processes.num_processes == 1 else gather_object(objects)


@collective
def check_same(values: dict[str, str], processes: Processes) -> None:
    """Raise ValueError, in every process, for the first value that differs between the processes."""
    of_processes = gather_objects([values], processes)
    for name in of_processes[0]:
        for index, others in enumerate(of_processes):
            if others.get(name) != of_processes[0][name]:
                texts = [str(each.get(name)) for each in (of_processes[0], others)]
                at = next((i for i, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), 0)
                first, other = (f"...{text[at - 30 : at + 50]}" if at > 30 else text[:80] for text in texts)
                raise ValueError(
                    f"{name} differs between the processes of the run, which must train alike: {first} in process 0, "
                    f"and {other} in process {index}; give all of them the same, and seed what is drawn"
                )


def local(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """Return this process's rows of a tensor with the rows of all processes."""
    return rows.chunk(accelerator.num_processes)[accelerator.process_index]


@collective
def gather_on_host(
    parts: Sequence[Tensor], accelerator: Accelerator, counts: Sequence[int] | None = None
) -> list[Tensor]:
    """Gather tensors (B, T) from all processes on the CPU. Processes with a smaller T are padded with zeros.

    Args:
        parts: Tensors of this process, with the same T.
        accelerator: Processes.
        counts: Number of rows of each process. None (default): all have the same.
    """
    # fp64 represents masks, token ids and fp32 exactly, so that one gather is enough for all tensors.
    stacked = torch.stack([part.double() for part in parts], dim=1)
    if accelerator.num_processes > 1:
        stacked = accelerator.pad_across_processes(stacked.to(accelerator.device), dim=2)
        most = max(counts or [len(stacked)])
        stacked = accelerator.gather(F.pad(stacked, (0, 0) * (stacked.dim() - 1) + (0, most - len(stacked))))
        if counts is not None:
            stacked = torch.cat([rows[:count] for rows, count in zip(stacked.split(most), counts, strict=True)])
    return [x.to(part.dtype) for x, part in zip(stacked.cpu().unbind(1), parts, strict=True)]


@collective
def from_main(work: Callable[[], Any], processes: Processes) -> Any:
    """Call `work` in the main process only, and return its result, or raise its error, in every process."""
    if processes.num_processes == 1:
        return work()
    result_and_error: list[Any] = [None, None]
    if processes.is_main_process:
        try:
            result_and_error[0] = work()
        except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
            result_and_error[1] = error  # raised after the broadcast, for which the other processes wait
    broadcast_object_list(result_and_error)
    if result_and_error[1] is not None:
        raise result_and_error[1]
    return result_and_error[0]


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """Return versions, device, cores and threads, to be stored with a measurement."""
    counts = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"versions": versions(), "device": device_name(accelerator.device), **counts}
