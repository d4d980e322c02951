"""The rollouts' format that `Float8ByGPU` chooses: by the GPU, and by how many rows a process samples in a step."""

import math
import os
from dataclasses import replace

import torch

from dllm_rl.models.base import Policy
from dllm_rl.quantization.schemes import Float8ByGPU, Float8Dynamic
from dllm_rl.recipe import Recipe

CAPABILITIES = {"A100": (8, 0), "H100": (9, 0), "H200": (9, 0)}  # of the GPUs for which a dry run plans
ASSUMED = "H100"  # where a plan finds no GPU


def with_rollouts_by_gpu(recipe: Recipe, processes: int, *, is_plan: bool = False) -> tuple[Recipe, str]:
    """Return the recipe with the format that its `Float8ByGPU` chooses, and a line that says which; "" without one.

    The GPU is the one that `dry_run` names, else this machine's; a plan that finds none is for an H100.

    Args:
        recipe: Recipe.
        processes: Number of processes that share the batch.
        is_plan: Whether the recipe is only planned. Default: False.
    """
    scheme = recipe.rollout_quantization
    if not isinstance(scheme, Float8ByGPU):
        return recipe, ""
    name, capability = gpu_of(recipe, is_plan)
    rows = math.ceil(recipe.train_batch_size * recipe.num_generations / processes)
    reasons = {
        f"the weights in {recipe.base_quantization} sample": recipe.base_quantization is not None,
        f"FP8 is for an H100, an H200 or newer, and this is {name}": capability is None or capability < (9, 0),
        f"FP8 is for {scheme.min_rows} rows a process and more, and here are {rows}": rows < scheme.min_rows,
        "FP8 needs torch_compile=True": not recipe.compiles_rollouts,
        "FP8 needs dtype='bfloat16' or bf16=True": not (recipe.bf16 or trains_in_bf16(recipe)),
        "with a cache a forward has few columns": getattr(recipe.sampler, "cache", None) is not None,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), ""):
        return replace(recipe, rollout_quantization=None), f"not quantized: {reason}"
    line = f"Float8Dynamic on {name}, {rows} rows a process; unquantized: --rollout_quantization none"
    return replace(recipe, rollout_quantization=Float8Dynamic()), line


def trains_in_bf16(recipe: Recipe) -> bool:
    """Return whether the model's weights are in bf16; of a function that makes one, this is not known."""
    if isinstance(recipe.model, Policy):
        return next(recipe.model.module.parameters()).dtype == torch.bfloat16
    return isinstance(recipe.model, str) and recipe.dtype == "bfloat16"


def gpu_of(recipe: Recipe, is_plan: bool) -> tuple[str, tuple[int, int] | None]:
    """Return the GPU's name and CUDA capability; None for another device."""
    if isinstance(recipe.dry_run, str):
        return f"an {recipe.dry_run}", CAPABILITIES[recipe.dry_run]
    if torch.cuda.is_available() and torch.version.hip is None:  # ROCm numbers capabilities differently
        device = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if is_plan:
        return f"an {ASSUMED}", CAPABILITIES[ASSUMED]
    return "a device without CUDA", None
