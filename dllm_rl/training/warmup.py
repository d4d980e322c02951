"""Supervised warm-up before RL, on problems with a known solution."""

import time
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from dllm_rl.models.base import Policy
from dllm_rl.monitoring.log import RunLog
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for
from dllm_rl.step.collect import draw_indices, fitting_indices
from dllm_rl.supervised.examples import solution_examples
from dllm_rl.supervised.trainer import SupervisedTrainer
from dllm_rl.tasks.base import Problem
from dllm_rl.training.prompts import MAX_CHECKED_PROMPTS, MAX_SECONDS

LR_WARMUP_STEPS = 30  # steps in which the learning rate rises linearly to its full value


def warm_up(
    recipe: Recipe, policy: Policy, accelerator: Accelerator, log: RunLog, measure: Callable[[], dict[str, float]]
) -> int:
    """Train with AdamW for at most `warmup.steps` steps, until `warmup.metric`, measured by `measure`, reaches
    `warmup.target`; return the number of steps.

    Problems and masks depend only on the seed and the step, not on the number of processes.

    Raises:
        FloatingPointError: A gradient is not finite. It is raised before the weights change.
    """
    if not recipe.warmup.steps:
        return 0
    name = f"warmup/{recipe.warmup.metric}"
    progress = log.view("warm-up", recipe.warmup.steps)
    optimizer = torch.optim.AdamW(policy.module.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    trainer = SupervisedTrainer(
        policy=policy,
        processes=accelerator,
        micro_batch_size=recipe.micro_batch_size,
        bf16=recipe.bf16,
        like_rollouts=True,
        max_grad_norm=recipe.max_grad_norm,
    )
    steps_done = 0
    is_reached = False
    while steps_done < recipe.warmup.steps and not is_reached:
        indices = fitting_indices(recipe, policy, _indices(recipe, steps_done))
        problems = [recipe.task[index] for index in indices.tolist()]
        step_metrics = trainer.step(
            optimizer,
            solution_examples(policy, problems, max_new_tokens=recipe.max_new_tokens),
            generator_for(recipe.seed, "warm-up masks", steps_done),
            learning_rate=recipe.warmup.learning_rate * min(1.0, (steps_done + 1) / LR_WARMUP_STEPS),
            place=f"warm-up step {steps_done}",
        )
        metrics = {"warmup/loss": step_metrics["loss"]}
        steps_done += 1
        if steps_done % recipe.warmup.eval_steps == 0:
            metrics[name] = measure()[recipe.warmup.metric]
            is_reached = metrics[name] >= recipe.warmup.target
        log.write_warmup(steps_done - 1, metrics)
        progress(warmup_text(metrics), show=is_reached or steps_done % recipe.log.steps == 0)
    progress("", show=False, close=True)
    return steps_done


def warmup_text(metrics: dict[str, float]) -> str:
    """Return the metrics of a warm-up step for a line of the screen."""
    return "  ".join(f"{name.removeprefix('warmup/')} {value:.3g}" for name, value in metrics.items())


def drawn_problems(recipe: Recipe, policy: Policy) -> Iterator[Problem]:
    """Yield each problem that the warm-up draws once, within the limits of `check_prompts`."""
    start_time = time.monotonic()
    drawn: set[int] = set()
    for step in range(recipe.warmup.steps):
        for index in {*_indices(recipe, step).tolist()} - drawn:
            if time.monotonic() - start_time > MAX_SECONDS:
                return
            drawn.add(index)
            yield recipe.task[int(fitting_indices(recipe, policy, torch.tensor([index])))]
        if len(drawn) >= min(len(recipe.task), MAX_CHECKED_PROMPTS):
            return


def _indices(recipe: Recipe, step: int) -> Int[Tensor, " B"]:
    """Return the indices of the problems of a step of the warm-up, over all processes."""
    return draw_indices(len(recipe.task), recipe.warmup.batch_size, recipe.seed, "warm-up", step)
