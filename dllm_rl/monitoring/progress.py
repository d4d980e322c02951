"""Progress of a run: a bar on a terminal, and lines."""

import atexit
import math
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dllm_rl.screen import escape_controls, literal

MAX_SILENCE = 300.0  # seconds between two lines, unless a step takes longer


class ProgressDisplay:
    """The steps of a part of a run: a bar on a terminal, and lines.

    Call it once per step.

    Args:
        console: Console to print on. The bar is shown if it is a terminal.
        description: Name of the part of the run.
        total: Number of steps.
        completed: Steps that are done already. Default: 0.
    """

    def __init__(self, console: Console, description: str, total: int, *, completed: int = 0) -> None:
        remaining = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        columns = (TextColumn("{task.description:8}", markup=False), MofNCompleteColumn(), BarColumn(None), *remaining)
        # Estimate the speed over all steps. Rich's default uses only the last 30 s, in which there may be no step.
        self.bar = Progress(*columns, console=console, expand=True, speed_estimate_period=math.inf)
        self.bar.add_task(escape_controls(description), total=total, completed=completed)
        self.called = self.shown = self.bar.get_time()  # when the last step ended, and when the last line came
        if console.is_interactive and not console.quiet and not self.bar.finished:
            self.bar.start()  # on a terminal only: a file gets plain lines
            atexit.register(console.show_cursor)  # also after an error

    def __call__(self, text: str, *, show: bool, close: bool = False) -> None:
        """Count one step, which `text` describes; with `close`, count none and end the bar. With `show`, also print a
        line. One is printed too as soon as a time left is known, and if the next step, should it take as long as this
        one, would end more than MAX_SILENCE seconds after the last line.
        """
        task, now = self.bar.tasks[0], self.bar.get_time()
        had_no_eta = task.time_remaining is None
        self.bar.update(task.id, advance=0 if close else 1)
        is_due = not close and now + (now - self.called) - self.shown > MAX_SILENCE
        self.called = now
        if show or is_due or (had_no_eta and task.time_remaining):
            self.shown = now
            self.bar.console.print(literal(self.line(text)), soft_wrap=True)
        if (close or self.bar.finished) and self.bar.live.is_started:
            self.bar.stop()

    def line(self, text: str) -> str:
        """Return the step, `text`, and the time left."""
        task = self.bar.tasks[0]
        texts = [f"{task.description} {int(task.completed)}/{task.total:.0f}", text]
        if task.time_remaining is not None and not task.finished:
            texts.append(f"ETA {timedelta(seconds=math.ceil(task.time_remaining))}")
        return "  ".join(filter(None, texts))
