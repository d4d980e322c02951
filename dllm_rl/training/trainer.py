"""The RL training loop: prompts, rollout, rewards, advantages, likelihoods, corrector, update, weight sync."""

import os

from dllm_rl.distributed.stop import leaving_nothing_behind
from dllm_rl.recipe import Recipe
from dllm_rl.screen import escape_controls
from dllm_rl.training.completion_log import log_completions
from dllm_rl.training.distillation import teach
from dllm_rl.training.dry_run.plan import plan
from dllm_rl.training.finish import Summary, finish
from dllm_rl.training.hooks import after_step
from dllm_rl.training.late_rollouts.schedule import Pool
from dllm_rl.training.learner import step
from dllm_rl.training.policies import engine_of
from dllm_rl.training.rollouts import collect
from dllm_rl.training.saving import checkpoint_if_due
from dllm_rl.training.start import start
from dllm_rl.training.validation import validate


@leaving_nothing_behind
def train(recipe: Recipe, pool: Pool | None = None) -> Summary:
    """Train with a recipe and return the run's summary.

    Call it for a recipe that you wrote yourself; use `grpo` for a model, a data set and reward functions. With
    `recipe.dry_run` it prints the plan and trains nothing.

    Args:
        recipe: Settings of the run.
        pool: Workers that make the rollouts if the recipe sets `rollout_workers`. None (default): Ray workers.

    Returns:
        The content of summary.json, with the trained policy as its attribute `policy`.

    Raises:
        ValueError: The recipe cannot run. It is raised before any training.
    """
    if recipe.dry_run:
        text = plan(recipe)
        if os.environ.get("RANK", "0") == "0":  # one plan, whatever the number of processes
            print(escape_controls(text, keep="\n"))
        return Summary({"plan": text})
    run = start(recipe, pool)  # fresh, or from a checkpoint
    engine = engine_of(recipe)

    for number in range(run.state.step, recipe.num_steps):
        # Rollout workers, if the recipe has them, sample the batches of later steps meanwhile.
        samples, answers, sampling = collect(run, number) if run.late is None else run.late.collect(number)
        samples, taught = teach(run, samples, number)
        learned = step(run, samples, number, run.optimizer)
        with run.log.stage("sync"):
            published = {} if run.late is None else run.late.publish(number, learned)
            synced = published | engine.sync(run.policy, run.rollout_policy)

        metrics = after_step(run, number, sampling | taught | learned.metrics | synced | validate(run, number))
        run.log.write(number, metrics)
        log_completions(run, number, answers, samples.rollout, learned.samples, learned.logps)
        run.progress(metrics, show=(number + 1) % recipe.logging_steps == 0 or number + 1 == recipe.num_steps)
        checkpoint_if_due(run, number, metrics)  # also saves on a signal, which ends the process
        if run.control.stop_reason is not None:
            break
    return finish(run)
