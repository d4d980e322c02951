"""What a training step is told: `training.make_step` makes it from a recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Generator

from dllm_rl.algorithms.advantages import Advantages
from dllm_rl.algorithms.correctors import Corrector
from dllm_rl.algorithms.prompt_sources import PromptSource
from dllm_rl.likelihoods.estimators import LikelihoodEstimator
from dllm_rl.models.base import Policy
from dllm_rl.tasks.base import Task
from dllm_rl.types import Prompts, Rollout, Support


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """Settings of the updates of one step.

    Args:
        loss: Function (detached log-probs, batch) -> loss, metrics, gradient.
        likelihood: Estimator of the log-probs.
        learning_rate: Learning rate of the step.
        max_grad_norm: Norm to which gradients are clipped. Default: 1.
        micro_batch_size: Rows per forward. None (default): all.
        max_staleness: Largest number of steps by which the rollout's weights may be older. Default: 0.
        measure: Whether to measure `update_direction` after the updates. Default: False.
    """

    loss: Callable  # detached log-probs, batch -> loss, metrics, gradient
    likelihood: LikelihoodEstimator
    learning_rate: float
    max_grad_norm: float = 1.0
    micro_batch_size: int | None = None
    max_staleness: int = 0
    measure: bool = False


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of a step. Fields without a comment mean what the field of the same name of a recipe means."""

    seed: int

    # Collecting samples
    task: Task
    prompt_source: PromptSource
    sampler: Callable[[Policy, Prompts, Generator], Rollout]
    sampling_support: Support
    train_batch_size: int
    num_generations: int
    rollout_batch_size: int | None
    max_prompt_length: int | None
    max_num_gen_batches: int
    reward_timeout: float | None
    advantages: Advantages
    checks_logits: bool  # whether the samplers' log-probs come from this process, and must be finite
    counts_graphs: bool  # whether rollouts are compiled
    learning_rate: float  # only for messages

    # Scoring and correcting
    likelihood: LikelihoodEstimator
    corrector: Corrector
    beta: float
    old_logprobs: Literal["recompute", "rollout"]
    trains_all_groups: bool  # whether a group without advantage is trained too
    num_mask_sets: int
    num_scored_mask_sets: int
    num_mismatch_groups: int
    micro_batch_size: int | None
    max_retained_graphs: int | None  # 0 for a sharded learner: it must run each backward before the next forward
    bf16: bool
    autocast_cache: bool

    # Updating
    num_iterations: int
    update_settings: Callable[[int], UpdateSettings]  # of a step
