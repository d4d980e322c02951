"""The objects that every part of a step reads."""

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from accelerate import Accelerator

from dllm_rl.algorithms.prompt_sources import RewardHistory
from dllm_rl.models.base import Policy
from dllm_rl.monitoring.log import RunLog
from dllm_rl.recipe import Settings
from dllm_rl.step.value_head import ValueHead

AnySettings = TypeVar("AnySettings", bound=Settings, covariant=True)  # Recipe, or the settings of SFT


@dataclass(eq=False, kw_only=True)
class StepContext(Generic[AnySettings]):
    """Settings, processes, log and policies of a step. `Run` extends it; a rollout worker also has one."""

    recipe: AnySettings
    accelerator: Accelerator
    policy: Policy
    rollout_policy: Policy
    reference: Policy | None = None
    value_head: ValueHead | None = None  # set if the recipe has a value_model
    history: RewardHistory | None = None  # set if the recipe's prompt_source reads it
    log: RunLog = field(default_factory=partial(RunLog, Path(os.devnull), start=0, main=False))  # writes nothing
