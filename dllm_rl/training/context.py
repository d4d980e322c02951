"""What every part of a step is given."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from accelerate import Accelerator

from dllm_rl.models.base import Policy
from dllm_rl.monitoring.log import RunLog
from dllm_rl.recipe import Settings

Record = TypeVar("Record", bound=Settings, covariant=True)


@dataclass(eq=False, kw_only=True)
class StepContext(Generic[Record]):
    """The settings, processes, log and policies of a step, of a run or of a worker that makes its rollouts."""

    recipe: Record
    accelerator: Accelerator
    log: RunLog
    policy: Policy
    rollout_policy: Policy
    reference: Policy | None = None
