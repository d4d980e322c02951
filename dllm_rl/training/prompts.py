"""The prompts that a run learns from, and the check that they fit the model."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from dllm_rl.algorithms.prompt_sources import RewardHistory
from dllm_rl.distributed.stop import as_written
from dllm_rl.members import describe
from dllm_rl.models.base import Policy
from dllm_rl.models.tokens import prompt_ids
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for
from dllm_rl.tasks.base import Problem, Task, check_filled

CHECKED = 5000  # prompts per task that are tokenized before a run begins
HISTORY = "reward_history.safetensors"  # file in a checkpoint
SECONDS = 10.0  # limit for the prompts of a task: some tasks make problems slowly


def draw_indices(num_problems: int, size: int, *key: object) -> Int[Tensor, " size"]:
    """Draw a step's problems for all processes, with replacement: a pure function of the key."""
    return torch.randint(num_problems, (size,), generator=generator_for(*key))


def prompt_indices(
    recipe: Recipe, history: RewardHistory | None, step: int, draw: int = 0
) -> Int[Tensor, " train_batch_size"]:
    """Return the problems of a step, over all processes, from the recipe's `prompt_source`.

    Args:
        recipe: Settings of the run.
        history: Graded completions of the run. None for a source that reads none.
        step: Training step.
        draw: Number of the draw in the step: 0, then the draws of dynamic sampling.

    Raises:
        ValueError: The source did not return `train_batch_size` indices of the task.
    """
    source, count, size = recipe.prompt_source, recipe.train_batch_size, len(recipe.task)
    purpose = f"train, draw {draw}" if draw else "train"
    history = RewardHistory(size) if history is None else history
    indices = source.draw(history, count, generator_for(recipe.seed, purpose, step))
    name = f"prompt_source={describe(source)}"
    if not isinstance(indices, Tensor) or indices.shape != (count,) or indices.dtype != torch.long:
        raise ValueError(f"{name} must return a tensor of train_batch_size={count} whole numbers")
    if indices.min() < 0 or indices.max() >= size:
        wrong = f"{name} gave the indices {int(indices.min())} to {int(indices.max())}"
        raise ValueError(f"{wrong}, and task {recipe.task.name!r} has the problems 0 to {size - 1}")
    return indices


def reward_history(recipe: Recipe, folder: Path | None) -> RewardHistory | None:
    """Return the history that a run continues: a checkpoint's, or an empty one; None if the source reads no history.

    Raises:
        ValueError: The checkpoint's file is damaged.
    """
    if not recipe.prompt_source.uses_history:
        return None
    size = len(recipe.task)
    if folder is None or not (folder / HISTORY).exists():  # the run began with another source
        return RewardHistory(size)
    try:
        return RewardHistory(size, **safetensors.load((folder / HISTORY).read_bytes()))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{folder}: {HISTORY} is damaged: {error}; take an earlier checkpoint") from None


def history_files(history: RewardHistory | None, step: int) -> dict[str, bytes]:
    """Return the history's file in a checkpoint of the state after `step` steps."""
    return {} if history is None else {HISTORY: safetensors.save(history.before(step).tensors())}


def choose(recipe: Recipe, policy: Policy, indices: Sequence[int]) -> tuple[list[Problem], int]:
    """Return the problems at `indices`, and how many were replaced. A prompt longer than max_prompt_length is replaced
    by the task's next prompt that fits.

    Raises:
        ValueError: No prompt fits.
    """
    task = recipe.task
    most = recipe.max_prompt_length
    if most is None:
        return [task[i] for i in indices], 0
    chosen = []
    replaced = 0
    for index in indices:
        for k in range(len(task)):
            problem = task[(index + k) % len(task)]
            if len(prompt_ids(policy, problem.prompt, problem.blank)) <= most:
                chosen.append(problem)
                replaced += k > 0
                break
        else:
            raise ValueError(f"max_prompt_length={most}: every prompt of task {task.name!r} is longer; raise it")
    return chosen, replaced


def check_tasks(recipe: Recipe) -> None:
    """Raise ValueError if a task has no problems. It needs no model."""
    for field in ("task", "validation_task", "eval_task"):
        check_filled(field, getattr(recipe, field))


def check_prompts(recipe: Recipe, policy: Policy) -> int:
    """Check the prompts of all three tasks, at most 5000 prompts and 10 seconds each.

    Returns:
        Index of the training task's longest prompt; 0 if no prompt was checked.

    Raises:
        ValueError: A prompt and its completion exceed the model's positions.
    """
    limit = policy.spec.max_length
    trained = getattr(recipe.sampler, "keywords", {}).get("max_new_tokens")
    evaluated = getattr(recipe.eval_sampler, "keywords", {}).get("max_new_tokens")
    if limit is None or trained is None or evaluated is None:
        return 0
    new = max(trained, evaluated)
    if new >= limit:
        raise ValueError(
            f"max_new_tokens={new} leaves no room for a prompt in the model's {limit} positions; "
            "lower it in sampler and eval_sampler"
        )
    most = recipe.max_prompt_length
    if most is not None and most + trained > limit:
        both = f"max_prompt_length={most} and max_new_tokens={trained}"
        raise ValueError(f"{both} exceed the model's {limit} positions; use at most {limit - trained}")
    _longest(recipe, policy, "validation_task", _first(recipe.validation_task), room=limit, new=evaluated)
    _longest(recipe, policy, "eval_task", _first(recipe.eval_task), room=limit, new=evaluated)
    if most is not None:  # `choose` checks training prompts as they are drawn
        return 0
    return _longest(recipe, policy, "task", _drawn(recipe), room=limit, new=trained)


def _longest(recipe: Recipe, policy: Policy, field: str, indices: Iterable[int], *, room: int, new: int) -> int:
    """Return the problem of `field` with the longest prompt.

    Raises:
        ValueError: A prompt and `new` tokens exceed `room`.
    """
    began = time.monotonic()
    longest = 0
    found = 0
    for index in indices:
        if time.monotonic() - began > SECONDS:
            break
        problem = getattr(recipe, field)[index]
        try:
            length = len(prompt_ids(policy, problem.prompt, problem.blank))
        except ValueError as error:
            raise ValueError(f"{field}: problem {index}: {error}") from None
        if length + new > room:
            other = as_written(max_prompt_length=room - new)
            remedy = f"{other} takes another in its place" if field == "task" else "shorten it"
            raise ValueError(
                f"{field}: the prompt of problem {index} has {length} tokens and its completion {new}, more than "
                f"the model's {room} positions; {remedy}"
            )
        if length > longest:
            longest = length
            found = index
    return found


def _first(task: Task) -> range:
    return range(min(len(task), CHECKED))


def _drawn(recipe: Recipe) -> Iterable[int]:
    """Return all problems of the task, or the first problems that its steps draw."""
    size = len(recipe.task)
    if size <= CHECKED:  # all of them, within the time limit
        return range(size)
    drawn: dict[int, None] = {}  # in order, without repeats
    for step in range(recipe.num_steps):
        drawn |= dict.fromkeys(prompt_indices(recipe, None, step).tolist())
        if len(drawn) >= CHECKED:
            break
    return drawn
