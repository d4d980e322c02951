"""What the host makes for the device, sent without waiting for it."""

import torch
from torch import Tensor


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
