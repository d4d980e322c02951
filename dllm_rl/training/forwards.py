"""What stands around every forward of a step: its arithmetic, and the rollout's quantised operands if shared."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator

from dllm_rl.diagnostics.batch_invariance import batch_invariant
from dllm_rl.models.base import Policy
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.recipe import Recipe
from dllm_rl.training.context import StepContext


@contextmanager
def arithmetic(recipe: Recipe, accelerator: Accelerator) -> Iterator[None]:
    """Autocast to bf16 with `bf16`; batch-invariant with zero_mismatch."""
    kept = recipe.shard_size == 1  # autocast's cache would hold all of a sharded model in bf16
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.bf16, cache_enabled=kept)
    with autocast, batch_invariant() if recipe.zero_mismatch else nullcontext():
        yield


def aligns(recipe: Recipe, policy: Policy, rollout_policy: Policy) -> bool:
    """Whether the learner computes with the rollout's quantised operands."""
    return recipe.corrector.align_forward and rollout_policy is not policy


@contextmanager
def learner_forward(run: StepContext[Recipe]) -> Iterator[None]:
    """The recipe's arithmetic, through the rollout's quantised operands where the forward is aligned."""
    aligned = aligns(run.recipe, run.policy, run.rollout_policy)
    with (
        arithmetic(run.recipe, run.accelerator),
        aligned_forward(run.policy, run.rollout_policy) if aligned else nullcontext(),
    ):
        yield
