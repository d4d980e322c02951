"""Settings and states with which nothing is learnt: each is said once, in a line."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_rl.algorithms.advantages import takes_parts
from dllm_rl.recipe import Recipe

BF16_STEPS = 512  # half a step of bf16 is at least a 512th of the number
TYPICAL_WEIGHT = 0.02  # of a matrix in a language model
PATIENCE = 20  # steps in a row without a group whose rewards differ


def cautions(recipe: Recipe) -> list[str]:
    """What of the recipe cannot learn, and the remedy."""
    said, shape = [], (recipe.train_batch_size, recipe.num_generations)
    if _bound(recipe.sampler, "temperature") == 0:
        said.append(
            "sampler.temperature=0 is greedy: the completions of a prompt are all alike and teach nothing; use 1.0"
        )
    steps = recipe.learning_rate * BF16_STEPS
    if recipe.lora is None and isinstance(recipe.model, str) and recipe.dtype == "bfloat16" and steps < TYPICAL_WEIGHT:
        said.append(
            f"dtype='bfloat16' without lora and learning_rate={recipe.learning_rate}: bf16 weights above {steps:.1g} "
            "round such updates away; use --dtype float32 --bf16, whose weights are fp32 and whose products are bf16"
        )
    rewards, parts = made_up_rewards(recipe)
    if not recipe.advantages(rewards, **parts).any():
        name = getattr(recipe.advantages, "func", recipe.advantages).__name__
        said.append(
            f"num_generations={shape[1]} with advantages={name} gives advantages that are all 0, which teach nothing; "
            "use at least 2"
        )
    return said


def made_up_rewards(recipe: Recipe) -> tuple[Float[Tensor, "P G"], dict[str, Tensor]]:
    """Rewards of a batch that all differ, and what `recipe.advantages` takes beside them."""
    shape = (recipe.train_batch_size, recipe.num_generations)
    rewards = torch.arange(float(shape[0] * shape[1])).reshape(shape)
    return rewards, {"parts": rewards[None], "weights": torch.ones(1)} if takes_parts(recipe.advantages) else {}


def flat_for(steps: int) -> str:
    return (
        f"in the last {steps} steps the rewards of every group were equal, which teaches nothing: see whether the "
        "grader tells completions apart, or take easier problems or more generations"
    )


def _bound(function: Callable, name: str) -> Any:
    """The value of a keyword that a function is bound with, or its default; None where it has no such keyword."""
    target, keywords = (function.func, function.keywords) if isinstance(function, partial) else (function, {})
    parameter = inspect.signature(target).parameters.get(name)
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return keywords.get(name, default)
