"""Hooks of a run. Subclass `Callback` to log more, to ask for a checkpoint, or to end a run early."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_rl.bounds import Bound


@dataclass
class RunControl:
    """What a callback sees of a run, and what it may ask of it.

    Attributes:
        directory: The run's folder.
        step: Complete training steps.
        num_steps: Training steps of the whole run.
        rows: Reads the rows of metrics.jsonl that a resumed run goes on from.
    """

    directory: Path
    step: int
    num_steps: int
    rows: Callable[[], Sequence[Mapping[str, Any]]] = list
    stop_reason: str | None = field(default=None, init=False)
    save_requested: bool = field(default=False, init=False)

    def stop(self, reason: str) -> None:
        """Ask the run to end after this step. It saves, evaluates and writes its summary, which holds `reason`."""
        self.stop_reason = self.stop_reason or reason

    def save(self) -> None:
        """Ask the run to write a checkpoint after this step."""
        self.save_requested = True


class Callback:
    """The hooks of a run, which do nothing. Override the ones you need, and give `callbacks=[...]`.

    The main process alone calls them. An exception ends the run after its last complete step was saved.
    """

    def on_start(self, run: RunControl) -> None:
        """Run before the first step of a run, fresh or resumed."""

    def on_step(self, run: RunControl, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        """Run after each step, before its metrics are written. The numbers that it returns are logged with them."""

    def on_evaluate(self, run: RunControl, metrics: Mapping[str, float]) -> None:
        """Run after an evaluation on validation problems, or on the held-out rows of SFT."""

    def on_save(self, run: RunControl, folder: Path) -> None:
        """Run after a checkpoint was written. With `async_save` it runs when the next step finds the write complete."""

    def on_end(self, run: RunControl, summary: Mapping[str, Any]) -> None:
        """Run after the summary was written."""


@dataclass
class StopBelow(Callback):
    """End a run whose metric stayed below a bound for some steps in a row.

    Use it to end a run whose rollouts no longer fit the learner (the default), or whose held-out reward fell:
    `StopBelow("eval/reward", 0.2, steps=3)`. A step without the metric does not count.

    Args:
        metric: A name of metrics.jsonl.
        bound: The metric counts as low below this number. A number that is not finite counts as low.
        steps: Steps in a row, of those that have the metric.
    """

    metric: str = "rollout_corr/rollout_is_eff_sample_size"
    bound: float = 0.5
    steps: int = 20
    _low: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        Bound(at_least=1).check("steps", self.steps)

    def on_start(self, run: RunControl) -> None:
        """Count the low steps at the end of what a resumed run has logged."""
        for row in run.rows():
            self._count(row)

    def on_step(self, run: RunControl, metrics: Mapping[str, float]) -> None:
        self._count(metrics)
        if self._low >= self.steps:
            run.stop(f"{self.metric} was below {self.bound:g} for {self.steps} steps")

    def _count(self, row: Mapping[str, Any]) -> None:
        if self.metric in row:
            value = _number(row[self.metric])
            low = value is None or value < self.bound
            self._low = self._low + 1 if low else 0


@dataclass
class SaveBest(Callback):
    """Ask for a checkpoint whenever a metric of a step is the best so far.

    For a metric of the evaluation use the setting `metric_for_best_model`, whose checkpoint is never deleted. The
    checkpoints of this callback count for `save_total_limit`.

    Args:
        metric: A name of metrics.jsonl.
        greater_is_better: Whether a larger number is better.
    """

    metric: str = "reward"
    greater_is_better: bool = True
    _best: float | None = field(default=None, init=False, repr=False)

    def on_start(self, run: RunControl) -> None:
        """Take the best value of what a resumed run has logged."""
        for row in run.rows():
            self._is_best(row)

    def on_step(self, run: RunControl, metrics: Mapping[str, float]) -> None:
        if self._is_best(metrics):
            run.save()

    def _is_best(self, row: Mapping[str, Any]) -> bool:
        value = _number(row.get(self.metric))
        if value is None:
            return False
        if self._best is not None and (value <= self._best if self.greater_is_better else value >= self._best):
            return False
        self._best = value
        return True


def _number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def check_callbacks(callbacks: Any) -> None:
    """Raise ValueError unless `callbacks` is a list or tuple of `Callback` objects."""
    if not isinstance(callbacks, list | tuple):
        raise ValueError(f"callbacks={callbacks!r} is no list; give a list of objects of dllm_rl.Callback")
    for place, each in enumerate(callbacks):
        if isinstance(each, type) and issubclass(each, Callback):
            raise ValueError(f"callbacks[{place}] is the class {each.__name__}; give an object, {each.__name__}()")
        if not isinstance(each, Callback):
            raise ValueError(f"callbacks[{place}] is of type {type(each).__name__}; give an object of dllm_rl.Callback")
