"""What a run owns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator

from dllm_rl.checkpoints.writer import Writer
from dllm_rl.distributed.stop import Stop
from dllm_rl.models.base import Policy
from dllm_rl.monitoring.log import RunLog
from dllm_rl.recipe import Settings

Record = TypeVar("Record", bound=Settings)


@dataclass(frozen=True)
class Run(Generic[Record]):
    """What a run of RL or SFT owns from its start to its summary.

    history  complete steps `whole`, the policy's `version` then, step `saved` and folder `checkpoint` of the last save.
    """

    recipe: Record
    accelerator: Accelerator
    log: RunLog
    policy: Policy
    rollout_policy: Policy
    reference: Policy | None
    optimizer: torch.optim.Optimizer
    first_step: int
    history: dict[str, Any]
    stop: Stop
    writer: Writer
    progress: Callable[..., None]
