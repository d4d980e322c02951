"""Call a run's callbacks, and load the best checkpoint at the end of a run."""

import difflib
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from dllm_rl.callbacks import Callback
from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.distributed.collectives import from_main
from dllm_rl.models.base import Policy
from dllm_rl.recipe import Recipe, Settings
from dllm_rl.training.policies import resolve_rollout_engine
from dllm_rl.training.run import Run


def before_first_step(run: Run[Settings]) -> None:
    """Check that the evaluations measure `metric_for_best_model`, and call every callback's `on_start`. Collective:
    every process must call it.

    Raises:
        ValueError: The evaluations do not measure that metric.
    """
    name = run.recipe.best_metric
    metrics = run.state.eval_before
    if name is not None and name not in metrics:
        matches = difflib.get_close_matches(name, metrics, n=1)
        hint = f"; {matches[0]!r} is near" if matches else ""
        raise ValueError(f"metric_for_best_model={name!r} is not one of {', '.join(sorted(metrics))}{hint}")

    def start() -> None:
        for callback in run.recipe.callbacks:
            callback.on_start(run.control)

    if run.recipe.callbacks:
        from_main(start, run.accelerator)


def after_step(run: Run[Settings], step: int, metrics: dict[str, float]) -> dict[str, float]:
    """Call every callback's `on_evaluate` and `on_step` in the main process; return the metrics and the numbers that
    the callbacks add. Collective: every process must call it.
    """
    if not run.recipe.callbacks:
        return metrics
    run.control.step = step + 1

    def call_callbacks() -> tuple[dict[str, float], str | None, bool]:
        evaluated = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        logged = dict(metrics)
        for callback in run.recipe.callbacks:
            if evaluated:
                callback.on_evaluate(run.control, evaluated)
            logged |= _check_numbers(callback, callback.on_step(run.control, logged))
        return logged, run.control.stop_reason, run.control.save_requested

    logged, run.control.stop_reason, run.control.save_requested = from_main(call_callbacks, run.accelerator)
    return logged


def _check_numbers(callback: Callback, returned: object) -> dict[str, float]:
    """Return the numbers that `on_step` returned, as floats by name.

    Raises:
        ValueError: `on_step` returned neither None nor numbers by name.
    """
    if returned is None:
        return {}
    method = f"{type(callback).__name__}.on_step"
    if not isinstance(returned, Mapping):
        raise ValueError(f"{method} returned {type(returned).__name__}; return None, or numbers by name")
    for name, value in returned.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{method} returned {name!r}: {value!r}; return numbers by name")
    return {name: float(value) for name, value in returned.items()}


def best_folder(run: Run[Settings]) -> Path | None:
    """Return the folder of the best checkpoint by `metric_for_best_model`; None if no step has been evaluated."""
    if run.state.best_step is None:
        return None
    return checkpoint.folder_of(Path(run.recipe.directory) / "checkpoints", run.state.best_step)


def load_best(run: Run[Settings], open_policy: Callable[[Path, TrainingState], Policy]) -> None:
    """Replace the run's policy by the policy of the best checkpoint, if `load_best_model_at_end` is set. The rollout
    policy gets the same weights.

    Call it after `wait_for_checkpoint`. Collective: every process must call it.
    """
    folder = best_folder(run)
    if not run.recipe.load_best_model_at_end or folder is None or str(folder) == run.checkpoint:
        return
    state = TrainingState.read(folder)
    learner_samples = run.rollout_policy is run.policy
    run.policy = open_policy(folder, state)
    run.policy.weights_version = state.version
    if learner_samples:
        run.rollout_policy = run.policy
    elif isinstance(run.recipe, Recipe):
        resolve_rollout_engine(run.recipe).sync(run.policy, run.rollout_policy)
    run.checkpoint = str(folder)
    run.log.say(f"loaded the best checkpoint, of step {state.step}: {folder}")


def ending_entries(run: Run[Settings]) -> dict[str, Any]:
    """Return the entries of summary.json about the best checkpoint, changed settings and an early stop."""
    entries: dict[str, Any] = {}
    if run.state.best_step is not None:
        entries |= {"best_checkpoint": str(best_folder(run)), "best_step": run.state.best_step}
        entries |= {"best_metric": run.recipe.best_metric, "best_value": run.state.best_value}
    if run.state.changes:
        entries["changes"] = run.state.changes
    if run.control.stop_reason is not None:
        entries["stopped"] = {"step": run.state.step, "reason": run.control.stop_reason}
    return entries


def after_summary(run: Run[Settings], summary: dict[str, Any]) -> None:
    """Call every callback's `on_end` in the main process."""
    for callback in run.recipe.callbacks if run.accelerator.is_main_process else ():
        callback.on_end(run.control, summary)
