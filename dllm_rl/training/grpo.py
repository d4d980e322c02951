"""GRPO in one call: a model, a data set and reward functions."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dllm_rl.likelihoods.estimators import causal, trajectory
from dllm_rl.models.base import Policy
from dllm_rl.models.checkpoint.families import find_family
from dllm_rl.models.checkpoint.loading import checkpoint_folder, read_config
from dllm_rl.recipe import Recipe
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.unmask import unmask
from dllm_rl.tasks.datasets import RewardFunction, hold_out, in_memory, task_from_dataset
from dllm_rl.training.finish import Summary
from dllm_rl.training.loop import train

SEGMENTS = 8  # views of a trajectory that takes more steps than this


def grpo(
    model: str | Policy | Callable[..., Policy],
    dataset: Any,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    **settings: Any,
) -> Summary:
    """Train a model with TRL-style reward functions; returns its summary, with the trained `policy` as an attribute.

        grpo("GSAI-ML/LLaDA-8B-Instruct", dataset, [correct, short], reward_weights=[1.0, 0.1], lora=lora_r16)

    The arguments are those of `grpo_recipe`: print its recipe to see every setting.
    """
    return train(grpo_recipe(model, dataset, reward_funcs, **settings))


def grpo_recipe(
    model: str | Policy | Callable[..., Policy],
    dataset: Any,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    *,
    eval_dataset: Any = None,
    reward_weights: Sequence[float] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    sampler_options: dict[str, Any] | None = None,
    max_rows: int | None = None,
    **settings: Any,
) -> Recipe:
    """The recipe of `grpo`, with the sampler and the likelihood that the model's attention needs.

    model           a checkpoint's folder, a hub id, a policy, or a function that makes one.
    dataset         rows with a `prompt` (text or chat messages); the other columns go to the reward functions.
    reward_funcs    f(prompts=, completions=, **columns) -> numbers or None, sync or async; logged as rewards/NAME/mean.
    eval_dataset    held-out rows; None: the last tenth of `dataset`, at most 256 rows.
    reward_weights  one per function, 1 by default; advantages=decoupled normalises each reward before weighing it.
    sampler_options keywords of `unmask` or `autoregress`: num_steps (unmasking; default one per token), top_p ...
    max_rows        rows to read of a data set without a length, as a streamed one.
    settings        fields of Recipe: num_steps (RL steps), learning_rate, lora, rollout_quantization, corrector ...

    The trajectory is scored exactly up to 8 steps, in 8 segments above. Raises ValueError if there are too few rows.
    """
    rows = in_memory(dataset, max_rows)
    if eval_dataset is None:
        training, held_out = hold_out(rows)
    else:
        training = rows
        held_out = in_memory(eval_dataset, max_rows)
    task_of = partial(task_from_dataset, reward_funcs=reward_funcs, weights=reward_weights)
    name = settings.pop("name", Path(model).name.lower() if isinstance(model, str) else "grpo")
    task = task_of(training, name=name)
    eval_task = task_of(held_out, name=f"{name}-held-out")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens} | dict(sampler_options or {})
    steps = options.get("num_steps") or max_new_tokens
    sampler = partial(unmask, **options)
    likelihood = trajectory(num_segments=None if steps <= SEGMENTS else SEGMENTS)
    if isinstance(model, str):
        attention = find_family(read_config(checkpoint_folder(model))).attention  # the config alone says it
    else:
        attention = (model if isinstance(model, Policy) else model()).spec.attention
    if attention == "causal":  # an autoregressive model writes from left to right, and is scored in one view
        sampler = partial(autoregress, **options)
        likelihood = causal()
    fixed: dict[str, Any] = {
        "name": name,
        "model": model,
        "task": task,
        "validation_task": eval_task,
        "eval_task": eval_task,
        "sampler": partial(sampler, temperature=temperature),
        "eval_sampler": partial(sampler, temperature=0.0),
        "likelihood": likelihood,
    }
    return Recipe(**fixed | settings)
