"""The RL training loop.

A step samples and grades completions, computes advantages and log-probs, corrects for the mismatch between rollout and
learner, updates the weights, and copies them to the rollout policy.
"""

import os
from collections.abc import Sequence
from functools import partial

from dllm_rl.checkpoints.run_folder import in_own_folder
from dllm_rl.distributed.collectives import num_launched
from dllm_rl.distributed.stop import leaving_nothing_behind
from dllm_rl.recipe import Recipe
from dllm_rl.records import describe
from dllm_rl.screen import escape_controls
from dllm_rl.step.collect import collect
from dllm_rl.step.context import StepFeature
from dllm_rl.step.samples import Samples
from dllm_rl.step.update import train_step
from dllm_rl.tasks.user_code import children_end
from dllm_rl.training.completion_log import log_completions
from dllm_rl.training.dry_run.plan import plan
from dllm_rl.training.finish import finish
from dllm_rl.training.hooks import record_update, take_steps
from dllm_rl.training.late_rollouts.schedule import WorkerPool
from dllm_rl.training.rollouts_by_gpu import with_rollouts_by_gpu
from dllm_rl.training.run import Run
from dllm_rl.training.start import start
from dllm_rl.training.summary import Summary
from dllm_rl.training.validation import evaluate_held_out, validation_interval


@in_own_folder
@leaving_nothing_behind  # restores the signal handlers and unlocks the run's folder, however the run ends
@children_end()
def train(recipe: Recipe, pool: WorkerPool | None = None, features: Sequence[StepFeature] = ()) -> Summary:
    """Train with a recipe and return the run's summary.

    Call it for a recipe that you wrote yourself; call `grpo` if you have a model, a data set and reward functions. If
    `recipe.dry_run` is True, it prints the plan (memory, time, batches) and does not train.

    Args:
        recipe: Settings of the run.
        pool: Workers that make the rollouts if the recipe sets `late`. None (default): Ray workers.
        features: Parts of a step that no setting of a recipe has; see `StepFeature`. Default: none.

    Returns:
        A dict with the content of summary.json; its attribute `policy` is the trained policy. In a dry run, the dict
        has only the plan's text, under "plan".

    Raises:
        ValueError: The recipe cannot run. It is raised before any training.
    """
    if recipe.dry_run:
        text = plan(recipe)
        if os.environ.get("RANK", "0") == "0":  # only the main process prints
            print(escape_controls(text, keep="\n"))
        return Summary({"plan": text})
    recipe, chosen = with_rollouts_by_gpu(recipe, num_launched())
    if chosen and os.environ.get("RANK", "0") == "0":
        print(f"rollouts: {chosen}", flush=True)
    run = start(recipe, pool, features)  # starts a new run, or resumes one from a checkpoint
    take_steps(run, partial(take_step, run), partial(validate, run))
    return finish(run)


def take_step(run: Run[Recipe], step_index: int) -> dict[str, float]:
    """Sample, grade and learn from the samples once; return the metrics. From the update on, an error or a stop leaves
    a checkpoint of this step.
    """
    assert run.step is not None and run.engine is not None, "a run of RL has both"
    step = run.step
    if run.async_rollouts is None:  # this process samples the completions
        samples, completions, metrics = collect(step, step_index)
    else:  # a rollout worker has sampled them; workers sample the batches of later steps while this step trains
        samples, completions, metrics = run.async_rollouts.collect(step_index)
    for feature in step.features:
        before = samples
        samples, feature_metrics = feature.after_rollout(step, samples, step_index)
        check_rows(run.recipe, feature, before, samples)
        metrics |= feature_metrics
    state, before_update = run.state, metrics
    record = lambda update_metrics: record_update(run, step_index, before_update | update_metrics)  # noqa: E731
    try:
        result = train_step(step, samples, step_index, run.optimizer, record)
    except FloatingPointError:
        run.state = state  # weights whose logits are not finite are not saved, also if they are finite
        raise
    metrics |= result.metrics
    record_update(run, step_index, metrics)  # first: an error in a feature then leaves a checkpoint of this update
    # Before the sync, an error in which would lose them. `samples` is in the order of `completions`, and
    # `result.samples` in the order after load balancing between processes.
    interval = run.recipe.log.completions_steps
    if interval and (step_index % interval == 0 or step_index + 1 == run.recipe.num_steps):
        log_completions(run, step_index, completions, samples, result.samples, result.logps)
    for feature in step.features:
        metrics = metrics | feature.after_update(step)
    with run.log.stage("sync"):
        # `publish` gives the workers one more batch to sample, with the new weights, and returns metrics.
        mismatch_metrics = {} if run.async_rollouts is None else run.async_rollouts.publish(step_index, result)
        return metrics | mismatch_metrics | run.engine.sync(run.policy, run.rollout_policy)


def check_rows(recipe: Recipe, feature: StepFeature, before: Samples, after: Samples) -> None:
    """Raise ValueError if a feature left out rows, added older ones whose log-probs would be of today's weights, or
    lost the log-probs of late rollouts.
    """
    rollout = after.rollout
    where, num_rows = f"features: after_rollout of {type(feature).__name__}", len(before.rollout.tokens)
    if (num_left_out := num_rows - len(rollout.tokens)) > 0:  # they have no place in `completions`
        raise ValueError(
            f"{where} left out {num_left_out} of {num_rows} rows; keep them, with reward NaN and advantage 0, and they "
            "do not count"
        )
    version, version_before = rollout.weights_version, before.rollout.weights_version
    if version < version_before and not recipe.likelihood.exact_for_sampler:
        raise ValueError(
            f"{where} added rows of weights_version={version} to those of {version_before}, and "
            f"likelihood={describe(recipe.likelihood)} would take today's weights for those that sampled them: use a "
            "likelihood that is exact for the sampler, such as Trajectory()"
        )
    shape = rollout.tokens.shape
    if after.source != before.source or any(values.shape != shape for values in after.rollout_logprobs):
        # Today's weights, or the numbers of another row, would take their place.
        shapes = [tuple(values.shape) for values in after.rollout_logprobs] or "none"
        raise ValueError(
            f"{where} left late rollouts of shape {tuple(shape)} with rollout_logprobs of shape {shapes}; change the "
            "rows by Samples.reorder"
        )


def validate(run: Run[Recipe], step: int) -> dict[str, float]:
    """Return metrics on the validation task at every `validation_interval`, and {} at other steps."""
    recipe = run.recipe
    eval_interval = validation_interval(recipe)
    if not eval_interval or (step + 1) % eval_interval:  # step counts from 0
        return {}
    with run.log.stage("evaluation"):
        means = evaluate_held_out(recipe, run.policy, recipe.validation_task, run.accelerator, run.log, step + 1)
    return {f"eval/{name}": value for name, value in means.items()}
