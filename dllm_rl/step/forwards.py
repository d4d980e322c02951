"""Context managers for the forwards of a training step. `arithmetic` sets autocast and batch invariance;
`learner_forward` also lets the learner compute with the rollout's quantized operands if the corrector aligns the
forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator

from dllm_rl.diagnostics.batch_invariance import batch_invariant
from dllm_rl.models.base import Policy
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.recipe import Recipe
from dllm_rl.step.context import StepContext


@contextmanager
def arithmetic(recipe: Recipe, accelerator: Accelerator) -> Iterator[None]:
    """Set autocast to bf16 if `bf16` is set, and batch invariance if `zero_mismatch` is set."""
    cache_enabled = recipe.shard_size == 1  # autocast's cache would hold all weights of a sharded model in bf16
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.bf16, cache_enabled=cache_enabled)
    with autocast, batch_invariant() if recipe.zero_mismatch else nullcontext():
        yield


def aligns(recipe: Recipe, policy: Policy, rollout_policy: Policy) -> bool:
    """Return whether the learner computes with the rollout's quantized operands."""
    return recipe.corrector.align_forward and rollout_policy is not policy


@contextmanager
def learner_forward(run: StepContext[Recipe]) -> Iterator[None]:
    """Set what a forward of the learner needs: the recipe's arithmetic, and the rollout's quantized operands if the
    corrector aligns the forward.
    """
    aligned = aligns(run.recipe, run.policy, run.rollout_policy)
    with (
        arithmetic(run.recipe, run.accelerator),
        aligned_forward(run.policy, run.rollout_policy) if aligned else nullcontext(),
    ):
        yield
