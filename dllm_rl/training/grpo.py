"""GRPO in one call: a model, a data set and reward functions."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dllm_rl.algorithms.losses import fixed_length_mean
from dllm_rl.likelihoods.estimators import causal, trajectory
from dllm_rl.models.base import Policy, Tokenizer
from dllm_rl.models.checkpoint.families import find_family
from dllm_rl.models.checkpoint.loading import load_config
from dllm_rl.models.policy import make_policy
from dllm_rl.presets import find_preset, num_parameters, preset_by_size, say_preset, without_groups
from dllm_rl.recipe import Recipe, check_kind
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.records import as_commit
from dllm_rl.samplers.renoise import renoise
from dllm_rl.samplers.rules import schedule
from dllm_rl.samplers.unmask import unmask
from dllm_rl.tasks.datasets import RewardFunction, in_memory, task_from_dataset, training_and_held_out
from dllm_rl.training.finish import Summary
from dllm_rl.training.policies import called
from dllm_rl.training.trainer import train
from dllm_rl.training.trl_names import with_trl_names

EXACT_STEPS = 3  # a trajectory of so many steps is scored exactly
SEGMENTS = 8  # at most, of a longer one
TOKENS_PER_STEP = 2  # of a large model, as LLaDA's papers decode


def grpo(
    model: str | nn.Module | Policy | Callable[..., Policy],
    train_dataset: Any,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    **settings: Any,
) -> Summary:
    """Train a model with TRL-style reward functions; returns its summary, with the trained `policy` as an attribute.

        grpo("GSAI-ML/LLaDA-8B-Instruct", rows, [correct, short], reward_weights=[1.0, 0.1])

    A model of a billion parameters or more takes a preset (`dllm_rl.presets`), whose name and settings are printed;
    the defaults are of small models.

    The arguments are those of `grpo_recipe`: print its recipe to see every setting.
    """
    return train(grpo_recipe(model, train_dataset, reward_funcs, **settings))


@contextmanager
def names_field(field: str) -> Iterator[None]:
    """Put the name of an argument before the message of a ValueError in the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


@with_trl_names
def grpo_recipe(
    model: str | nn.Module | Policy | Callable[..., Policy],
    train_dataset: Any,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    *,
    processing_class: Tokenizer = None,
    eval_dataset: Any = None,
    eval_split: float | None = None,
    reward_weights: Sequence[float] | None = None,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    sampler_options: dict[str, Any] | None = None,
    max_rows: int | None = None,
    preset: str | None = None,
    **settings: Any,
) -> Recipe:
    """The recipe of `grpo`, with the sampler and the likelihood that the model's attention needs.

    Args:
        model: A checkpoint's folder, a hub id, a transformers model, a policy, or a function that makes one and may
            take the seed.
        train_dataset: Rows with a `prompt` (text or chat messages); the other columns go to the reward functions.
        reward_funcs: F(prompts=, completions=, **columns) -> numbers or None, sync or async; logged as
            rewards/NAME/mean.
        processing_class: The tokenizer of a transformers model; training copies the model.
        eval_dataset: Held-out rows; None: the last ones of `train_dataset`.
        eval_split: How many these are: a share below 1, or a number; None: a tenth, at most 256 rows.
        reward_weights: One per function, 1 by default; advantages=decoupled normalises each reward before weighing it.

    sampler_options keywords of `unmask`, `autoregress` or `renoise`: diffusion_steps (of unmasking; default one per
                    token), top_p ... A max_new_tokens or temperature in them replaces the argument of that name.

    Args:
        max_rows: Rows to read of a data set without a length, as a streamed one.
        preset: Settings that stand where nothing is given: "d1", "large" ... (`dllm_rl.presets`); None: by the model's
            size, from a billion parameters on; "none": the defaults.
        settings: Fields of Recipe: num_steps (RL steps), learning_rate, lora, rollout_quantization, corrector ...

    TRL's names are taken where they mean the same (docs/trl.md). A sampler that takes at most 3 steps is scored
    exactly, and so is the commit rule `soft_threshold`; one that takes more, in a segment for every four steps, 2 to 8.
    Raises ValueError on too few rows and on an unknown setting.
    """
    model = as_model(model, processing_class)
    if callable(train_dataset):
        raise ValueError("train_dataset is a function; the order is grpo(model, train_dataset, reward_funcs)")
    rows = in_memory(train_dataset, max_rows)
    with names_field("eval_dataset"):
        given = None if eval_dataset is None else in_memory(eval_dataset, max_rows)
    training, held_out = training_and_held_out(rows, given, eval_split)
    task_of = partial(task_from_dataset, reward_funcs=reward_funcs, weights=reward_weights)
    name = settings.pop("name", Path(model).name.lower() if isinstance(model, str) else "grpo")
    task = task_of(training, name=name)
    with names_field("train_dataset" if eval_dataset is None else "eval_dataset"):
        eval_task = task_of(held_out, name=f"{name}-held-out")
    if isinstance(model, str):
        attention = find_family(load_config(model)).attention  # no weights are fetched for it
        sized: str | Policy = model
    else:
        sized = model if isinstance(model, Policy) else called(model, settings.get("seed", Recipe.seed))
        attention = sized.spec.attention
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, **(sampler_options or {})}
    if temperature is not None:
        options.setdefault("temperature", temperature)
    preset = preset_by_size(attention, num_parameters(sized)) if preset is None else preset
    if preset not in (None, "none"):
        options, settings = take_preset(preset, name, options, settings, is_path=isinstance(model, str))
    options.setdefault("temperature", 1.0)
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
        sampler = partial(unmask, **options)
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
    if settings.get("loss_reduction") is fixed_length_mean:  # Dr. GRPO's constant is the length of a completion
        settings["loss_reduction"] = partial(fixed_length_mean, length=taken["max_new_tokens"])
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


def take_preset(
    preset: str, task: str, options: dict[str, Any], settings: dict[str, Any], *, is_path: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sampler's keywords and the recipe's fields with a preset's, where the caller gives none; prints them."""
    fields, keywords = find_preset(preset).for_task(task)
    fields = without_groups(fields, settings)
    if not is_path:  # the module has its own
        fields = {field: value for field, value in fields.items() if field not in ("dtype", "base_quantization")}
    length = options["max_new_tokens"]
    size = options.get("block_size", keywords.get("block_size"))
    if keywords and "diffusion_steps" not in keywords and length % (size or 2) == 0:
        keywords["diffusion_steps"] = length // TOKENS_PER_STEP
    if "sampler" in settings:  # the caller's own
        keywords = {}
    fields = {field: value for field, value in fields.items() if field not in settings}
    keywords = {keyword: value for keyword, value in keywords.items() if keyword not in options}
    say_preset(preset, fields | keywords)
    return keywords | options, fields | settings


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
