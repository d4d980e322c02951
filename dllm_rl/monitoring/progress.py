"""Progress of a run: a live display on a terminal, plain lines elsewhere."""

import atexit
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

from rich.console import Console, ConsoleRenderable, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

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
BLOCKS = "▁▂▃▄▅▆▇█"
COLORS = {  # by word of `health`; other words are red
    "healthy": "green",
    "mild": "yellow",
    "estimated": "",
}
ESS = "rollout_corr/ess"


def progress_bar(console: Console, description: str, total: int, *, completed: int = 0) -> Progress:
    """Return a bar of one task, for `ProgressDisplay`."""
    remaining = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    columns = (TextColumn("{task.description:8}", markup=False), MofNCompleteColumn(), BarColumn(None), *remaining)
    # Estimate the speed over all steps. Rich's default uses only the last 30 s, in which there may be no step.
    bar = Progress(*columns, console=console, expand=True, speed_estimate_period=math.inf)
    bar.add_task(escape_controls(description), total=total, completed=completed)
    return bar


class ProgressDisplay:
    """Steps, times, a curve and the size of the training-inference mismatch, in 80 columns. Call it once per step."""

    def __init__(
        self,
        bar: Progress,
        *,
        curve: str,
        past: Sequence[Mapping[str, float]] = (),
        exact: bool = True,
        stage: Callable[[], str] = lambda: "",
    ) -> None:
        """Show a bar on its console, if the console is a terminal.

        Args:
            bar: Bar of one task, as `progress_bar` returns it.
            curve: Name of the metric to draw.
            past: Metrics of the steps so far. Default: none.
            exact: Whether importance ratios are exact, not estimated. False: the ESS is shown beside the ESS of the
                first step. Default: True.
            stage: Function that returns the present stage in words. Default: no stage is shown.
        """
        self.bar = bar
        self.curve = curve
        self.values = [row[curve] for row in past if curve in row]
        self.exact = exact
        self.first_ess = None if exact else next((row[ESS] for row in past if ESS in row), None)
        self.metrics: dict[str, float] = {}
        self.directions = deque[float](maxlen=DIRECTION_WINDOW)
        self.stage = stage
        console = bar.console
        self.live = Live(self, console=console)
        if console.is_interactive and not console.quiet and not bar.finished:
            self.live.start()  # on a terminal only: a file gets plain lines
            atexit.register(console.show_cursor)  # also after an error

    @property
    def task(self) -> Task:
        return self.bar.tasks[0]

    def __call__(self, metrics: dict[str, float], *, show: bool, close: bool = False) -> None:
        """Count one step; with `close`, count none and end the display. With `show`, also print a permanent line."""
        self.metrics |= metrics
        if not self.exact and self.first_ess is None:
            self.first_ess = metrics.get(ESS)
        self.directions += [metrics[DIRECTION]] if DIRECTION in metrics else []
        if math.isfinite(metrics.get(self.curve, math.nan)):
            self.values.append(metrics[self.curve])
        had_no_eta = self.task.time_remaining is None
        self.bar.update(self.task.id, advance=0 if close else 1)
        if show or (had_no_eta and self.task.time_remaining):  # also as soon as an ETA is known
            self.bar.console.print(literal(self.line(metrics)), soft_wrap=True)
        if close or self.bar.finished:
            self.stage = lambda: ""
            self.live.stop()

    @property
    def direction(self) -> float:
        """Mean of the last DIRECTION_WINDOW values of `update/direction`; 0 while there are fewer."""
        return math.fsum(self.directions) / DIRECTION_WINDOW if len(self.directions) == DIRECTION_WINDOW else 0.0

    def line(self, metrics: dict[str, float]) -> str:
        task = self.task
        seconds = task.time_remaining
        eta = [] if seconds is None or task.finished else [f"ETA {timedelta(seconds=math.ceil(seconds))}"]
        done = f"{task.description} {int(task.completed)}/{task.total:.0f}"
        return "  ".join(
            filter(None, [done, one_line(metrics, direction=self.direction, first_ess=self.first_ess), *eta])
        )

    def __rich__(self) -> ConsoleRenderable:
        below = [Text.assemble(f"{name:11}", literal(text, style=color)) for name, text, color in self.rows()]
        return Group(self.bar, *below)

    def rows(self) -> list[tuple[str, str, str]]:
        """Return name, text and color of each line below the bar."""
        rows = []
        if self.values:
            name = self.curve.rpartition("/")[2]
            span = f"{min(self.values):.3g} to {max(self.values):.3g}"
            text = f"{self.values[-1]:.3g}  {sparkline(self.values)}  {span}"
            rows.append((name if len(name) < 11 else "curve", text, ""))
        if verdict := health(self.metrics, direction=self.direction, first_ess=self.first_ess):
            word, reason = verdict
            subject = "updates" if word == "backwards" else "mismatch"
            rows.append((subject, f"{word}: {reason}", COLORS.get(word, "red")))
        if stage := self.stage():
            rows.append(("now", f"step {int(self.task.completed) + 1}, {stage}", "dim"))
        return rows


def sparkline(values: Sequence[float], *, width: int = 30) -> str:
    """Return at most `width` block characters. With more values than that, each block shows a mean of several.

    The highest mean gets a full block.
    """
    count = min(width, len(values))
    means = []
    for index in range(count):
        averaged = values[index * len(values) // count : (index + 1) * len(values) // count]
        means.append(math.fsum(averaged) / len(averaged))
    low = min(means)
    span = max(means) - low or 1.0  # if all values are equal, all blocks are the lowest
    return "".join(BLOCKS[int((mean - low) / span * (len(BLOCKS) - 1) + 0.5)] for mean in means)


def one_line(metrics: dict[str, float], *, direction: float = 0.0, first_ess: float | None = None) -> str:
    """Return the main metrics of a step and its `health` as text, with the reason unless it is healthy."""
    loss = {} if "reward" in metrics else {"loss": "loss"}  # the loss of RL does not show progress
    labels = loss | SHOWN | {name: name.removeprefix("warmup/") for name in metrics if name.startswith("warmup/")}
    texts = [f"{short} {metrics[name]:.3g}" for name, short in labels.items() if name in metrics]
    if verdict := health(metrics, direction=direction, first_ess=first_ess):
        word, reason = verdict
        subject = "updates" if word == "backwards" else "mismatch"
        texts.append({"healthy": "healthy", "estimated": reason}.get(word, f"{subject} {word} ({reason})"))
    return "  ".join(texts)
