"""Translate TRL's names for settings into those of `grpo_recipe`. docs/trl.md has the tables."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial, wraps
from numbers import Integral
from typing import Any

from dllm_rl.algorithms import optimizers
from dllm_rl.algorithms.advantages import group_relative
from dllm_rl.algorithms.losses import fixed_length_mean, gspo, ppo_clip, sequence_mean, token_mean
from dllm_rl.distributed.collectives import num_launched
from dllm_rl.recipe import Recipe, check_kind, convert_value

# From TRL's names to keywords of grpo_recipe with the same meaning. NAME.ARGUMENT is an argument of the function in the
# keyword NAME, or an entry of the dict `sampler_options`.
TRL_NAMES = {
    "max_completion_length": "max_new_tokens",
    "max_steps": "num_steps",
    "run_name": "name",
    "hub_model_id": "push_to_hub",
    "tokenizer": "processing_class",
    "peft_config": "lora",
    "top_k": "sampler_options.top_k",
    "top_p": "sampler_options.top_p",
    "epsilon": "loss.epsilon",
    "epsilon_high": "loss.epsilon_high",
    "delta": "loss.delta",
    "scale_rewards": "advantages.scale_rewards",
}
# From TRL's names whose values are strings to keywords of grpo_recipe, and their values for the strings that have an
# equivalent.
STRING_VALUES: dict[str, tuple[str, dict[str, Callable]]] = {
    "loss_type": (
        "loss_reduction",
        {"grpo": sequence_mean, "dapo": token_mean, "bnpo": token_mean, "dr_grpo": fixed_length_mean},
    ),
    # This sets only the level: epsilon stays 0.2, and epsilon_high equals epsilon. For GSPO's bounds use loss=gspo.
    "importance_sampling_level": (
        "loss",
        {"token": ppo_clip, "sequence": partial(gspo, epsilon=0.2, epsilon_high=None)},
    ),
    "lr_scheduler_type": (
        "lr_schedule",
        {
            "constant": optimizers.constant_rate,
            "constant_with_warmup": optimizers.constant_with_warmup,
            "linear": optimizers.linear_with_warmup,
            "cosine": optimizers.cosine_with_warmup,
        },
    ),
}
# TRL's completions per forward, and forwards per update, of one process. `batch_sizes` converts them.
BATCH_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
# TRL's names without an equivalent: they are refused, and the error names this nearest setting.
HINTS = {
    "args": "a keyword for each of its fields, as learning_rate=1e-6",
    "generation_batch_size": "train_batch_size, in prompts per step over all processes",
    "steps_per_generation": "num_iterations, updates per rollout",
    "num_train_epochs": "num_steps",
    "per_device_eval_batch_size": "eval_batch_size",
    "eval_strategy": "eval_steps",
    "save_strategy": "save_steps",
    "warmup_steps": "warmup_steps with lr_scheduler_type",
    "warmup_ratio": "warmup_steps with lr_scheduler_type",
    "sync_ref_model": "beta, whose reference stays the policy that RL started from",
    "multi_objective_aggregation": "advantages=decoupled",
    "vllm_importance_sampling_mode": "corrector",
    "vllm_importance_sampling_cap": "corrector=tis(cap=2.0)",
    "use_vllm": "rollout_quantization, for rollouts in the training process",
    "generation_kwargs": "sampler_options",
    "min_p": "top_p",
    "quantization_config": "base_quantization",
    "model_init_kwargs": "dtype",
    "fp16": "dtype='float16' with lora",
    "mask_truncated_completions": "none: return the mean reward of the group for a cut answer (docs/trl.md)",
    "log_completions": "log_completions_steps",
    "cast_lm_head_to_fp32": "float32_head",
    "vllm_importance_sampling_correction": "corrector",
    "vllm_importance_sampling_clip_max": "corrector",
    "vllm_importance_sampling_clip_min": "corrector",
    "vllm_mode": "rollout_workers, for rollouts by other processes",
    "cache_implementation": "sampler_options, with cache=block_cache()",
    "chat_template_kwargs": "the chat_template of the tokenizer",
    "num_generations_eval": "dllm-rl evaluate --samples, after training",
    "lr_scheduler_kwargs": "lr_schedule, a function with its keywords bound",
    "adam_epsilon": "optim, a function",
    "optim_args": "optim, a function",
    "fsdp": "shard_size",
    "deepspeed": "shard_size",
    "ddp_timeout": "collective_timeout",
    "data_seed": "seed",
    "auto_find_batch_size": "dry_run=True, which prints what fits",
    "use_cpu": "accelerate launch --cpu",
    "hub_token": "HF_TOKEN, an environment variable",
    "trust_remote_code": "none: no checkpoint needs it",
    "reward_processing_classes": "a reward function that calls the reward model",
    # Names of diffu-GRPO (d1), and keywords of the sampler.
    "p_mask_prompt": "likelihood=one_step(prompt_mask=0.15)",
    "diffusion_steps": "sampler_options={'diffusion_steps': 128}",
    "block_length": "sampler_options={'block_size': 32}",
    "block_size": "sampler_options={'block_size': 32}",
    "remasking": "sampler_options={'rank': confidence}",
    "random_masking": "resample_masks",
    "ref_model_sync_steps": "beta, whose reference stays the policy that RL started from",
}


def translate_trl_names(function: Callable[..., Recipe], keywords: dict[str, Any]) -> dict[str, Any]:
    """Translate keywords that may have TRL's names into the function's keywords.

    Raises:
        ValueError: A name is unknown.
    """
    types = {name: parameter.annotation for name, parameter in inspect.signature(function).parameters.items()}
    # The function's types take precedence: its `model` accepts one more type than Recipe's.
    types = {field.name: field.type for field in fields(Recipe)} | types
    known_names = types.keys() - {"settings"}
    keywords = {
        name: value if name == "model" else convert_value(name, types.get(name), value)
        for name, value in keywords.items()
    }
    check_counts(keywords)
    for name in keywords.keys() & known_names - {"report_to"}:  # report_to is a list in TRL
        check_kind(name, types[name], keywords[name])
    translated = batch_sizes(keywords)
    trl_names = dict(TRL_NAMES)
    if "lr_scheduler_type" in keywords:
        trl_names["warmup_steps"] = "lr_schedule.warmup_steps"
    for name, value in keywords.items():
        is_default = (name, value) in (("sync_ref_model", False), ("warmup_steps", 0))
        if name in BATCH_SIZES or is_default:
            continue
        if name in STRING_VALUES:
            target, value = translate_string(name, value)
        else:
            target = trl_names.get(name, name)
        if target.partition(".")[0] not in known_names:
            if name in HINTS:
                nearest = [HINTS[name]]
            else:
                nearest = difflib.get_close_matches(name, known_names | TRL_NAMES.keys(), n=1)
            remedy = f"the nearest is {nearest[0]}" if nearest else "help(dllm_rl.Recipe) lists all"
            raise ValueError(f"{name} is not a setting of grpo; {remedy}")
        if target in translated:
            raise ValueError(f"{target} is set twice, once by TRL's name; set it once")
        translated[target] = value
    if isinstance(translated.get("report_to"), list):
        translated["report_to"] = ",".join(translated["report_to"]) or "none"
    for target in [target for target in translated if "." in target]:
        bind_keyword(translated, target, translated.pop(target))
    return translated


def check_counts(keywords: dict[str, Any]) -> None:
    """Raise ValueError if one of TRL's counts is not a whole number, or if it counts updates and a step has several
    updates. Also refuse loss_type='bnpo' for an update of several forwards."""
    for name in (*BATCH_SIZES, "num_generations", "warmup_steps"):
        if not isinstance(keywords.get(name, 0), Integral):
            raise ValueError(f"{name}={keywords[name]!r} must be a whole number")
    if keywords.get("num_iterations", 1) > 1:
        for name, remedy in (("max_steps", "num_steps"), ("lr_scheduler_type", "lr_schedule, a function")):
            if keywords.get(name, "constant") != "constant":  # a constant rate does not count updates
                raise ValueError(f"{name} counts updates, and num_iterations of them are one step here; give {remedy}")
    forwards = keywords.get("gradient_accumulation_steps", 1) * num_launched()
    if keywords.get("loss_type") == "bnpo" and forwards > 1:
        raise ValueError(
            f"loss_type='bnpo' divides by the tokens of each forward, and an update has {forwards} of them; "
            "use 'dapo', which divides by the tokens of the batch"
        )


def translate_string(name: str, value: object) -> tuple[str, Callable]:
    """Return the keyword for a name in STRING_VALUES, and the keyword's value.

    Raises:
        ValueError: The table does not have the value.
    """
    keyword, equivalents = STRING_VALUES[name]
    if value not in list(equivalents):
        known = ", ".join(map(repr, equivalents))
        alternatives = "for others give Recipe's loss, loss_reduction or lr_schedule"
        raise ValueError(f"{name}={value!r} is not one of {known}; {alternatives}")
    return keyword, equivalents[value]


def batch_sizes(keywords: dict[str, Any]) -> dict[str, Any]:
    """Return micro_batch_size (completions) and train_batch_size (prompts) for TRL's BATCH_SIZES; {} without them.

    Raises:
        ValueError: A forward would split a group.
    """
    if not keywords.keys() & set(BATCH_SIZES):
        return {}
    rows, forwards = keywords.get(BATCH_SIZES[0]), keywords.get(BATCH_SIZES[1], 1)
    if rows is None:
        raise ValueError(f"gradient_accumulation_steps={forwards} needs per_device_train_batch_size, in completions")
    group_size = max(1, keywords.get("num_generations", Recipe.num_generations))  # Recipe refuses a value below 1
    if rows % group_size:
        problem = f"per_device_train_batch_size={rows} is not a multiple of num_generations={group_size}"
        raise ValueError(
            f"{problem}, and a forward has complete groups here; use a multiple, or train_batch_size, in prompts"
        )
    return {"micro_batch_size": rows, "train_batch_size": rows * forwards * num_launched() // group_size}


def bind_keyword(settings: dict[str, Any], target: str, value: object) -> None:
    """Set the argument of a setting's function, or an entry of `sampler_options`. `target` is NAME.ARGUMENT, as in
    TRL_NAMES.
    """
    name, _, keyword = target.partition(".")
    if name == "sampler_options":
        settings[name] = {**(settings.get(name) or {}), keyword: value}
        return
    function: Callable = settings.get(name) or (ppo_clip if name == "loss" else group_relative)
    if keyword not in inspect.signature(function).parameters:
        raise ValueError(f"{keyword}={value!r} is not a keyword of the {name}; leave one of them out")
    if isinstance(value, bool):  # scale_rewards of earlier TRL versions
        value = "group" if value else "none"
    settings[name] = partial(function, **{keyword: value})


def with_trl_names(function: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Decorate `grpo_recipe`, so that it also accepts TRL's names."""

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Recipe:
        return function(*arguments, **translate_trl_names(function, keywords))

    return call
