"""What follows an update: evaluation, callbacks, log and checkpoint. Also load the best checkpoint at the end."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from dllm_rl.callbacks import Callback, StopBelow, state_of
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.distributed.collectives import collective, from_main
from dllm_rl.distributed.stop import how_to_continue
from dllm_rl.models.base import Policy
from dllm_rl.models.lora import restart_dropout
from dllm_rl.recipe import Recipe
from dllm_rl.records import nearest_hint
from dllm_rl.tasks.user_code import process_restored
from dllm_rl.training.any_recipe import AnyRecipe
from dllm_rl.training.results import best_folder
from dllm_rl.training.run import Run
from dllm_rl.training.saving import checkpoint_if_due, wait_for_checkpoint
from dllm_rl.training.validation import check_measured, is_own_task


@collective
def before_first_step(run: Run[AnyRecipe]) -> None:
    """Check that the evaluations measure the metrics that the recipe names, and call every callback's `on_start`. A new
    run also calls `on_evaluate`, a resumed one `load_state`.

    Raises:
        ValueError: The evaluations do not measure one of these metrics.
    """
    recipe = run.recipe
    if isinstance(recipe, Recipe) and recipe.validation_task is recipe.eval_task and is_own_task(recipe.eval_task):
        check_measured(recipe.evaluated_metrics, run.state.eval_before)
    if recipe.callbacks:
        states, run.control.stop_reason = from_main(partial(start_callbacks, run), run.accelerator)
        run.state = replace(run.state, callbacks=states)


def start_callbacks(run: Run[AnyRecipe]) -> tuple[list[list[Any]], str | None]:
    """Call the callbacks before the first step, in the main process; return their states, and why one stops the run."""
    saved = list(run.state.callbacks or [])
    start_anew = []
    for callback in run.recipe.callbacks:
        with process_restored():
            callback.on_start(run.control)
        if not run.state.step:
            evaluated = {f"eval/{name}": value for name, value in run.state.eval_before.items()}
            with process_restored():
                callback.on_evaluate(run.control, evaluated)
            continue
        name = type(callback).__name__
        index = next((index for index, entry in enumerate(saved) if entry[0] == name), None)
        state = None if index is None else saved.pop(index)[1]
        if state is not None:
            with process_restored():
                callback.load_state(state)
        elif state_of(callback) != {}:
            start_anew.append(name)
    if start_anew:
        run.log.say(
            f"callbacks that start over, since the checkpoint has no state of theirs: {', '.join(start_anew)}; "
            "Callback.state and load_state would save it"
        )
    return callback_states(run), run.control.stop_reason


def callback_states(run: Run[AnyRecipe]) -> list[list[Any]]:
    """Return the class name and the state of every callback, as checkpoints store them."""
    with process_restored():
        return [[type(callback).__name__, state_of(callback)] for callback in run.recipe.callbacks]


def record_update(run: Run[AnyRecipe], step: int, metrics: dict[str, float]) -> None:
    """Count a step whose update is done. From now on an error or a stop leaves a checkpoint of this step, with which a
    resume calls `end_step` again.
    """
    seconds = dict(run.log.step_seconds)
    run.state = replace(
        run.state, step=step + 1, version=run.policy.weights_version, unlogged=metrics, unlogged_seconds=seconds
    )


@collective
def take_steps(
    run: Run[AnyRecipe], take_step: Callable[[int], dict[str, float]], evaluate: Callable[[int], dict[str, float]]
) -> None:
    """Take the steps that are left of a run, and wait until the last one is saved.

    Args:
        run: The run.
        take_step: Function that updates the weights in a step and returns the step's metrics.
        evaluate: Function that returns the metrics of an evaluation after a step; {} if none is due.
    """
    for step in range(run.state.logged_steps, run.recipe.num_steps):
        if run.control.stop_reason is not None:
            break
        # A resumed run has the metrics of its last step here if that step was updated, but not evaluated and logged.
        metrics = run.state.unlogged
        if metrics is None:
            restart_dropout(run.policy.module, step)
            with process_restored():  # after the user's losses, samplers and other methods
                metrics = take_step(step)
        end_step(run, step, metrics, evaluate)  # on a signal, saves and then ends the process
    run.stop.leave_at_once(f"stopped after the last step, before the summary; {how_to_continue(run.recipe.directory)}")
    wait_for_checkpoint(run)


@collective
def end_step(
    run: Run[AnyRecipe], step: int, metrics: dict[str, float], evaluate: Callable[[int], dict[str, float]]
) -> None:
    """Evaluate, call the callbacks, log and save after the update of a step."""
    record_update(run, step, metrics)
    metrics, states = call_callbacks(run, step, metrics | evaluate(step))
    run.log.write(step, metrics)
    run.state = replace(run.state, unlogged=None, unlogged_seconds={}, callbacks=states)
    steps_done = step + 1
    is_due = steps_done % run.recipe.log.steps == 0 or steps_done == run.recipe.num_steps
    run.progress(run.log.record.line(), show=is_due)
    checkpoint_if_due(run, metrics)


@collective
def call_callbacks(
    run: Run[AnyRecipe], step: int, metrics: dict[str, float]
) -> tuple[dict[str, float], list[list[Any]] | None]:
    """Call every callback's `on_evaluate` and `on_step` in the main process; return the metrics with the numbers that
    the callbacks add, and the callbacks' states.
    """
    if not run.recipe.callbacks:
        return metrics, None
    run.control.step = step + 1

    def call() -> tuple[dict[str, float], list[list[Any]], str | None, bool]:
        evaluated = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        logged = dict(metrics)
        for callback in run.recipe.callbacks:
            if step == run.first_step:
                warn_of_missing_metric(run, callback, logged)
            with process_restored():
                if evaluated:
                    callback.on_evaluate(run.control, dict(evaluated))
                returned = callback.on_step(run.control, dict(logged))
            logged |= check_numbers(callback, returned, logged)
        return logged, callback_states(run), run.control.stop_reason, run.control.save_requested

    answers = from_main(call, run.accelerator)
    logged, states, run.control.stop_reason, run.control.save_requested = answers
    return logged, states


def warn_of_missing_metric(run: Run[AnyRecipe], callback: Callback, metrics: Mapping[str, float]) -> None:
    """Warn if the metric of a `StopBelow` is neither in a first step's metrics nor in an evaluation's."""
    names = {*metrics, *(f"eval/{name}" for name in run.state.eval_before)}
    if isinstance(callback, StopBelow) and callback.metric not in names:
        run.log.say(
            f"warning: {type(callback).__name__} acts on the metric {callback.metric!r}, which step {run.control.step} "
            f"does not have{nearest_hint(callback.metric, names, '{!r}')}"
        )


# Names that the log adds to the metrics of a step, or gives to its other lines.
LOGGED = ("step", "step_time", "memory/peak_gb", "warmup_step", "resume_from", "changed")


def check_numbers(callback: Callback, returned: object, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers that `on_step` returned, as floats by name.

    Raises:
        ValueError: `on_step` returned neither None nor numbers by name, or a name that is the run's or another
            callback's.
    """
    if returned is None:
        return {}
    method = f"{type(callback).__name__}.on_step"
    if not isinstance(returned, Mapping):
        raise ValueError(f"{method} returned {type(returned).__name__}; return None, or numbers by name")
    for name, value in returned.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{method} returned {name!r}: {value!r}; return numbers by name")
        if name in metrics or name in LOGGED or name.startswith(("eval/", "time/")):
            raise ValueError(
                f"{method} returned {name!r}, a name of the run or of another callback; choose another one, such as "
                f"'mine/{name}'"
            )
    return {name: float(value) for name, value in returned.items()}


@collective
def load_best(run: Run[AnyRecipe], open_policy: Callable[[Path, TrainingState], Policy]) -> None:
    """Replace the run's policy by the policy of the best checkpoint, if the recipe `loads_best`. `finish` then
    syncs the rollout policy, whose version is another one.

    Call it after `wait_for_checkpoint`.
    """
    folder = best_folder(run)
    if not run.recipe.loads_best or folder is None or str(folder) == run.checkpoint:
        return
    state = TrainingState.read(folder)
    learner_samples = run.learner_samples  # before the policy is replaced
    run.policy = open_policy(folder, state)
    run.policy.weights_version = state.version
    if learner_samples:
        run.rollout_policy = run.policy
    run.checkpoint = str(folder)
    run.log.say(f"loaded the best checkpoint, of step {state.step}: {folder}")
