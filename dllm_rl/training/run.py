"""What a run owns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator

from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.checkpoints.writer import Writer
from dllm_rl.distributed.stop import Stop
from dllm_rl.models.base import Policy
from dllm_rl.monitoring.log import RunLog
from dllm_rl.recipe import Settings

Record = TypeVar("Record", bound=Settings)


@dataclass(eq=False)
class Run(Generic[Record]):
    """What a run of RL or SFT owns from its start to its summary."""

    recipe: Record
    accelerator: Accelerator
    log: RunLog
    policy: Policy
    rollout_policy: Policy
    reference: Policy | None
    optimizer: torch.optim.Optimizer
    state: TrainingState  # replaced as a whole: another thread never reads the fields of two steps
    stop: Stop
    writer: Writer
    progress: Callable[..., None]
    saved: int | None = None  # step of the last save
    checkpoint: str = ""  # folder of the last one, which may be the one that the run resumes from
