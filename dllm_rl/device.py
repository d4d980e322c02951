"""The device that a run computes on, its memory, and copies to it."""

import math
import platform
import sys

import torch
from torch import Tensor


def find_device(name: str | None = None) -> torch.device:
    """Return the named device or, without a name, the accelerator or CPU. Raises ValueError if the device is absent."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:  # not a Mac's GPU: it has no fp64, which random numbers and metrics need
        return torch.device("cpu") if accelerator is None or accelerator.type == "mps" else accelerator
    available = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    device_type, colon, index = name.partition(":")
    count = 1 if device_type == "cpu" else torch.accelerator.device_count()  # cpu:0 is the only CPU device
    if device_type not in available or (colon and not (index.isdecimal() and int(index) < count)):
        raise ValueError(f"device={name!r} is not on this machine, which has {' and '.join(available)}")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return a GPU's model, or the host's processor or architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def peak_memory() -> float:
    """Return this process's peak memory so far in GB: on its GPU if it uses one, else on the host."""
    if torch.cuda.is_initialized():  # a process that does not use the GPU reports host memory
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ModuleNotFoundError:  # not a POSIX system
        return math.nan
    # macOS reports bytes, Linux kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def copy_to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy tensors of one dtype from the host to the device."""
    if device.type != "cuda":
        return tuple(x.to(device) for x in tensors)
    # One copy from pinned memory: with pageable memory the host waits longer than a sampler's step takes.
    on_device = torch.cat([x.flatten() for x in tensors]).pin_memory().to(device, non_blocking=True)
    parts = on_device.split([x.numel() for x in tensors])
    return tuple(part.view(x.shape) for part, x in zip(parts, tensors, strict=True))
