"""The arithmetic of a run's forwards: autocast, batch invariance, the aligned forward."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator

from dllm_rl.diagnostics.batch_invariance import batch_invariant
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.attention import PlainAttention
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.recipe import Recipe


@contextmanager
def arithmetic(recipe: Recipe, accelerator: Accelerator) -> Iterator[None]:
    """Autocast to bf16 with `bf16`; batch-invariant with zero_mismatch; else plain attention in 16 bits on a CPU."""
    kept = recipe.shard_size == 1  # autocast's cache would hold all of a sharded model in bf16
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.bf16, cache_enabled=kept)
    plain = accelerator.device.type == "cpu" and (recipe.bf16 or recipe.dtype != "float32")
    with autocast, batch_invariant() if recipe.zero_mismatch else PlainAttention() if plain else nullcontext():
        yield


@contextmanager
def learner_forward(recipe: Recipe, policy: Policy, rollout_policy: Policy, accelerator: Accelerator) -> Iterator[None]:
    """The recipe's arithmetic; with align_forward the learner computes with the rollout's quantised operands."""
    align = recipe.corrector.align_forward and rollout_policy is not policy
    with arithmetic(recipe, accelerator), aligned_forward(policy, rollout_policy) if align else nullcontext():
        yield
