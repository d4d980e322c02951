"""Optimizers and learning-rate schedules that a recipe can name.

A schedule is a function (step, num_steps) -> factor on the learning rate.
"""

import math
from collections.abc import Iterable

from torch import Tensor, optim

from dllm_rl.bounds import Bound, bounded


def adamw(parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float) -> optim.Optimizer:
    """Make torch's AdamW, whose moments take 8 bytes per parameter. This is the default."""
    parameters = list(parameters)
    fused = all(parameter.is_cuda for parameter in parameters) or None  # fused needs no large temporary tensors
    return optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)


def adamw_8bit(
    parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float
) -> optim.Optimizer:
    """Make bitsandbytes' AdamW, whose moments take 2 bytes per parameter.

    Use it if the optimizer's moments do not fit in GPU memory. Tensors below 4096 elements keep fp32 moments. It needs
    the package bitsandbytes.
    """
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


def linear_decay(
    step: int, num_steps: int, *, warmup_steps: int = 5, constant_until: float = 0.6, final: float = 0.1
) -> float:
    """Return the factor on the learning rate at `step`: a linear rise, a plateau, and a linear fall to `final`.

    Args:
        step: Training step, from 0.
        num_steps: Training steps of the run.
        warmup_steps: Steps of the rise. Default: 5.
        constant_until: Share of the run after which the fall begins, in [0, 1]. Default: 0.6.
        final: Factor at the end. Default: 0.1.
    """
    rise = min(1.0, (step + 1) / max(1, warmup_steps))  # the first step's rate is not 0
    fall = max(0.0, min(1.0, step / max(1, num_steps)) - constant_until) / max(1e-9, 1 - constant_until)
    return rise * (1 - (1 - final) * fall)


# The next four schedules are transformers', with the same names. With a warmup, their first step has the rate 0.


def constant_rate(step: int, num_steps: int) -> float:
    """Return the factor 1 at every step."""
    return 1.0


@bounded(warmup_steps=Bound(at_least=0))
def constant_with_warmup(step: int, num_steps: int, *, warmup_steps: int = 0) -> float:
    """Return the factor on the learning rate: a linear rise from 0, then 1.

    Args:
        step: Training step, from 0.
        num_steps: Training steps of the run. It is not used.
        warmup_steps: Steps of the rise, at least 0. Default: 0.
    """
    return step / warmup_steps if step < warmup_steps else 1.0


@bounded(warmup_steps=Bound(at_least=0))
def linear_with_warmup(step: int, num_steps: int, *, warmup_steps: int = 0) -> float:
    """Return the factor on the learning rate: a linear rise from 0, then a linear fall, to 0 after the last step.

    Args:
        step: Training step, from 0.
        num_steps: Training steps of the run.
        warmup_steps: Steps of the rise, at least 0. Default: 0.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (num_steps - step) / max(1, num_steps - warmup_steps))


@bounded(warmup_steps=Bound(at_least=0))
def cosine_with_warmup(step: int, num_steps: int, *, warmup_steps: int = 0) -> float:
    """Return the factor on the learning rate: a linear rise from 0, then half a cosine from 1 to 0 after the last step.

    The factor stays 0 after that.

    Args:
        step: Training step, from 0.
        num_steps: Training steps of the run.
        warmup_steps: Steps of the rise, at least 0. Default: 0.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress))
