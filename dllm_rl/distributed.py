"""Processes: a process's share of a batch, gathering, reducing. With training/ the one room of accelerate."""

import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn

Metrics = dict[str, tuple[Tensor, Tensor]]
BUCKET = 2**25  # gradients that processes sum at once: what is held beside them is two copies of so many


def sum_gradients(module: nn.Module, accelerator: Accelerator, *, mean: bool = False) -> None:
    """Sum gradients over processes: the loss is a sum over the global batch, divided by its global counts already.

    A parameter that no token reached gets zeros, so that the optimiser and the other processes treat it like any other.
    """
    gradients = []
    for parameter in (p for p in module.parameters() if p.requires_grad):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if accelerator.num_processes == 1:
        return
    for bucket in buckets(gradients):
        flat = accelerator.reduce(torch.cat([g.flatten() for g in bucket]), reduction="mean" if mean else "sum")
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


def find_device(name: str | None = None) -> torch.device:
    """The device of that name; without one, the accelerator where there is one, else the CPU.

    A Mac's GPU is passed over unless it is named: it has no fp64, which random numbers and metrics are computed in.
    Raises ValueError on a device that this machine has not.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return torch.device("cpu") if found is None or found.type == "mps" else found
    there = ["cpu"] if found is None else ["cpu", found.type]
    kind, colon, index = name.partition(":")
    count = 1 if kind == "cpu" else torch.accelerator.device_count()
    if kind not in there or (colon and not (index.isdecimal() and int(index) < count)):
        raise ValueError(f"device={name!r} is not on this machine, which has {' and '.join(there)}")
    return torch.device(name)


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
    """The launch's processes and device. Raises RuntimeError when Accelerate does not see all processes launched, or is
    on another kind of device, which it keeps from the first Accelerator of a process on.

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
    if accelerator.device.type != wanted.type:
        raise RuntimeError(
            f"device={wanted.type} is wanted, but Accelerate is on {accelerator.device}, as an earlier Accelerator of "
            "this process was made to be: start a new process"
        )
    return accelerator


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


def peak_memory() -> float:
    """The most that this process has held so far, GB: on its GPU where it uses one, else in the host's memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ModuleNotFoundError:  # not a POSIX system
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def versions() -> dict[str, str | None]:
    """Of this library and of those whose numbers it depends on; None where one is not installed."""
    found: dict[str, str | None] = {}
    for package in ("dllm_rl", "torch", "transformers", "accelerate", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
