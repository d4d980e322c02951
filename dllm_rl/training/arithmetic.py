"""The arithmetic of a run's forwards: autocast, batch invariance, plain attention."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator

from dllm_rl.diagnostics.batch_invariance import batch_invariant
from dllm_rl.models.forward.attention import PlainAttention
from dllm_rl.recipe import Recipe


@contextmanager
def arithmetic(recipe: Recipe, accelerator: Accelerator) -> Iterator[None]:
    """Autocast to bf16 with `bf16`; batch-invariant with zero_mismatch; else plain attention in 16 bits on a CPU."""
    kept = recipe.shard_size == 1  # autocast's cache would hold all of a sharded model in bf16
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.bf16, cache_enabled=kept)
    plain = accelerator.device.type == "cpu" and (recipe.bf16 or recipe.dtype != "float32")
    with autocast, batch_invariant() if recipe.zero_mismatch else PlainAttention() if plain else nullcontext():
        yield
