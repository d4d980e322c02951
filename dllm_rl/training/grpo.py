"""GRPO in one call: a model, a data set and reward functions."""

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial, wraps
from pathlib import Path
from typing import Any

from torch import nn

from dllm_rl.algorithms.advantages import group_relative
from dllm_rl.algorithms.losses import ppo_clip
from dllm_rl.likelihoods.estimators import causal, trajectory
from dllm_rl.models.base import Policy, Tokenizer
from dllm_rl.models.checkpoint.families import find_family
from dllm_rl.models.checkpoint.loading import checkpoint_folder, read_config
from dllm_rl.models.policy import make_policy
from dllm_rl.recipe import Recipe
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.by_name import ADAPTIVE
from dllm_rl.samplers.rules import max_prob
from dllm_rl.samplers.unmask import unmask
from dllm_rl.tasks.datasets import RewardFunction, hold_out, in_memory, task_from_dataset
from dllm_rl.training.finish import Summary
from dllm_rl.training.loop import train
from dllm_rl.training.policies import called

EXACT_STEPS = 4  # a trajectory of so many steps is scored exactly
SEGMENTS = 8  # at most, of a longer one

# TRL's names; docs/trl.md has both tables. A name of the same meaning is taken: the keyword of grpo_recipe or, behind a
# dot, of what the keyword holds.
SAME = {
    "max_completion_length": "max_new_tokens",
    "max_steps": "num_steps",
    "run_name": "name",
    "hub_model_id": "push_to_hub",
    "tokenizer": "processing_class",
    "top_k": "sampler_options.top_k",
    "top_p": "sampler_options.top_p",
    "epsilon": "loss.epsilon",
    "epsilon_high": "loss.epsilon_high",
    "delta": "loss.delta",
    "scale_rewards": "advantages.scale_rewards",
}
# Other names are refused with what is nearest here.
NEAREST = {
    "args": "a keyword for each of its fields, as learning_rate=1e-6",
    "per_device_train_batch_size": "train_batch_size, in prompts per step over all processes",
    "generation_batch_size": "train_batch_size, in prompts per step over all processes",
    "gradient_accumulation_steps": "micro_batch_size, in completions per forward",
    "steps_per_generation": "num_iterations, updates per rollout",
    "num_train_epochs": "num_steps",
    "per_device_eval_batch_size": "eval_batch_size",
    "eval_strategy": "eval_steps",
    "save_strategy": "save_steps",
    "lr_scheduler_type": "lr_schedule, a function",
    "warmup_ratio": "lr_schedule, a function",
    "loss_type": "loss and aggregate, functions",
    "importance_sampling_level": "loss=gspo with aggregate=sequence",
    "multi_objective_aggregation": "advantages=decoupled",
    "vllm_importance_sampling_mode": "corrector",
    "vllm_importance_sampling_cap": "corrector=tis(cap=2.0)",
    "use_vllm": "rollout_quantization, for rollouts in the training process",
    "generation_kwargs": "sampler_options",
    "min_p": "top_p",
    "peft_config": "lora=lora_r16",
    "quantization_config": "base_quantization",
    "model_init_kwargs": "dtype",
    "fp16": "dtype='float16' with lora",
    "log_completions": "log_completions_steps",
}


def grpo(
    model: str | nn.Module | Policy | Callable[..., Policy],
    train_dataset: Any,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    **settings: Any,
) -> Summary:
    """Train a model with TRL-style reward functions; returns its summary, with the trained `policy` as an attribute.

        grpo("GSAI-ML/LLaDA-8B-Instruct", rows, [correct, short], reward_weights=[1.0, 0.1], lora=lora_r16)

    The arguments are those of `grpo_recipe`: print its recipe to see every setting.
    """
    return train(grpo_recipe(model, train_dataset, reward_funcs, **settings))


def translated(given: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `grpo_recipe` for these, which may have TRL's names. Raises ValueError on an unknown name."""
    known = inspect.signature(grpo_recipe).parameters.keys() - {"settings"} | {field.name for field in fields(Recipe)}
    found: dict[str, Any] = {}
    for name, value in given.items():
        path = SAME.get(name, name)
        if path.partition(".")[0] not in known:
            near = [NEAREST[name]] if name in NEAREST else difflib.get_close_matches(name, known | SAME.keys(), n=1)
            hint = f"the nearest is {near[0]}" if near else "help(dllm_rl.Recipe) lists all"
            raise ValueError(f"{name} is not a setting of grpo; {hint}")
        if path in found:
            raise ValueError(f"{path} is given twice, once by TRL's name; give it once")
        found[path] = value
    if "max_steps" in given and given.get("num_iterations", 1) > 1:
        raise ValueError("max_steps counts updates, and num_iterations of them are one step here; give num_steps")
    if isinstance(found.get("report_to"), list):
        found["report_to"] = ",".join(found["report_to"]) or "none"
    for path in [path for path in found if "." in path]:
        bind(found, path, found.pop(path))
    return found


def bind(settings: dict[str, Any], path: str, value: Any) -> None:
    """Set a keyword of what a setting holds, of a function or of the sampler's options; `path` as in SAME."""
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
        return function(*arguments, **translated(keywords))

    return call


@with_trl_names
def grpo_recipe(
    model: str | nn.Module | Policy | Callable[..., Policy],
    train_dataset: Any,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    *,
    processing_class: Tokenizer = None,
    eval_dataset: Any = None,
    reward_weights: Sequence[float] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    sampler_options: dict[str, Any] | None = None,
    max_rows: int | None = None,
    **settings: Any,
) -> Recipe:
    """The recipe of `grpo`, with the sampler and the likelihood that the model's attention needs. Positions are ranked
    by `max_prob`.

    model           a checkpoint's folder, a hub id, a transformers model, a policy, or a function that makes one and
                    may take the seed.
    train_dataset   rows with a `prompt` (text or chat messages); the other columns go to the reward functions.
    reward_funcs    f(prompts=, completions=, **columns) -> numbers or None, sync or async; logged as rewards/NAME/mean.
    processing_class  the tokenizer of a transformers model; training copies the model.
    eval_dataset    held-out rows; None: the last tenth of `train_dataset`, at most 256 rows.
    reward_weights  one per function, 1 by default; advantages=decoupled normalises each reward before weighing it.
    sampler_options keywords of `unmask` or `autoregress`: num_steps (unmasking; default one per token), top_p ...
                    A max_new_tokens or temperature in them replaces the argument of that name.
    max_rows        rows to read of a data set without a length, as a streamed one.
    settings        fields of Recipe: num_steps (RL steps), learning_rate, lora, rollout_quantization, corrector ...

    TRL's names are taken where they mean the same (docs/trl.md). A sampler that takes at most 4 steps is scored
    exactly; one that takes more, in a segment for every four steps, 2 to 8. Raises ValueError on too few rows and on an
    unknown setting.
    """
    model = as_model(model, processing_class)
    if callable(train_dataset):
        raise ValueError("train_dataset is a function; the order is grpo(model, train_dataset, reward_funcs)")
    rows = in_memory(train_dataset, max_rows)
    if eval_dataset is None:
        training, held_out = hold_out(rows)
    else:
        training = rows
        held_out = in_memory(eval_dataset, max_rows)
    task_of = partial(task_from_dataset, reward_funcs=reward_funcs, weights=reward_weights)
    name = settings.pop("name", Path(model).name.lower() if isinstance(model, str) else "grpo")
    task = task_of(training, name=name)
    eval_task = task_of(held_out, name=f"{name}-held-out")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    options |= sampler_options or {}
    if isinstance(model, str):
        attention = find_family(read_config(checkpoint_folder(model))).attention  # the config alone says it
    else:
        policy = model if isinstance(model, Policy) else called(model, settings.get("seed", Recipe.seed))
        attention = policy.spec.attention
    sampler: partial
    if attention == "causal":  # an autoregressive model writes from left to right, and is scored in one view
        sampler = partial(autoregress, **options)
        likelihood = causal()
    else:
        # `unmask`'s own rank, LLaDA's `confidence`, is not shown to learn more (docs/concepts.md), and its law costs
        # time.
        sampler = partial(unmask, **{"rank": max_prob, **options})
        likelihood = trajectory(num_segments=segments_for(settings.get("sampler", sampler), max_new_tokens))
    for option in options.keys() - inspect.signature(sampler.func).parameters:
        kind = sampler.func.__name__
        raise ValueError(f"sampler_options: {option!r} is not a keyword of {kind}; help(dllm_rl.{kind}) lists them")
    fixed: dict[str, Any] = {
        "name": name,
        "model": model,
        "task": task,
        "validation_task": eval_task,
        "eval_task": eval_task,
        "sampler": sampler,
        "eval_sampler": partial(sampler, temperature=0.0),
        "likelihood": likelihood,
    }
    return Recipe(**fixed | settings)


def segments_for(sampler: Callable, max_new_tokens: int) -> int | None:
    """Into how many segments to merge the steps that a sampler takes at most; None: each step is scored, exactly.

    max_new_tokens  the completion's length where the sampler does not bind one
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens} | getattr(sampler, "keywords", {})
    steps = options["max_new_tokens"]  # one per token, which is also what a rule that ignores num_steps may take
    commit = options.get("commit")
    if options.get("num_steps") and getattr(commit, "func", commit) not in ADAPTIVE:
        steps = options["num_steps"]
    # A segment's forward and backward cost three steps of the rollout. In equal time two segments of eight steps teach
    # more than all eight (recipes/studies/league.md).
    return None if steps <= EXACT_STEPS else max(2, min(SEGMENTS, steps // 4))


def as_model(model: Any, tokenizer: Tokenizer) -> str | Policy | Callable[..., Policy]:
    """The model for a recipe: a policy of a transformers model and its tokenizer. Raises ValueError on one alone."""
    kind = type(model).__name__
    if isinstance(model, nn.Module) and not isinstance(model, Policy):
        if tokenizer is None:
            raise ValueError(f"processing_class=None: a loaded {kind} needs its tokenizer; give processing_class=")
        return make_policy(model, tokenizer)
    if tokenizer is not None:
        raise ValueError(f"processing_class is for a loaded model; leave it out, a model of type {kind} has its own")
    return model
