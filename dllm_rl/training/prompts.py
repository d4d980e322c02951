"""The prompts that a run learns from, and the check that they fit the model."""

import time
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_rl.models.base import Policy
from dllm_rl.models.tokens import prompt_ids
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for
from dllm_rl.tasks.base import Problem, Task, check_filled

CHECKED = 5000  # prompts per task that are tokenised before a run begins
SECONDS = 10.0  # at most for the prompts of a task: some tasks make a problem slowly


def draw_indices(num_problems: int, size: int, *key: object) -> Int[Tensor, " size"]:
    """Problems of a step, of all processes, with replacement: a pure function of the key."""
    return torch.randint(num_problems, (size,), generator=generator_for(*key))


def choose(recipe: Recipe, policy: Policy, indices: Sequence[int]) -> tuple[list[Problem], int]:
    """The problems at `indices`, and how many were replaced: a prompt longer than max_prompt_length is replaced by the
    task's next one that fits. Raises ValueError if none fits."""
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
    """Raise ValueError if a task has no problems; needs no model."""
    for field in ("task", "validation_task", "eval_task"):
        check_filled(field, getattr(recipe, field))


def check_prompts(recipe: Recipe, policy: Policy) -> int:
    """Check the prompts of all three tasks, at most 5000 and 10 s each. Returns the index of the training task's
    longest; 0 if none was looked at. Raises ValueError if a prompt and its completion exceed the model's positions."""
    limit = policy.spec.max_length
    trained = getattr(recipe.sampler, "keywords", {}).get("max_new_tokens")
    evaluated = getattr(recipe.eval_sampler, "keywords", {}).get("max_new_tokens")
    if limit is None or trained is None or evaluated is None:
        return 0
    new = max(trained, evaluated)
    if new >= limit:
        raise ValueError(
            f"max_new_tokens={new} leaves no room for a prompt in the model's {limit} positions; "
            "lower it (--sampler.max_new_tokens, --eval_sampler.max_new_tokens)"
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
    """The problem of `field` with the longest prompt. Raises ValueError if a prompt and `new` tokens exceed `room`."""
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
            remedy = f"--max_prompt_length {room - new} takes another in its place" if field == "task" else "shorten it"
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
    """The whole task, or the first that its steps draw."""
    size = len(recipe.task)
    if size <= CHECKED:  # all of them, in the time that there is
        return range(size)
    drawn: dict[int, None] = {}  # in order, each once
    for step in range(recipe.num_steps):
        drawn |= dict.fromkeys(draw_indices(size, recipe.train_batch_size, recipe.seed, "train", step).tolist())
        if len(drawn) >= CHECKED:
            break
    return drawn
