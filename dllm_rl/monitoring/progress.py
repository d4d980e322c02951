"""Progress of a run: a bar on a terminal, and lines."""

import atexit
import math
from collections import deque
from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dllm_rl.monitoring.health import DIRECTION, DIRECTION_WINDOW, health
from dllm_rl.screen import escape_controls, literal

SHOWN = {
    "reward": "reward",
    "rewards/solve_rate/mean": "solved",
    "rewards/accuracy/mean": "correct",
    "eval/solve_rate": "held-out",
    "eval/accuracy": "held-out",
    "eval/loss": "held-out loss",
}
ESS = "rollout_corr/ess"
MISMATCH = "rollout_corr/abs_log_ratio_mean"


class ProgressDisplay:
    """The steps of a part of a run: a bar on a terminal, and lines with metrics and the size of the mismatch.

    Call it once per step.

    Args:
        console: Console to print on. The bar is shown if it is a terminal.
        description: Name of the part of the run.
        total: Number of steps.
        completed: Steps that are done already. Default: 0.
        exact: Whether importance ratios are exact, not estimated. False: the ESS is printed beside the ESS of the first
            step. Default: True.
        first_ess: ESS of the run's first step, if it is done already.
    """

    def __init__(
        self,
        console: Console,
        description: str,
        total: int,
        *,
        completed: int = 0,
        exact: bool = True,
        first_ess: float | None = None,
    ) -> None:
        remaining = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        columns = (TextColumn("{task.description:8}", markup=False), MofNCompleteColumn(), BarColumn(None), *remaining)
        # Estimate the speed over all steps. Rich's default uses only the last 30 s, in which there may be no step.
        self.bar = Progress(*columns, console=console, expand=True, speed_estimate_period=math.inf)
        self.bar.add_task(escape_controls(description), total=total, completed=completed)
        self.exact = exact
        self.first_ess = first_ess
        self.directions = deque[float](maxlen=DIRECTION_WINDOW)
        if console.is_interactive and not console.quiet and not self.bar.finished:
            self.bar.start()  # on a terminal only: a file gets plain lines
            atexit.register(console.show_cursor)  # also after an error

    def __call__(self, metrics: dict[str, float], *, show: bool, close: bool = False) -> None:
        """Count one step; with `close`, count none and end the bar. With `show`, also print a line."""
        if not self.exact and self.first_ess is None:
            self.first_ess = metrics.get(ESS)
        self.directions += [metrics[DIRECTION]] if DIRECTION in metrics else []
        task = self.bar.tasks[0]
        had_no_eta = task.time_remaining is None
        self.bar.update(task.id, advance=0 if close else 1)
        if show or (had_no_eta and task.time_remaining):  # also as soon as an ETA is known
            self.bar.console.print(literal(self.line(metrics)), soft_wrap=True)
        if (close or self.bar.finished) and self.bar.live.is_started:
            self.bar.stop()

    def line(self, metrics: dict[str, float]) -> str:
        """Return the step, `one_line` of its metrics, and the time left."""
        task = self.bar.tasks[0]
        is_measured = len(self.directions) == DIRECTION_WINDOW
        direction = math.fsum(self.directions) / DIRECTION_WINDOW if is_measured else 0.0
        texts = [f"{task.description} {int(task.completed)}/{task.total:.0f}"]
        texts.append(one_line(metrics, direction=direction, first_ess=self.first_ess))
        if task.time_remaining is not None and not task.finished:
            texts.append(f"ETA {timedelta(seconds=math.ceil(task.time_remaining))}")
        return "  ".join(filter(None, texts))


def last_line(rows: Sequence[dict[str, float]], *, exact: bool) -> str:
    """Return `one_line` of the last of a run's rows of numbers, with the newest held-out metrics.

    `exact` says whether importance ratios are exact, not estimated.
    """
    held_out = {name: value for row in rows for name, value in row.items() if name.startswith("eval/")}
    directions = [row[DIRECTION] for row in rows if DIRECTION in row][-DIRECTION_WINDOW:]
    is_measured = len(directions) == DIRECTION_WINDOW
    direction = math.fsum(directions) / DIRECTION_WINDOW if is_measured else 0.0
    first_ess = None if exact else next((row[ESS] for row in rows if ESS in row), None)
    return one_line(held_out | rows[-1], direction=direction, first_ess=first_ess)


def one_line(metrics: dict[str, float], *, direction: float = 0.0, first_ess: float | None = None) -> str:
    """Return the main metrics of a step and its `health` as text, with the reason unless it is healthy."""
    loss = {} if "reward" in metrics else {"loss": "loss"}  # the loss of RL does not show progress
    labels = loss | SHOWN | {name: name.removeprefix("warmup/") for name in metrics if name.startswith("warmup/")}
    texts = [f"{short} {metrics[name]:.3g}" for name, short in labels.items() if name in metrics]
    if metrics.get(MISMATCH):  # not 0, as without a quantized copy
        texts.append(f"mismatch {metrics[MISMATCH]:.2g} nats, ESS {metrics[ESS]:.4f}")
    if verdict := health(metrics, direction=direction, first_ess=first_ess):
        word, reason = verdict
        subject = "updates" if word == "backwards" else "mismatch"
        texts.append({"healthy": "healthy", "estimated": reason}.get(word, f"{subject} {word} ({reason})"))
    return "  ".join(texts)
