"""Hooks of a run. Subclass `Callback` to log more, to request a checkpoint, or to end a run early."""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_rl.records import Bound, nearest_hint


@dataclass
class RunControl:
    """The state of a run that a callback can read, and the requests that it can make.

    A run passes it to every hook.

    Attributes:
        directory: Folder of the run.
        step: Number of completed training steps.
        num_steps: Number of training steps of the complete run.
        rows: Function that returns the rows of metrics.jsonl that a resumed run continues; none in a new run.
        stop_reason: First reason passed to `stop`. None: no stop was requested.
        save_requested: Whether `save` was called.
    """

    directory: Path
    step: int
    num_steps: int
    rows: Callable[[], Sequence[Mapping[str, Any]]] = list
    stop_reason: str | None = field(default=None, init=False)
    save_requested: bool = field(default=False, init=False)

    def stop(self, reason: str) -> None:
        """Request the end of the run after this step; in `on_start` or `load_state`, before the next step. The run
        saves, evaluates and writes its summary, which contains `reason`.
        """
        self.stop_reason = self.stop_reason or reason

    def save(self) -> None:
        """Request a checkpoint after this step."""
        self.save_requested = True


class Callback:
    """Base class of hooks. All of its hooks do nothing.

    Override the hooks that you need, and set `callbacks=[...]` in the recipe. Only the main process calls them.
    An exception in a hook ends the run, and the step before the hook is saved. A resume calls the hooks of that step
    again.
    """

    def on_start(self, run: RunControl) -> None:
        """Called before the first step of a new or resumed run."""

    def on_step(self, run: RunControl, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        """Called after each step, before its metrics are written. The returned numbers are logged too, under names that
        the run does not use itself: `mine/reward`, not `reward`.
        """

    def on_evaluate(self, run: RunControl, metrics: Mapping[str, float]) -> None:
        """Called with the evaluation before the first step of a new run, and after each evaluation during the run.

        The names are those of summary.json's `eval_before` after `eval/`: `eval/reward` and the metrics of the task, in
        SFT `eval/loss`.
        """

    def on_progress(self, done: int, total: int) -> None:
        """Called during each evaluation, also the one before the first step, after each batch: `done` of the held-out
        completions are graded.
        """

    def on_save(self, run: RunControl, folder: Path) -> None:
        """Called after a checkpoint was written; with `saves.in_background`, when the next one is
        due or the run ends."""

    def on_end(self, run: RunControl, summary: Mapping[str, Any]) -> None:
        """Called after the summary was written."""

    def state(self) -> dict[str, Any] | None:
        """Return what a resumed run needs of this callback: JSON values by name. Called after the hooks of each step.

        None (default): a resume starts the callback over, and says so. Return {} if there is nothing to restore.
        """
        return None

    def load_state(self, state: dict[str, Any]) -> None:
        """Called after `on_start` of a resumed run, with what `state` returned at the checkpoint."""


@dataclass
class StopBelow(Callback):
    """End a run if a metric stays below a bound for several consecutive steps.

    Use it to end a run whose rollouts no longer match the learner (the default), or whose held-out reward has dropped:
    `StopBelow("eval/reward", 0.2, steps=3)`. Steps without the metric are ignored.

    Args:
        metric: Name of a metric in metrics.jsonl. Default: the effective sample size.
        bound: Number below which the metric counts as low. A non-finite metric counts as low too. Default: 0.5.
        steps: Number of consecutive low steps that ends the run, at least 1. Default: 20.

    Raises:
        ValueError: steps is below 1.
    """

    metric: str = "rollout_corr/ess"
    bound: float = 0.5
    steps: int = 20
    _low: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        Bound(at_least=1).check("steps", self.steps)

    def on_start(self, run: RunControl) -> None:
        """Count the consecutive low steps at the end of a resumed run's log; none in a new run."""
        self._low = 0
        for row in run.rows():
            self._count(row)

    def state(self) -> dict[str, Any]:
        return {}  # `on_start` reads the log

    def on_step(self, run: RunControl, metrics: Mapping[str, float]) -> None:
        self._count(metrics)
        if self._low >= self.steps:
            run.stop(f"{self.metric} was below {self.bound:g} for {self.steps} steps")

    def _count(self, row: Mapping[str, Any]) -> None:
        if self.metric in row:
            value = _number(row[self.metric])
            low = value is None or value < self.bound
            self._low = self._low + 1 if low else 0


def _number(value: Any) -> float | None:
    """Return a finite number as a float, and None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def state_of(callback: Callback) -> dict[str, Any] | None:
    """Return a copy of the callback's `state`.

    Raises:
        ValueError: JSON would change it.
    """
    state = callback.state()
    if state is None:
        return None
    try:
        copied = json.loads(json.dumps(state))
    except (TypeError, ValueError, RecursionError):
        copied = None
    if not isinstance(copied, dict) or copied != state:
        raise ValueError(
            f"{type(callback).__name__}.state returned {str(state)[:200]}; return a dict of JSON values by name (text, "
            "numbers without NaN, lists, dicts), or None"
        )
    return copied


def check_callbacks(callbacks: Any) -> None:
    """Raise ValueError unless `callbacks` is a list or tuple of `Callback` objects whose hooks a run can call."""
    if not isinstance(callbacks, list | tuple):
        raise ValueError(f"callbacks={callbacks!r} is not a list; give a list of dllm_rl.Callback objects")
    for index, callback in enumerate(callbacks):
        if isinstance(callback, type) and issubclass(callback, Callback):
            raise ValueError(
                f"callbacks[{index}] is the class {callback.__name__}; give an object, {callback.__name__}()"
            )
        if not isinstance(callback, Callback):
            raise ValueError(
                f"callbacks[{index}] is of type {type(callback).__name__}; give an object of dllm_rl.Callback"
            )
        check_hooks(index, callback)


def check_hooks(index: int, callback: Callback) -> None:
    """Raise ValueError if a method of a callback has the name of no hook, takes other arguments, or is async."""
    hooks = [name for name in dir(Callback) if not name.startswith("_")]
    kind = type(callback)
    for name in dir(kind):
        where = f"callbacks[{index}]: {kind.__name__}.{name}"
        if name.startswith("on_") and name not in hooks and callable(getattr(kind, name)):
            raise ValueError(f"{where} is never called{nearest_hint(name, hooks)} ({', '.join(hooks)})")
        if name not in hooks:
            continue
        method = getattr(callback, name)
        expected = list(inspect.signature(getattr(Callback, name)).parameters)[1:]
        if inspect.iscoroutinefunction(method):
            raise ValueError(f"{where} is async, and a run does not await it; write def, not async def")
        try:
            inspect.signature(method).bind(*expected)
        except TypeError as error:
            raise ValueError(
                f"{where} cannot be called with ({', '.join(expected)}): {error}; give it these arguments"
            ) from None
