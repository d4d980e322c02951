"""Optimizers and learning-rate schedules that a recipe can name."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, optim

from dllm_rl.records import FunctionRecord, Record, option

NamedParameters = Iterable[tuple[str, Tensor]]


class Optimizer(Record):
    """A rule that makes the optimizer of a run.

    Where an optimizer is expected, a plain function (parameters, lr=) is one too. The parameters are pairs of a name
    and a tensor, as torch's optimizers take them, so that a group of them may have a rate of its own:
    `[{"params": [pair], "lr": lr / 10 if "embed" in pair[0] else lr} for pair in parameters]`.
    """

    def __call__(self, parameters: NamedParameters, lr: float) -> optim.Optimizer:
        """Make the optimizer of these parameters, each with its name."""
        raise TypeError(f"{type(self).__name__} must define __call__(parameters, lr)")


class FunctionOptimizer(FunctionRecord, Optimizer):
    """An optimizer that a function makes.

    Args:
        function: Function (parameters, lr=) -> torch.optim.Optimizer. Its parameter groups may have different rates:
            the schedule scales each.
    """

    def __call__(self, parameters: NamedParameters, lr: float) -> optim.Optimizer:
        return self.function(parameters, lr=lr)


class _Adam(Optimizer):
    beta1: float = option(default=0.9, at_least=0, below=1)
    beta2: float = option(default=0.99, at_least=0, below=1)
    weight_decay: float = option(default=0.0, at_least=0)

    @property
    def _settings(self) -> dict[str, Any]:
        return {"betas": (self.beta1, self.beta2), "weight_decay": self.weight_decay}


class AdamW(_Adam):
    """torch's AdamW, whose moments take 8 bytes per parameter. This is the default.

    Args:
        beta1: Decay of the mean of gradients. Default: 0.9.
        beta2: Decay of the mean of squared gradients. Default: 0.99.
        weight_decay: Part of each weight that is subtracted in a step, times the learning rate. Default: 0.
    """

    def __call__(self, parameters: NamedParameters, lr: float) -> optim.Optimizer:
        tensors = [parameter for _, parameter in parameters]
        fused = all(parameter.is_cuda for parameter in tensors) or None  # fused needs no large temporary tensors
        return optim.AdamW(tensors, lr=lr, fused=fused, **self._settings)


class AdamW8bit(_Adam):
    """bitsandbytes' AdamW, whose moments take 2 bytes per parameter.

    Use it if the optimizer's moments do not fit in GPU memory. Tensors below 4096 elements keep fp32 moments. It needs
    the package bitsandbytes.

    Args:
        beta1: Decay of the mean of gradients. Default: 0.9.
        beta2: Decay of the mean of squared gradients. Default: 0.99.
        weight_decay: Part of each weight that is subtracted in a step, times the learning rate. Default: 0.
    """

    def __call__(self, parameters: NamedParameters, lr: float) -> optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit as BitsAndBytesAdamW8bit

        return BitsAndBytesAdamW8bit([parameter for _, parameter in parameters], lr=lr, **self._settings)


def keep_rate_ratios(optimizer: optim.Optimizer, learning_rate: float) -> None:
    """Store the ratio of each parameter group's rate to `learning_rate`, which `set_learning_rate` then keeps."""
    for group in optimizer.param_groups:
        if group.get("lr") is not None:  # an optimizer may choose its rate itself
            group["lr_scale"] = group["lr"] / learning_rate


def set_learning_rate(optimizer: optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of every parameter group, times the group's ratio if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


class LRSchedule(Record):
    """A learning-rate schedule.

    Where a schedule is expected, a plain function (step, num_steps) -> factor is one too.
    """

    def __call__(self, step: int, num_steps: int) -> float:
        """Return the factor on the learning rate at a step, from 0, of a run of `num_steps`."""
        raise TypeError(f"{type(self).__name__} must define __call__(step, num_steps)")


class FunctionSchedule(FunctionRecord, LRSchedule):
    """A schedule that a function computes.

    Args:
        function: Function (step, num_steps) -> factor on the learning rate.
    """


class LinearDecay(LRSchedule):
    """A linear rise, a plateau, and a linear fall to `final`. This is the default.

    Args:
        warmup_steps: Steps of the rise. Default: 5.
        constant_until: Share of the run after which the fall begins, in [0, 1]. Default: 0.6.
        final: Factor at the end. Default: 0.1.
    """

    warmup_steps: int = option(default=5, at_least=0)
    constant_until: float = option(default=0.6, at_least=0, at_most=1)
    final: float = option(default=0.1, at_least=0)

    def __call__(self, step: int, num_steps: int) -> float:
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))  # the first step's rate is not 0
        plateau = self.constant_until
        fall = max(0.0, min(1.0, step / max(1, num_steps)) - plateau) / max(1e-9, 1 - plateau)
        return rise * (1 - (1 - self.final) * fall)


# The next four schedules are transformers', with the same names. With a warmup, their first step has the rate 0.


class ConstantRate(LRSchedule):
    """The factor 1 at every step."""

    def __call__(self, step: int, num_steps: int) -> float:
        return 1.0


class ConstantWithWarmup(LRSchedule):
    """A linear rise from 0, then 1.

    Args:
        warmup_steps: Steps of the rise, at least 0. Default: 0.
    """

    warmup_steps: int = option(default=0, at_least=0)

    def __call__(self, step: int, num_steps: int) -> float:
        return step / self.warmup_steps if step < self.warmup_steps else 1.0


class LinearWithWarmup(LRSchedule):
    """A linear rise from 0, then a linear fall, to 0 after the last step.

    Args:
        warmup_steps: Steps of the rise, at least 0. Default: 0.
    """

    warmup_steps: int = option(default=0, at_least=0)

    def __call__(self, step: int, num_steps: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return max(0.0, (num_steps - step) / max(1, num_steps - self.warmup_steps))


class CosineWithWarmup(LRSchedule):
    """A linear rise from 0, then half a cosine from 1 to 0 after the last step.

    The factor stays 0 after that.

    Args:
        warmup_steps: Steps of the rise, at least 0. Default: 0.
    """

    warmup_steps: int = option(default=0, at_least=0)

    def __call__(self, step: int, num_steps: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps))
        return 0.5 * (1 + math.cos(math.pi * progress))
