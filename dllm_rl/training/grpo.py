"""GRPO in one call, for those who come with a model, a data set and reward functions."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dllm_rl.likelihoods.estimators import LikelihoodEstimator, causal, trajectory
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
    """Train a model on a data set with TRL-style reward functions; returns what its summary.json holds, with the
    trained `policy` as an attribute.

        grpo("GSAI-ML/LLaDA-8B-Instruct", dataset, [correct, short], reward_weights=[1.0, 0.1], max_new_tokens=256,
             num_steps=500, lora=lora_r16)

    The arguments are those of `grpo_recipe`, which makes the recipe that is run: print it to see every setting.
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
    """The recipe of `grpo`: sampler and likelihood are those that the model's attention needs.

    model           a checkpoint's folder or a hub's id, a policy, or a function that makes one.
    dataset         rows with a `prompt`, text or chat messages; the other columns go to the reward functions.
    reward_funcs    f(prompts=, completions=, **columns) -> a number, or None, for each; plain or async. Each is logged
                    as rewards/NAME/mean.
    eval_dataset    held-out rows; None: the last tenth of `dataset`, at most 256 rows, is kept from training.
    reward_weights  of the functions in the reward; 1 each by default. With advantages=decoupled each is normalised in
                    its group on its own, before it is weighed.
    sampler_options further keywords of `unmask` or `autoregress`: num_steps (unmasking steps; by default one a token),
                    block_size, top_p ...
    max_rows        of a data set without a length, as a streamed one: so many rows are read into memory.
    settings        fields of Recipe: num_steps (RL steps), learning_rate, lora, rollout_quantization, corrector ...

    A diffusion model is scored by its trajectory, exactly where a completion takes at most 8 steps, and in 8 segments
    of it where it takes more. Raises ValueError on a data set that is empty, or has nothing left to hold out.
    """
    rows = in_memory(dataset, max_rows)
    if eval_dataset is None:
        training, held_out = hold_out(rows)
    else:
        training, held_out = rows, in_memory(eval_dataset, max_rows)
    task_of = partial(task_from_dataset, reward_funcs=reward_funcs, weights=reward_weights)
    name = settings.pop("name", Path(model).name.lower() if isinstance(model, str) else "grpo")
    task, eval_task = task_of(training, name=name), task_of(held_out, name=f"{name}-held-out")
    sampler, likelihood = _for_attention(attention_of(model), max_new_tokens, dict(sampler_options or {}))
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


def attention_of(model: str | Policy | Callable[..., Policy]) -> str:
    """The attention of a model, from its config alone where it is a path."""
    if isinstance(model, str):
        return find_family(read_config(checkpoint_folder(model))).attention
    return (model if isinstance(model, Policy) else model()).spec.attention


def _for_attention(
    attention: str, max_new_tokens: int, options: dict[str, Any]
) -> tuple[Callable, LikelihoodEstimator]:
    options = {"max_new_tokens": max_new_tokens} | options
    if attention == "causal":
        return partial(autoregress, **options), causal()
    steps = options.get("num_steps") or max_new_tokens
    return partial(unmask, **options), trajectory(num_segments=None if steps <= SEGMENTS else SEGMENTS)
