"""Optimisers that a recipe can name, AdamW with moments in more or less memory, and schedules of its learning rate."""

import math
from collections.abc import Iterable

from torch import Tensor, optim

from dllm_rl.bounds import Bound, bounded


def adamw(parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float) -> optim.Optimizer:
    """Torch's AdamW: 8 bytes per parameter for its moments."""
    parameters = list(parameters)
    fused = all(parameter.is_cuda for parameter in parameters) or None  # it needs no large temporaries
    return optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)


def adamw_8bit(
    parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float
) -> optim.Optimizer:
    """Bitsandbytes' AdamW: moments take 2 bytes per parameter; tensors below 4096 elements keep fp32 moments."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


def linear_decay(
    step: int, num_steps: int, *, warmup_steps: int = 5, constant_until: float = 0.6, final: float = 0.1
) -> float:
    """Factor on the learning rate at `step`: a linear rise, a plateau, a linear fall, then `final`.

    Args:
        warmup_steps: Steps of the rise.
        constant_until: Share of the run at which the fall begins, in [0, 1].
        final: The factor at the end.
    """
    rise = min(1.0, (step + 1) / max(1, warmup_steps))  # the first step's rate is not 0
    fall = max(0.0, min(1.0, step / max(1, num_steps)) - constant_until) / max(1e-9, 1 - constant_until)
    return rise * (1 - (1 - final) * fall)


# The schedules of transformers, under its names. With a warmup, their first step has the rate 0.


def constant_rate(step: int, num_steps: int) -> float:
    """Factor 1 at every step."""
    return 1.0


@bounded(warmup_steps=Bound(at_least=0))
def constant_with_warmup(step: int, num_steps: int, *, warmup_steps: int = 0) -> float:
    """Factor on the learning rate: a linear rise from 0, then 1.

    Args:
        warmup_steps: Steps of the rise.
    """
    return step / warmup_steps if step < warmup_steps else 1.0


@bounded(warmup_steps=Bound(at_least=0))
def linear_with_warmup(step: int, num_steps: int, *, warmup_steps: int = 0) -> float:
    """Factor on the learning rate: a linear rise from 0, then a linear fall, to 0 after the last step.

    Args:
        warmup_steps: Steps of the rise.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (num_steps - step) / max(1, num_steps - warmup_steps))


@bounded(warmup_steps=Bound(at_least=0))
def cosine_with_warmup(step: int, num_steps: int, *, warmup_steps: int = 0) -> float:
    """Factor on the learning rate: a linear rise from 0, then half a cosine from 1 to 0 after the last step; 0 later.

    Args:
        warmup_steps: Steps of the rise.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress))
