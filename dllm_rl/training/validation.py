"""Evaluation during a run."""

from accelerate import Accelerator

from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.models.base import Policy
from dllm_rl.recipe import Recipe
from dllm_rl.tasks.base import Task
from dllm_rl.training.context import StepContext


def evaluate_with(recipe: Recipe, policy: Policy, task: Task, accelerator: Accelerator) -> dict[str, float]:
    options = {"seed": recipe.seed, "batch_size": recipe.eval_batch_size, "accelerator": accelerator}
    return evaluate(policy, task, recipe.eval_sampler, reward_timeout=recipe.reward_timeout, **options).means


def shown(found: dict[str, float]) -> str:
    names = ("solve_rate", "cell_accuracy", "accuracy", "reward")
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items() if name in names)


def validate(run: StepContext[Recipe], step: int) -> dict[str, float]:
    """Metrics on the validation task every eval_steps; none in between."""
    recipe = run.recipe
    if not recipe.eval_steps or (step + 1) % recipe.eval_steps:  # step counts from 0
        return {}
    with run.log.stage("evaluation"):
        means = evaluate_with(recipe, run.policy, recipe.validation_task, run.accelerator)
    return {f"eval/{name}": value for name, value in means.items()}
