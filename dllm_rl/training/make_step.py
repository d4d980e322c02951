"""The context of a run's steps, with the features that its recipe uses."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from accelerate import Accelerator

from dllm_rl.algorithms.prompt_sources import RewardHistory
from dllm_rl.diagnostics.batch_invariance import check_bitwise_equal
from dllm_rl.models.base import Policy
from dllm_rl.recipe import Recipe
from dllm_rl.step.context import StepContext, StepFeature
from dllm_rl.training.parts.corrector_state import CorrectorState
from dllm_rl.training.parts.replay import ReplayStore
from dllm_rl.training.parts.teacher import TeacherReward


def run_features(recipe: Recipe, teacher: Policy | None = None) -> tuple[StepFeature, ...]:
    """Return the parts of a recipe's steps that belong to a run and not to a rollout worker.

    Args:
        recipe: Settings of the run.
        teacher: The loaded teacher of a distillation. None (default): the recipe has none, or it is not loaded yet.
    """
    features: list[StepFeature] = [CorrectorState()]
    if recipe.teacher is not None and teacher is not None:
        features.append(TeacherReward(recipe, recipe.teacher, teacher))
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
    """Make the context of a recipe's steps.

    Args:
        recipe: Settings of the run.
        accelerator: Processes and device.
        policy: The learner.
        rollout_policy: The policy that samples; may be the learner.
        reference: The policy that RL started from, for the KL term.
        features: `run_features`, and those given to `train`. Default: none, as in a rollout worker.
        more: Further fields of StepContext: history (default: empty), log.
    """
    return StepContext(
        settings=recipe,
        accelerator=accelerator,
        policy=policy,
        rollout_policy=rollout_policy,
        reference=reference,
        features=tuple(features),
        balances=accelerator.num_processes > 1,
        zero_mismatch=partial(check_bitwise_equal, policy, rollout_policy) if recipe.zero_mismatch else None,
        **{"history": RewardHistory(len(recipe.task)), **more},
    )
