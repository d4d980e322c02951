"""TRL's names for settings of `grpo`, and their meaning here. docs/trl.md has the tables."""

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
from dllm_rl.distributed.collectives import launched
from dllm_rl.recipe import Recipe, check_kind, fitted
from dllm_rl.renamed import hint

# Names of the same meaning: the keyword of grpo_recipe or, after a dot, a keyword of its value.
SAME = {
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
# Names whose value is a word: the keyword, and its value for each word that has one meaning here.
WORDS: dict[str, tuple[str, dict[str, Callable]]] = {
    "loss_type": (
        "loss_reduction",
        {"grpo": sequence_mean, "dapo": token_mean, "bnpo": token_mean, "dr_grpo": fixed_length_mean},
    ),
    # Only the level: epsilon stays 0.2, and epsilon_high equals epsilon. For GSPO's bounds use loss=gspo.
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
# Completions of a process's forward, and forwards of a process per update: see `batch_sizes`.
BATCH_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Other names are refused with the nearest setting.
NEAREST = {
    "args": "a keyword for each of its fields, as learning_rate=1e-6",
    "generation_batch_size": "train_batch_size, in prompts per step over all processes",
    "steps_per_generation": "num_iterations, updates per rollout",
    "num_train_epochs": "num_steps",
    "per_device_eval_batch_size": "eval_batch_size",
    "eval_strategy": "eval_steps",
    "save_strategy": "save_steps",
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
}


def translated(function: Callable[..., Recipe], given: dict[str, Any]) -> dict[str, Any]:
    """Return the function's keywords for these keywords, which may have TRL's names.

    Raises:
        ValueError: A name is unknown.
    """
    types = {name: parameter.annotation for name, parameter in inspect.signature(function).parameters.items()}
    types = {field.name: field.type for field in fields(Recipe)} | types  # `model` has one more form here
    known = types.keys() - {"settings"}
    given = {name: value if name == "model" else fitted(name, types.get(name), value) for name, value in given.items()}
    check_counts(given)
    for name in given.keys() & known - {"report_to"}:  # TRL's value is a list
        check_kind(name, types[name], given[name])
    found = batch_sizes(given)
    same = dict(SAME)
    if "lr_scheduler_type" in given:  # without it, the name is one of an earlier version
        same["warmup_steps"] = "lr_schedule.warmup_steps"
    for name, value in given.items():
        if name in BATCH_SIZES or (name, value) in (("sync_ref_model", False), ("warmup_steps", 0)):  # the default
            continue
        path, value = spelled(name, value) if name in WORDS else (same.get(name, name), value)
        if path.partition(".")[0] not in known:
            if now := hint(name):
                more = "; a learning-rate warm-up needs lr_scheduler_type too" if name == "warmup_steps" else ""
                raise ValueError(now + more)
            near = [NEAREST[name]] if name in NEAREST else difflib.get_close_matches(name, known | SAME.keys(), n=1)
            remedy = f"the nearest is {near[0]}" if near else "help(dllm_rl.Recipe) lists all"
            raise ValueError(f"{name} is not a setting of grpo; {remedy}")
        if path in found:
            raise ValueError(f"{path} is given twice, once by TRL's name; give it once")
        found[path] = value
    if isinstance(found.get("report_to"), list):
        found["report_to"] = ",".join(found["report_to"]) or "none"
    for path in [path for path in found if "." in path]:
        bind(found, path, found.pop(path))
    return found


def check_counts(given: dict[str, Any]) -> None:
    """Raise ValueError on TRL's counts that are not whole numbers, or that count updates if a step has several."""
    for name in (*BATCH_SIZES, "num_generations", "warmup_steps"):
        if not isinstance(given.get(name, 0), Integral):
            raise ValueError(f"{name}={given[name]!r} must be a whole number")
    if given.get("num_iterations", 1) > 1:
        for name, remedy in (("max_steps", "num_steps"), ("lr_scheduler_type", "lr_schedule, a function")):
            if given.get(name, "constant") != "constant":  # a constant rate does not count updates
                raise ValueError(f"{name} counts updates, and num_iterations of them are one step here; give {remedy}")
    forwards = given.get("gradient_accumulation_steps", 1) * launched()
    if given.get("loss_type") == "bnpo" and forwards > 1:
        raise ValueError(
            f"loss_type='bnpo' divides by the tokens of each forward, and an update has {forwards} of them; "
            "use 'dapo', which divides by the tokens of the batch"
        )


def spelled(name: str, word: object) -> tuple[str, Callable]:
    """Return the keyword for a name of WORDS, and its value.

    Raises:
        ValueError: The word is not in the table.
    """
    keyword, words = WORDS[name]
    if word not in list(words):
        known = ", ".join(map(repr, words))
        others = "for others give Recipe's loss, loss_reduction or lr_schedule"
        raise ValueError(f"{name}={word!r} is none of {known}; {others}")
    return keyword, words[word]


def batch_sizes(given: dict[str, Any]) -> dict[str, Any]:
    """Return micro_batch_size (completions) and train_batch_size (prompts) for TRL's BATCH_SIZES; {} without them.

    Raises:
        ValueError: A forward would split a group.
    """
    if not given.keys() & set(BATCH_SIZES):
        return {}
    rows, forwards = given.get(BATCH_SIZES[0]), given.get(BATCH_SIZES[1], 1)
    if rows is None:
        raise ValueError(f"gradient_accumulation_steps={forwards} needs per_device_train_batch_size, in completions")
    group = max(1, given.get("num_generations", Recipe.num_generations))  # Recipe refuses less than 1
    if rows % group:
        wrong = f"per_device_train_batch_size={rows} is not a multiple of num_generations={group}"
        raise ValueError(
            f"{wrong}, and a forward has whole groups here; use a multiple, or train_batch_size, in prompts"
        )
    return {"micro_batch_size": rows, "train_batch_size": rows * forwards * launched() // group}


def bind(settings: dict[str, Any], path: str, value: object) -> None:
    """Set a keyword of a setting's function or of the sampler's options; `path` is as in SAME."""
    name, _, keyword = path.partition(".")
    if name == "sampler_options":
        settings[name] = {**(settings.get(name) or {}), keyword: value}
        return
    function: Callable = settings.get(name) or (ppo_clip if name == "loss" else group_relative)
    if keyword not in inspect.signature(function).parameters:
        raise ValueError(f"{keyword}={value!r} is not a keyword of the {name}; leave one of them out")
    if isinstance(value, bool):  # TRL's older form of scale_rewards
        value = "group" if value else "none"
    settings[name] = partial(function, **{keyword: value})


def with_trl_names(function: Callable[..., Recipe]) -> Callable[..., Recipe]:
    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Recipe:
        return function(*arguments, **translated(function, keywords))

    return call
