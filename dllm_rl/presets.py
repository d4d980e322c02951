"""Presets: sets of settings for large models, which `grpo` selects by the model's size, and the settings of d1's paper.

Settings that a caller passes override a preset. No large model has been trained with any preset yet.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dllm_rl.algorithms.advantages import GroupRelative
from dllm_rl.algorithms.correctors import NoCorrection
from dllm_rl.algorithms.losses import K3, PPOClip
from dllm_rl.algorithms.optimizers import AdamW, ConstantRate
from dllm_rl.groups import Evaluation
from dllm_rl.likelihoods.estimators import OneStep
from dllm_rl.models.lora_settings import Lora
from dllm_rl.recipe import Recipe
from dllm_rl.records import describe, unchecked
from dllm_rl.samplers.cache import BlockCache
from dllm_rl.samplers.rules import Confidence
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.screen import escape_controls

LARGE_MODEL = 1_000_000_000  # models with at least this many parameters get a preset by default


@dataclass(frozen=True)
class Preset:
    """A set of values for fields of `Recipe` and for fields of the sampler `Unmask`."""

    settings: Mapping[str, Any]  # fields of `Recipe`
    sampler: Mapping[str, Any] = field(default_factory=dict)  # fields of `Unmask`
    by_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # a task's name -> values that differ


_LARGE_SETTINGS: dict[str, Any] = {
    # For adapters whose alpha / rank is 0.5 and one update per rollout. d1 takes 3e-6, and 8 or 12 updates.
    "learning_rate": 1e-5,
    "lora": Lora(r=128, alpha=64.0),
    "dtype": "bfloat16",
    "max_grad_norm": 0.2,
    "train_batch_size": 8,
    "num_generations": 6,
    "micro_batch_size": 6,
    "evaluation": Evaluation(batch_size=32),
}
PRESETS: dict[str, Preset] = {
    "large": Preset(_LARGE_SETTINGS, {"block_size": 32}),  # LLaDA, Dream and others with full attention
    "large-blocks": Preset(_LARGE_SETTINGS, {"cache": BlockCache()}),  # LLaDA2, SDAR: exact cache, model's block size
    "large-causal": Preset(_LARGE_SETTINGS),
    "d1": Preset(  # arXiv 2504.12216 and the train.yaml of its repository
        {
            "learning_rate": 3e-6,
            "lr_schedule": ConstantRate(),
            "optim": AdamW(beta1=0.9, beta2=0.99, weight_decay=0.1),
            "max_grad_norm": 0.2,
            "dtype": "bfloat16",
            "lora": Lora(r=128, alpha=64.0, dropout=0.05),
            "base_quantization": "nf4",  # also used for rollouts
            "rollout_quantization": None,
            "torch_compile": False,
            "train_batch_size": 16,  # two groups on each of eight GPUs
            "num_generations": 6,
            "micro_batch_size": 6,
            "num_iterations": 8,
            "likelihood": OneStep(prompt_mask=0.15),
            "corrector": NoCorrection(),
            "loss": PPOClip(epsilon=0.5),
            "advantages": GroupRelative(scale_rewards="none"),
            "beta": 0.04,
            "kl": K3(),
        },
        {"max_new_tokens": 256, "diffusion_steps": 128, "block_size": 32, "temperature": 0.9, "rank": Confidence()},
        {"sudoku": {"temperature": 0.3}, "gsm8k": {"num_iterations": 12}, "math500": {"num_iterations": 12}},
    ),
}


def find_preset(name: str, task: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of `Recipe` and the fields of `Unmask` of a preset for a task, all by name.

    Raises:
        ValueError: There is no preset of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is not one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    values = {**preset.settings, **preset.sampler, **preset.by_task.get(task, {})}
    keywords = {field: values.pop(field) for field in preset.sampler}
    return values, keywords


def preset_by_size(attention: str, parameters: int) -> str | None:
    """Return the name of a large model's preset, or None for a small model, which uses the defaults."""
    if parameters < LARGE_MODEL:
        return None
    return {"full": "large", "block_causal": "large-blocks"}.get(attention, "large-causal")


def with_preset(recipe: Recipe, name: str) -> Recipe:
    """Apply a preset to a recipe, and print it. The result is not checked: options that override it may resolve a
    conflict.

    Raises:
        ValueError: The preset sets fields of `Unmask`, and the recipe has another sampler.
    """
    settings, keywords = find_preset(name, recipe.task.name)
    if keywords:
        for sampler in (recipe.sampler, recipe.eval_sampler):
            if not isinstance(sampler, Unmask):
                raise ValueError(f"preset={name!r} is for the sampler Unmask, and this recipe has {describe(sampler)}")
    print_preset(name, settings | keywords)
    eval_keywords = {keyword: value for keyword, value in keywords.items() if keyword != "temperature"}
    sampler, eval_sampler = recipe.sampler.replace(**keywords), recipe.eval_sampler.replace(**eval_keywords)
    return unchecked(recipe, **settings, sampler=sampler, eval_sampler=eval_sampler)


def print_preset(name: str, settings: Mapping[str, Any]) -> None:
    """Print the preset that a run uses and its settings in one line, from one process only."""
    if os.environ.get("RANK", "0") == "0":
        text = ", ".join(f"{field}={describe(value)}" for field, value in settings.items())
        print(escape_controls(f"preset {name}: {text}"), flush=True)
