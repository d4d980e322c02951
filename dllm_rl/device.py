"""The device that a run computes on, and what it holds of it."""

import math
import sys

import torch
from torch import Tensor


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


def peak_memory() -> float:
    """The most that this process has held so far, GB: on its GPU where it uses one, else in the host's memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ModuleNotFoundError:  # not a POSIX system
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def send(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The host's tensors, all of one dtype, on the device; the tensors themselves where that is the CPU.

    They travel as one copy from pinned memory, which the host does not wait for. From pageable memory it would, and a
    step of a sampler takes less time than a wait.
    """
    if device.type != "cuda":
        return tuple(x.to(device) for x in tensors)
    there = torch.cat([x.flatten() for x in tensors]).pin_memory().to(device, non_blocking=True)
    parts = there.split([x.numel() for x in tensors])
    return tuple(part.view(x.shape) for part, x in zip(parts, tensors, strict=True))
