"""Evaluation during a run."""

import math
from collections.abc import Callable

from accelerate import Accelerator

from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.models.base import Policy
from dllm_rl.recipe import Recipe, Settings
from dllm_rl.tasks.base import Task
from dllm_rl.training.context import StepContext

SHARE = 0.02  # largest share of the forwards, if the run chooses eval_steps
FEWEST_STEPS = 10  # between evaluations; an interval that the run chooses is a multiple of it


def evaluate_with(recipe: Recipe, policy: Policy, task: Task, accelerator: Accelerator) -> dict[str, float]:
    options = {"seed": recipe.seed, "batch_size": recipe.eval_batch_size, "accelerator": accelerator}
    return evaluate(policy, task, recipe.eval_sampler, reward_timeout=recipe.reward_timeout, **options).means


def shown(found: dict[str, float]) -> str:
    names = ("solve_rate", "cell_accuracy", "accuracy", "reward")
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items() if name in names)


def interval(recipe: Settings, evaluation: int, step: int) -> int:
    """Return the number of steps between evaluations, 0 for none: `eval_steps`, or the number that limits evaluations
    to SHARE of the work.

    The work is counted and not timed, so that a resumed run evaluates at the same steps.

    Args:
        recipe: Settings of the run.
        evaluation: Forwards of rows in an evaluation.
        step: Forwards of rows in a training step.
    """
    if recipe.eval_steps is not None:
        return recipe.eval_steps
    return FEWEST_STEPS * max(1, math.ceil(evaluation / (SHARE * step * FEWEST_STEPS)))


def check_best_model(recipe: Settings, every: int) -> None:
    """Raise ValueError if `metric_for_best_model` would never be measured."""
    if recipe.metric_for_best_model is not None and 0 < recipe.num_steps < every:
        raise ValueError(
            f"metric_for_best_model={recipe.metric_for_best_model!r} is measured every {every} steps, and "
            f"num_steps={recipe.num_steps}: set a smaller eval_steps"
        )


def validation_interval(recipe: Recipe) -> int:
    """Return the `interval` of the validation task. Only the rollout of a training step counts."""
    evaluated, sampled = forwards_of(recipe.eval_sampler), forwards_of(recipe.sampler)
    if not evaluated or not sampled:  # one of them is not set
        evaluated = sampled = 1
    rows = recipe.train_batch_size * recipe.num_generations
    return interval(recipe, len(recipe.validation_task) * evaluated, rows * sampled)


def forwards_of(sampler: Callable) -> int:
    """Return the largest number of forwards in which a sampler writes a completion; 0 if its keywords do not set it."""
    keywords = getattr(sampler, "keywords", {})
    return keywords.get("diffusion_steps") or keywords.get("max_new_tokens") or 0


def validate(run: StepContext[Recipe], step: int) -> dict[str, float]:
    """Return metrics on the validation task at every `validation_interval`, and {} at other steps."""
    recipe = run.recipe
    every = validation_interval(recipe)
    if not every or (step + 1) % every:  # step counts from 0
        return {}
    with run.log.stage("evaluation"):
        means = evaluate_with(recipe, run.policy, recipe.validation_task, run.accelerator)
    return {f"eval/{name}": value for name, value in means.items()}
