"""The context of a run's steps, with the features that its recipe uses."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator

from dllm_rl.algorithms.prompt_sources import RewardHistory
from dllm_rl.diagnostics.batch_invariance import batch_invariant, check_bitwise_equal
from dllm_rl.models.base import Policy
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.recipe import Recipe
from dllm_rl.step.balance import Balance
from dllm_rl.step.context import StepContext, StepFeature
from dllm_rl.step.correct import CorrectorState
from dllm_rl.training.distillation import Teacher
from dllm_rl.training.replay_store import ReplayStore
from dllm_rl.types import Logprobs, Rollout


class ZeroMismatch(StepFeature):
    """All forwards compute a row with the same bits in every batch; rollout and learner must agree to the bit."""

    def around_forward(self, context: StepContext) -> AbstractContextManager:
        return batch_invariant()

    def check_scores(self, context: StepContext, rollout: Rollout, logps: Logprobs) -> None:
        policies = {"policy": context.policy, "rollout_policy": context.rollout_policy}
        check_bitwise_equal(rollout, logps.views, logps, **policies)


class AlignedForward(StepFeature):
    """The learner computes with the rollout's quantized operands (QaRL)."""

    def around_learner(self, context: StepContext) -> AbstractContextManager:
        return aligned_forward(context.policy, context.rollout_policy)


def run_features(recipe: Recipe, teacher: Policy | None = None) -> tuple[StepFeature, ...]:
    """Return the parts of a recipe's steps that belong to a run and not to a rollout worker.

    Args:
        recipe: Settings of the run.
        teacher: The loaded teacher of a distillation. None (default): the recipe has none, or it is not loaded yet.
    """
    features: list[StepFeature] = []
    if teacher is not None:
        features.append(Teacher(recipe, teacher))
    if recipe.replay is not None:
        features.append(ReplayStore(recipe.replay, recipe.num_steps))
    return tuple(features)


def make_step(
    recipe: Recipe,
    *,
    accelerator: Accelerator,
    policy: Policy,
    rollout_policy: Policy,
    reference: Policy | None = None,
    features: Sequence[StepFeature] = (),
    **more: Any,
) -> StepContext:
    """Make the context of a recipe's steps. What the recipe does not use is not among its features.

    Args:
        recipe: Settings of the run.
        accelerator: Processes and device.
        policy: The learner.
        rollout_policy: The policy that samples; may be the learner.
        reference: The policy that RL started from, for the KL term.
        features: Further features: `run_features`, and those given to `train`.
        more: Further fields of StepContext: history (default: empty), log.
    """
    learner_samples = rollout_policy is policy
    used: list[StepFeature] = [CorrectorState(recipe.corrector)]
    if recipe.zero_mismatch:
        used.append(ZeroMismatch())
    if recipe.corrector.align_forward and not learner_samples:
        used.append(AlignedForward())
    if accelerator.num_processes > 1:
        used.append(Balance(swaps=not recipe.zero_mismatch))
    return StepContext(
        settings=recipe,
        accelerator=accelerator,
        policy=policy,
        rollout_policy=rollout_policy,
        reference=reference,
        features=(*used, *features),
        **{"history": RewardHistory(len(recipe.task)), **more},
    )
