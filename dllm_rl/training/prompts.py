"""Check that the prompts of a run fit its model; keep its history of rewards."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors

from dllm_rl.algorithms.prompt_sources import RewardHistory
from dllm_rl.decoding.chat import NO_ARGUMENTS
from dllm_rl.decoding.prompts import ids_and_blanks
from dllm_rl.distributed.stop import as_written
from dllm_rl.models.base import Policy
from dllm_rl.recipe import Recipe
from dllm_rl.samplers import Sampler
from dllm_rl.samplers.unmask import check_number_of_steps
from dllm_rl.step.collect import prompt_indices
from dllm_rl.step.settings import StepSettings
from dllm_rl.tasks.base import Problem, Task
from dllm_rl.tasks.datasets import DatasetTask, Source

MAX_CHECKED_PROMPTS = 5000  # at most this many prompts per task are tokenized before a run begins
HISTORY = "reward_history.safetensors"  # file in a checkpoint
MAX_SECONDS = 10.0  # time limit of this check per task: some tasks generate problems slowly


def reward_history(size: int, folder: Path | None) -> RewardHistory:
    """Return the history of rewards of a task's `size` problems: from a checkpoint's folder, or empty.

    Raises:
        ValueError: The checkpoint's file is damaged.
    """
    if folder is None or not (folder / HISTORY).exists():
        return RewardHistory(size)  # without the file, the run began with another prompt source
    try:
        return RewardHistory(size, **safetensors.load((folder / HISTORY).read_bytes()))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{folder}: {HISTORY} is damaged: {error}; take an earlier checkpoint") from None


def history_files(history: RewardHistory, step: int) -> dict[str, bytes]:
    """Return the history's file, by name, for a checkpoint after `step` steps; {} for an empty history."""
    return {HISTORY: safetensors.save(history.before(step).tensors())} if len(history.step) else {}


def check_prompts(recipe: Recipe, policy: Policy) -> int:
    """Check the prompts of all three tasks with their samplers, at most 5000 prompts and 10 seconds each.

    Returns:
        Index of the training task's longest prompt; 0 if no prompt was checked.

    Raises:
        ValueError: The tokenizer cannot write a prompt, a prompt and its completion exceed the model's positions, or
            a completion has fewer positions than the sampler has steps, or none.
    """
    max_positions = math.inf if policy.spec.max_length is None else policy.spec.max_length
    training_length = recipe.sampler.max_new_tokens
    longest_completion = max(training_length, recipe.eval_sampler.max_new_tokens)
    if longest_completion > max_positions:
        raise ValueError(
            f"max_new_tokens={longest_completion} is more than the model's {max_positions} positions; lower it in "
            "sampler and eval_sampler"
        )
    max_prompt_length = recipe.max_prompt_length
    if max_prompt_length is not None and max_prompt_length + training_length > max_positions:
        settings = f"max_prompt_length={max_prompt_length} and max_new_tokens={training_length}"
        raise ValueError(
            f"{settings} exceed the model's {max_positions} positions; use at most {max_positions - training_length}"
        )
    for field in ("validation_task", "eval_task"):
        task = getattr(recipe, field)
        problems = ((index, task[index]) for index in range(min(len(task), MAX_CHECKED_PROMPTS)))
        _longest_prompt(policy, places(field, task), problems, recipe.eval_sampler, max_positions)
    if max_prompt_length is not None:
        max_positions = math.inf  # `fitting_indices` replaces prompts that are too long as they are drawn
    indices = _training_indices(recipe, recipe.num_steps)
    problems = ((index, recipe.task[index]) for index in indices)
    remedy = "lower max_new_tokens"
    if training_length < max_positions:
        remedy += f"; or {as_written(max_prompt_length=max_positions - training_length)} replaces it by another prompt"
    index = _longest_prompt(policy, places("task", recipe.task), problems, recipe.sampler, max_positions, remedy)
    return index if max_prompt_length is None else 0


def check_rows(
    policy: Policy, field: str, rows: Any, sampler: Sampler, template_arguments: Mapping[str, Any] = NO_ARGUMENTS
) -> None:
    """Check the prompts of a data set that another trainer draws from, as `check_prompts` does those of a task.

    Raises:
        ValueError: The rows have no `prompt`, or as in `check_prompts`.
    """
    if "prompt" not in rows.column_names:
        raise ValueError(f"{field} has no column 'prompt', only {sorted(rows.column_names)}: rename one")
    max_positions = math.inf if policy.spec.max_length is None else policy.spec.max_length
    problems = ((index, Problem(rows[index]["prompt"])) for index in range(min(len(rows), MAX_CHECKED_PROMPTS)))
    remedy = f"lower max_completion_length={sampler.max_new_tokens}, or shorten it"
    _longest_prompt(policy, Source(field).row, problems, sampler, max_positions, remedy, template_arguments)


def places(field: str, task: Task) -> Callable[[int], str]:
    """Return a function that names a problem of a recipe's field by its index, and a row as the user gave it."""
    if isinstance(task, DatasetTask) and task.source.name != "dataset":
        return task.source.row
    return lambda index: f"{field}: problem {index}"


def _longest_prompt(
    policy: Policy,
    place: Callable[[int], str],
    problems: Iterable[tuple[int, Problem]],
    sampler: Sampler,
    max_positions: int | float,
    remedy: str = "lower max_new_tokens, or shorten it",
    template_arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> int:
    """Return the index of the problem with the longest prompt. Each has its index, which `place` names in messages;
    `remedy` is what helps against a long prompt.

    Raises:
        ValueError: The sampler cannot complete a prompt in `max_positions`.
    """
    completion_length = sampler.max_new_tokens
    start_time = time.monotonic()
    longest = 0
    longest_index = 0
    for index, problem in problems:
        if time.monotonic() - start_time > MAX_SECONDS:
            break
        try:
            ids, blanks = ids_and_blanks(policy, problem.prompt, problem.blank, template_arguments=template_arguments)
            if not any(blanks):
                check_number_of_steps(sampler, policy.spec, len(ids))
                if not completion_length:
                    raise ValueError("max_new_tokens=0, and the prompt has no blank: there is nothing to fill in")
        except ValueError as error:
            raise ValueError(f"{place(index)}: {error}") from None
        length = len(ids)
        if length + completion_length > max_positions:
            raise ValueError(
                f"{place(index)}: the prompt has {length} tokens and its completion {completion_length}, more than the "
                f"model's {max_positions} positions; {remedy}"
            )
        if length > longest:
            longest = length
            longest_index = index
    return longest_index


def _training_indices(settings: StepSettings, num_steps: int) -> Iterable[int]:
    """Return the indices of all problems of the training task; for a large task, those that the first steps draw."""
    size = len(settings.task)
    if size <= MAX_CHECKED_PROMPTS:
        return range(size)
    indices: dict[int, None] = {}  # in order, without repeats
    for step in range(num_steps):
        indices |= dict.fromkeys(prompt_indices(settings, RewardHistory(size), step).tolist())
        if len(indices) >= MAX_CHECKED_PROMPTS:
            break
    return indices
