"""Evaluations during a run, and how often they happen."""

import math
from collections.abc import Collection, Iterable, Mapping

from accelerate import Accelerator

from dllm_rl.distributed.collectives import collective
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.evaluation.held_out import held_out_row
from dllm_rl.evaluation.results import Evaluation
from dllm_rl.models.base import Policy
from dllm_rl.monitoring.log import RunLog
from dllm_rl.monitoring.record import rewards_text
from dllm_rl.recipe import Recipe
from dllm_rl.records import nearest_hint
from dllm_rl.samplers import Sampler
from dllm_rl.tasks.base import Reward, Task, check_not_empty, grade, metric_fractions
from dllm_rl.tasks.datasets import DatasetTask
from dllm_rl.tasks.user_code import process_restored

MAX_SHARE = 0.02  # if eval_steps is None, evaluations run at most this share of training's forwards
MIN_STEPS = 10  # if eval_steps is None, the steps between evaluations are a multiple of this number


def evaluate_with(recipe: Recipe, policy: Policy, task: Task, accelerator: Accelerator) -> dict[str, float]:
    """Evaluate a policy on a task with the recipe's eval sampler; return the mean metrics."""
    return evaluation_of(recipe, policy, task, accelerator).means


def evaluation_of(recipe: Recipe, policy: Policy, task: Task, accelerator: Accelerator) -> Evaluation:
    options = {"seed": recipe.seed, "batch_size": recipe.evaluation_batch_size, "accelerator": accelerator}

    def progress(done: int) -> None:
        for callback in recipe.callbacks if accelerator.is_main_process else ():
            callback.on_progress(done, len(task))

    options |= {"reward_timeout": recipe.limits.reward_timeout, "progress": progress}
    with process_restored():  # after the methods of a sampler of the user's
        return evaluate(policy, task, recipe.eval_sampler, **options)


@collective
def evaluate_held_out(
    recipe: Recipe, policy: Policy, task: Task, accelerator: Accelerator, log: RunLog, step: int
) -> dict[str, float]:
    """Evaluate a policy after `step` updates as `evaluate_with` does, and store the result of every problem in
    held_out.jsonl.
    """
    evaluation = evaluation_of(recipe, policy, task, accelerator)
    is_test = task is recipe.eval_task
    log.keep([held_out_row(step, evaluation, task, recipe.settings(), is_test=is_test)] * log.main, "held_out")
    return evaluation.means


def format_metrics(metrics: dict[str, float]) -> str:
    """Format an evaluation for one line of the screen: the reward, and every reward function by name."""
    return rewards_text({name: f"{value:.3f}" for name, value in metrics.items()}) or "no reward"


def format_change(before: dict[str, float], after: dict[str, float]) -> str:
    """Format what an evaluation measured before and after a run, as "reward 0.250 -> 0.500 (share 0.200 -> 0.400)"."""
    texts = {name: f"{value:.3f} -> {after[name]:.3f}" for name, value in before.items() if name in after}
    return rewards_text(texts) or "no reward"


def needed_metrics(recipe: Recipe) -> dict[str, str]:
    """Return the metrics of `validation_task` that the recipe needs, by the setting that names them in messages."""
    warmup = {f"warmup.metric={recipe.warmup.metric!r}": recipe.warmup.metric}
    return recipe.evaluated_metrics | (warmup if recipe.warmup.steps else {})


def check_metric_names(recipe: Recipe) -> None:
    """Raise ValueError if the recipe needs a metric that `validation_task` does not have. Call it before a model is
    loaded. The metrics of a task of the user's own are not known before the rehearsal grades a completion.
    """
    task, needed = recipe.validation_task, needed_metrics(recipe)
    if not needed or is_own_task(task):
        return
    check_not_empty("validation_task", task)
    if isinstance(task, DatasetTask):  # whose functions may return None for some completions
        reward = Reward(0.0, True, dict.fromkeys(task.reward_weights, 0.0))
    else:
        (reward,) = grade(task, [task[0]], [""])
    check_measured(needed, metric_fractions(reward))


def is_own_task(task: Task) -> bool:
    """Return whether a task is of the user's own class. The library's have the same metrics for every completion."""
    return not type(task).__module__.startswith("dllm_rl.")


def check_measured(needed: Mapping[str, str], measured: Collection[str]) -> None:
    """Raise ValueError if a metric that a setting needs is not measured."""
    for setting, name in needed.items():
        if name not in measured:
            known, hint = ", ".join(sorted(measured)), nearest_hint(name, measured, "{!r}")
            raise ValueError(f"{setting} is not a metric of the evaluations: {known}{hint}; use one of these")


def problems_evaluated(number: int, num_in_training: int) -> str:
    """Return what a run calls the problems that it is evaluated on before and after training."""
    noun = "problem" if number == 1 else "problems"
    if num_in_training == number:
        return f"{number} {noun}, all of them of training: none is held out"
    return f"{number} held-out {noun}" + f", {num_in_training} of them of training too" * bool(num_in_training)


def evaluation_interval(
    eval_steps: int | None, num_steps: int, evaluated_metrics: Iterable[str], *, eval_forwards: int, step_forwards: int
) -> int:
    """Return the number of steps between evaluations, 0 for no evaluations. It is `eval_steps`; if that is None, it is
    the number that limits evaluations to MAX_SHARE of the work.

    The work is counted in forwards and not timed, so that a resumed run evaluates at the same steps.

    Args:
        eval_steps: The recipe's `evaluation.steps`.
        num_steps: Number of training steps.
        evaluated_metrics: Settings that need a metric of the evaluations.
        eval_forwards: Rows times forwards per row in an evaluation.
        step_forwards: Rows times forwards per row in a training step.

    Raises:
        ValueError: A metric of the evaluations that the recipe needs would never be measured.
    """
    interval = eval_steps
    if interval is None:
        interval = MIN_STEPS * max(1, math.ceil(eval_forwards / (MAX_SHARE * step_forwards * MIN_STEPS)))
    for setting in evaluated_metrics if 0 < num_steps < interval else ():
        raise ValueError(
            f"{setting} is measured every {interval} steps, and num_steps={num_steps}: set a smaller evaluation.steps"
        )
    return interval


def validation_interval(recipe: Recipe) -> int:
    """Return the steps between evaluations on the validation task (`evaluation_interval`). Of a training step, only the
    rollout is counted.
    """
    eval_forwards, rollout_forwards = forwards_of(recipe.eval_sampler), forwards_of(recipe.sampler)
    if not eval_forwards or not rollout_forwards:  # unknown for one of the samplers: compare rows only
        eval_forwards = rollout_forwards = 1
    rows = recipe.train_batch_size * recipe.num_generations
    return evaluation_interval(
        recipe.evaluation.steps,
        recipe.num_steps,
        recipe.evaluated_metrics,
        eval_forwards=len(recipe.validation_task) * eval_forwards,
        step_forwards=rows * rollout_forwards,
    )


def forwards_of(sampler: Sampler) -> int:
    """Return the largest number of forwards that a sampler takes for a completion; 0 if only the prompts tell it."""
    return getattr(sampler, "diffusion_steps", None) or sampler.max_new_tokens
