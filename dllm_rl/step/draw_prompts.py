"""The problems of a training step: draw them, and replace prompts that are too long."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_rl.algorithms.prompt_sources import RewardHistory
from dllm_rl.decoding.tokens import prompt_ids
from dllm_rl.models.base import Policy
from dllm_rl.records import describe
from dllm_rl.rng import generator_for
from dllm_rl.step.settings import StepSettings
from dllm_rl.tasks.base import Problem


def draw_indices(num_problems: int, size: int, *key: object) -> Int[Tensor, " size"]:
    """Draw a step's problems for all processes, with replacement. The same key gives the same problems."""
    return torch.randint(num_problems, (size,), generator=generator_for(*key))


def prompt_indices(
    settings: StepSettings, history: RewardHistory | None, step: int, draw: int = 0
) -> Int[Tensor, " train_batch_size"]:
    """Return the indices of a step's problems, over all processes, from `prompt_source`.

    Args:
        settings: Settings of the step.
        history: Graded completions of the run. None for a source that reads no history.
        step: Training step.
        draw: Index of the draw in the step. It is above 0 if dynamic sampling replaces groups.

    Raises:
        ValueError: The source did not return `train_batch_size` indices of the task.
    """
    source, count, size = settings.prompt_source, settings.train_batch_size, len(settings.task)
    purpose = f"train, draw {draw}" if draw else "train"
    history = RewardHistory(size) if history is None else history
    indices = source.draw(history, count, generator_for(settings.seed, purpose, step))
    if not isinstance(indices, Tensor) or indices.shape != (count,) or indices.dtype != torch.long:
        name = f"prompt_source={describe(source)}"
        raise ValueError(f"{name} must return a tensor of train_batch_size={count} whole numbers")
    if indices.min() < 0 or indices.max() >= size:
        problem = f"prompt_source={describe(source)} gave the indices {int(indices.min())} to {int(indices.max())}"
        raise ValueError(f"{problem}, and task {settings.task.name!r} has the problems 0 to {size - 1}")
    return indices


def group_sizes(
    settings: StepSettings, history: RewardHistory | None, indices: Int[Tensor, " P"], step: int
) -> Int[Tensor, " P"]:
    """Return the number of completions of each prompt of a step, over all processes, from `prompt_source`.

    Raises:
        ValueError: The source did not return a whole number of at least 1 for each prompt.
    """
    source = settings.prompt_source
    history = RewardHistory(len(settings.task)) if history is None else history
    generator = generator_for(settings.seed, "group sizes", step)
    sizes = source.group_sizes(history, indices, settings.num_generations, generator)
    if not isinstance(sizes, Tensor) or sizes.shape != indices.shape or sizes.dtype != torch.long or sizes.min() < 1:
        problem = (
            f"group_sizes of prompt_source={describe(source)} must return a tensor of {len(indices)} whole numbers"
        )
        raise ValueError(f"{problem} from 1 on, one for each prompt")
    return sizes


def fit_prompts(settings: StepSettings, policy: Policy, indices: Sequence[int]) -> tuple[list[Problem], int]:
    """Return the problems at `indices`, and how many were replaced. A prompt longer than max_prompt_length is replaced
    by the task's next prompt that fits.

    Raises:
        ValueError: No prompt fits.
    """
    task = settings.task
    max_prompt_length = settings.max_prompt_length
    if max_prompt_length is None:
        return [task[i] for i in indices], 0
    problems = []
    num_replaced = 0
    for index in indices:
        for k in range(len(task)):
            problem = task[(index + k) % len(task)]
            if len(prompt_ids(policy, problem.prompt, problem.blank)) <= max_prompt_length:
                problems.append(problem)
                num_replaced += k > 0
                break
        else:
            raise ValueError(
                f"max_prompt_length={max_prompt_length}: every prompt of task {task.name!r} is longer; raise it"
            )
    return problems, num_replaced
