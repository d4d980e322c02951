"""The objects that every part of a step reads."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from dllm_rl.algorithms.prompt_sources import RewardHistory
from dllm_rl.models.base import Policy
from dllm_rl.monitoring.log import RunLog
from dllm_rl.step.features import StepFeature, overrides
from dllm_rl.step.settings import StepSettings


@dataclass(eq=False, kw_only=True)
class StepContext:
    """Settings, processes, log and policies of a step. A run has one, and so has a rollout worker."""

    settings: StepSettings
    accelerator: Accelerator
    policy: Policy
    rollout_policy: Policy
    history: RewardHistory  # empty if the prompt source does not read it
    reference: Policy | None = None
    compares_experts: bool = False  # whether rollout_policy is another policy, and both show the experts of each token
    features: tuple[StepFeature, ...] = ()
    log: RunLog = field(default_factory=partial(RunLog, Path(os.devnull), start=0, main=False))  # writes nothing

    @property
    def trains_all_groups(self) -> bool:
        """Whether the update also trains on groups of equal rewards: a setting or a feature gives them a gradient."""
        return self.settings.trains_all_groups or any(overrides(each, "token_advantages") for each in self.features)

    @contextmanager
    def arithmetic(self, *, learner: bool = False) -> Iterator[None]:
        """Set what every forward of the step needs: autocast to bf16 if `bf16` is set, and the features'; for forwards
        of the learner also what the features need for those.
        """
        if learner:
            self.policy.module.eval()  # a callback may have changed it; rollouts and scores drop nothing
        with ExitStack() as stack:
            settings, device = self.settings, self.accelerator.device.type
            stack.enter_context(
                torch.autocast(device, torch.bfloat16, enabled=settings.bf16, cache_enabled=not settings.is_sharded)
            )
            for feature in self.features:
                stack.enter_context(feature.around_forward(self))
            for feature in self.features if learner else ():
                stack.enter_context(feature.around_learner(self))
            yield
