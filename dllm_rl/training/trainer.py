"""The loop: task, prompts, rollout, rewards, advantages, likelihoods, corrector, update, weight sync."""

import os
from functools import partial
from typing import Any

from dllm_rl.distributed.stop import leaving_nothing_behind
from dllm_rl.recipe import Recipe
from dllm_rl.screen import escape_controls
from dllm_rl.training.completion_log import log_completions
from dllm_rl.training.distillation import teach
from dllm_rl.training.dry_run.plan import plan
from dllm_rl.training.finish import Summary, finish
from dllm_rl.training.hooks import after_step
from dllm_rl.training.late_rollouts.schedule import Pool
from dllm_rl.training.learner import step, update
from dllm_rl.training.policies import engine_of
from dllm_rl.training.rollouts import collect
from dllm_rl.training.saving import checkpoint_if_due
from dllm_rl.training.start import start
from dllm_rl.training.validation import validate


@leaving_nothing_behind
def train(recipe: Recipe, pool: Pool | None = None) -> Summary:
    """Run a recipe; returns its summary with the trained policy.

    Args:
        recipe: The run's settings.
        pool: Who makes the rollouts of a recipe with `rollout_workers`; None: Ray workers.

    Raises:
        ValueError: The recipe cannot run; raised before any work.
    """
    if recipe.dry_run:
        text = plan(recipe)
        if os.environ.get("RANK", "0") == "0":  # one plan, whatever was launched
            print(escape_controls(text, keep="\n"))
        return Summary({"plan": text})
    run = start(recipe, pool)  # fresh, or from a checkpoint
    policy = run.policy
    rollout_policy = run.rollout_policy
    accelerator = run.accelerator
    log = run.log
    engine = engine_of(recipe)
    late = run.late  # workers that sample the batches of later steps meanwhile, or None
    reference = run.reference if recipe.beta else None  # else it is a teacher alone
    policies: dict[str, Any] = {"policy": policy, "rollout_policy": rollout_policy, "reference": reference}

    for number in range(run.state.step, recipe.num_steps):
        if late is None:
            samples, answers, sampling = collect(recipe, rollout_policy, number, accelerator, log, run.history)
        else:
            samples, answers, sampling = late.collect(number)
        samples, taught = teach(run, samples, number)
        learn = partial(update, policy, run.optimizer, accelerator=accelerator, **recipe.update_settings(number))
        learned = step(recipe, samples, number, accelerator, learn=learn, stage=log.stage, **policies)
        with log.stage("sync"):
            published = {} if late is None else late.publish(number, learned)
            synced = published | engine.sync(policy, rollout_policy)

        metrics = after_step(run, number, sampling | taught | learned.metrics | synced | validate(run, number))
        log.write(number, metrics)
        log_completions(run, number, answers, samples.rollout, learned.samples, learned.logps)
        run.progress(metrics, show=(number + 1) % recipe.logging_steps == 0 or number + 1 == recipe.num_steps)
        checkpoint_if_due(run, number, metrics)  # also on a signal, which ends the process
        if run.control.stop_reason is not None:
            break
    return finish(run)
