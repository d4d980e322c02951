"""GRPO in one call: a model, a data set and reward functions."""

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial, wraps
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import nn

from dllm_rl.algorithms import optimizers
from dllm_rl.algorithms.advantages import group_relative
from dllm_rl.algorithms.losses import constant, gspo, ppo_clip, sequence, token
from dllm_rl.distributed.collectives import launched
from dllm_rl.likelihoods.estimators import causal, trajectory
from dllm_rl.models.base import Policy, Tokenizer
from dllm_rl.models.checkpoint.families import find_family
from dllm_rl.models.checkpoint.loading import load_config
from dllm_rl.models.policy import make_policy
from dllm_rl.recipe import Recipe, check_kind, fitted
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.records import as_commit
from dllm_rl.samplers.renoise import renoise
from dllm_rl.samplers.rules import max_prob, schedule
from dllm_rl.samplers.unmask import unmask
from dllm_rl.tasks.datasets import RewardFunction, hold_out, in_memory, task_from_dataset
from dllm_rl.training.finish import Summary
from dllm_rl.training.policies import called
from dllm_rl.training.trainer import train

EXACT_STEPS = 3  # a trajectory of so many steps is scored exactly
SEGMENTS = 8  # at most, of a longer one

# TRL's names; docs/trl.md has both tables. A name of the same meaning is taken: the keyword of grpo_recipe or, behind a
# dot, of what the keyword holds.
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
# A name that takes a word: the keyword, and what it holds for each word that means one thing here.
WORDS: dict[str, tuple[str, dict[str, Callable]]] = {
    "loss_type": ("aggregate", {"grpo": sequence, "dapo": token, "bnpo": token, "dr_grpo": constant}),
    # The level alone: epsilon stays 0.2, and epsilon_high what epsilon is. GSPO's own bounds are those of loss=gspo.
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
# Other names are refused with what is nearest here.
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
}


def grpo(
    model: str | nn.Module | Policy | Callable[..., Policy],
    train_dataset: Any,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    **settings: Any,
) -> Summary:
    """Train a model with TRL-style reward functions; returns its summary, with the trained `policy` as an attribute.

        grpo("GSAI-ML/LLaDA-8B-Instruct", rows, [correct, short], reward_weights=[1.0, 0.1], lora=lora_r16,
             learning_rate=3e-6, micro_batch_size=8)

    The default learning rate, 5e-4, is of small models: set it for a published one.

    The arguments are those of `grpo_recipe`: print its recipe to see every setting.
    """
    return train(grpo_recipe(model, train_dataset, reward_funcs, **settings))


def translated(given: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `grpo_recipe` for these, which may have TRL's names. Raises ValueError on an unknown name."""
    types = {name: parameter.annotation for name, parameter in inspect.signature(grpo_recipe).parameters.items()}
    types = {field.name: field.type for field in fields(Recipe)} | types  # `model` has one form more here
    known = types.keys() - {"settings"}
    given = {name: value if name == "model" else fitted(name, types.get(name), value) for name, value in given.items()}
    check_counts(given)
    for name in given.keys() & known - {"report_to"}:  # TRL's is a list
        check_kind(name, types[name], given[name])
    found = batch_sizes(given)
    same = dict(SAME)
    if "lr_scheduler_type" in given and given.get("warmup_steps"):  # else Recipe's own, which counts supervised steps
        same["warmup_steps"] = "lr_schedule.warmup_steps"
    for name, value in given.items():
        if name in BATCH_SIZES or (name == "sync_ref_model" and value is False):  # False: the reference stays, as here
            continue
        path, value = spelled(name, value) if name in WORDS else (same.get(name, name), value)
        if path.partition(".")[0] not in known:
            near = [NEAREST[name]] if name in NEAREST else difflib.get_close_matches(name, known | SAME.keys(), n=1)
            hint = f"the nearest is {near[0]}" if near else "help(dllm_rl.Recipe) lists all"
            raise ValueError(f"{name} is not a setting of grpo; {hint}")
        if path in found:
            raise ValueError(f"{path} is given twice, once by TRL's name; give it once")
        found[path] = value
    if isinstance(found.get("report_to"), list):
        found["report_to"] = ",".join(found["report_to"]) or "none"
    for path in [path for path in found if "." in path]:
        bind(found, path, found.pop(path))
    return found


def check_counts(given: dict[str, Any]) -> None:
    """Raise ValueError on TRL's numbers that are no whole numbers, or that count what a step here has several of."""
    for name in (*BATCH_SIZES, "num_generations", "warmup_steps"):
        if not isinstance(given.get(name, 0), Integral):
            raise ValueError(f"{name}={given[name]!r} must be a whole number")
    if given.get("num_iterations", 1) > 1:
        for name, remedy in (("max_steps", "num_steps"), ("lr_scheduler_type", "lr_schedule, a function")):
            if given.get(name, "constant") != "constant":  # a constant rate counts nothing
                raise ValueError(f"{name} counts updates, and num_iterations of them are one step here; give {remedy}")
    forwards = given.get("gradient_accumulation_steps", 1) * launched()
    if given.get("loss_type") == "bnpo" and forwards > 1:
        raise ValueError(
            f"loss_type='bnpo' divides by the tokens of each forward, and an update has {forwards} of them; "
            "use 'dapo', which divides by the tokens of the batch"
        )


def spelled(name: str, word: Any) -> tuple[str, Callable]:
    """The keyword for a name of WORDS, and what it holds. Raises ValueError on a word that is not in the table."""
    keyword, words = WORDS[name]
    if word not in list(words):
        known = ", ".join(map(repr, words))
        raise ValueError(f"{name}={word!r} is none of {known}; for others give Recipe's loss, aggregate or lr_schedule")
    return keyword, words[word]


def batch_sizes(given: dict[str, Any]) -> dict[str, Any]:
    """micro_batch_size (completions) and train_batch_size (prompts) for TRL's BATCH_SIZES; {} without them. Raises
    ValueError where a forward would cut a group."""
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
    sampler_options keywords of `unmask`, `autoregress` or `renoise`: diffusion_steps (of unmasking; default one per
                    token), top_p ... A max_new_tokens or temperature in them replaces the argument of that name.
    max_rows        rows to read of a data set without a length, as a streamed one.
    settings        fields of Recipe: num_steps (RL steps), learning_rate, lora, rollout_quantization, corrector ...

    TRL's names are taken where they mean the same (docs/trl.md). A sampler that takes at most 3 steps is scored
    exactly, and so is the commit rule `soft_threshold`; one that takes more, in a segment for every four steps, 2 to 8.
    Raises ValueError on too few rows and on an unknown setting.
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
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, **(sampler_options or {})}
    if isinstance(model, str):
        attention = find_family(load_config(model)).attention  # no weights are fetched for it
    else:
        policy = model if isinstance(model, Policy) else called(model, settings.get("seed", Recipe.seed))
        attention = policy.spec.attention
    sampler: partial
    greedy: dict[str, Any] = {"temperature": 0.0}
    if attention == "causal":  # an autoregressive model writes from left to right
        sampler = partial(autoregress, **options)
    elif attention == "encoder_decoder":  # one whose noise is random tokens
        if options.pop("temperature") != 1.0:
            raise ValueError(f"temperature={temperature}: renoise has t_max and t_min; give these in sampler_options")
        sampler = partial(renoise, **{"answer": "drawn", **options})
        greedy = {"answer": "argmax"}
    else:
        # `unmask`'s own rank, LLaDA's `confidence`, is not shown to learn more (docs/concepts.md), and its law costs
        # time.
        sampler = partial(unmask, **{"rank": max_prob, **options})
    for option, value in options.items():
        if parameter := inspect.signature(sampler.func).parameters.get(option):
            check_kind(f"sampler_options: {option}", parameter.annotation, value)
    for option in options.keys() - inspect.signature(sampler.func).parameters:
        kind = sampler.func.__name__
        raise ValueError(
            f"sampler_options: {option!r} is not a keyword of {kind}; help(dllm_rl.samplers.{kind}) lists them"
        )
    # A recipe's own sampler takes the place of this one.
    taken = {"max_new_tokens": max_new_tokens} | getattr(settings.get("sampler", sampler), "keywords", {})
    segments = None if attention == "encoder_decoder" else segments_for(taken)
    if settings.get("aggregate") is constant:  # Dr. GRPO's constant is the length of a completion
        settings["aggregate"] = partial(constant, length=taken["max_new_tokens"])
    fixed: dict[str, Any] = {
        "name": name,
        "model": model,
        "task": task,
        "validation_task": eval_task,
        "eval_task": eval_task,
        "sampler": sampler,
        "eval_sampler": partial(sampler, **greedy),
        "likelihood": causal() if attention == "causal" else trajectory(num_segments=segments),
    }
    return Recipe(**fixed | settings)


def segments_for(options: dict[str, Any]) -> int | None:
    """Into how many segments to merge the steps that `unmask` takes at most; None: each step is scored, exactly."""
    commit = as_commit(options.get("commit", schedule))
    if commit.order == "soft_threshold":
        return None  # the chance of a set is that of one step
    steps = options["max_new_tokens"]  # one per token, which is also what a rule that ignores diffusion_steps may take
    if options.get("diffusion_steps") and not commit.adaptive:
        steps = options["diffusion_steps"]
    # A segment's forward and backward cost three steps of the rollout. In equal time two segments of four steps teach
    # more than all four, on two tasks, and two of eight steps more than all eight (recipes/studies/league.md).
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
