"""Progress bars, log lines, metrics.jsonl, completions.jsonl, TensorBoard events and stage timers."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dllm_rl.screen import escape_controls
from dllm_rl.training.cautions import PATIENCE, flat_for
from dllm_rl.training.heartbeat import heartbeat
from dllm_rl.training.lines import JsonLines


class RunLog:
    """Owns the run's open files and its screen; silent on all processes but the main one."""

    def __init__(
        self, directory: Path, *, start: int, main: bool, patient: bool = False, completions: bool = False
    ) -> None:
        """start, patient  those of `JsonLines`. completions: a completions.jsonl is to be kept beside metrics.jsonl."""
        self.main, self.directory = main, directory
        self.console = Console(quiet=not main, force_jupyter=False)  # plain lines in a notebook: no widgets
        self.seconds: dict[str, float] = {}
        self.entered = ""  # the stage entered last
        self._step: dict[str, float] = {}
        self._flat = 0  # steps in a row in which no group's rewards differed
        self._warned = False
        self._done = start
        kept = ["metrics"] + ["completions"] * (completions or (directory / "completions.jsonl").exists())
        paths = {name: directory / f"{name}.jsonl" for name in kept if main}
        self.files = {name: JsonLines(path, start=start, patient=patient) for name, path in paths.items()}
        if main:
            from torch.utils.tensorboard import SummaryWriter

            self._board: SummaryWriter | None = SummaryWriter(str(directory / "tensorboard"), purge_step=start)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to the stage `name`, for the run and for the present step; one that takes
        long says so."""
        begin, self.entered = time.perf_counter(), name
        with heartbeat(f"{name}, after {self._done} steps,", self.say if self.main else None):
            yield
        spent = time.perf_counter() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self._step[name] = self._step.get(name, 0.0) + spent

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, the same numbers to tensorboard, with the seconds of this step's stages.

        JSON has no number for NaN or infinity: they are null there.
        """
        times = {f"time/{name}": spent for name, spent in self._step.items()}
        self._step, self._done = {}, step + 1
        self._flat = self._flat + 1 if metrics.get("frac_reward_zero_std") == 1 else 0
        if self._flat == PATIENCE and not self._warned:
            self._warned = True
            self.say(f"warning: {flat_for(PATIENCE)}")
        row = {**metrics, "step_time": sum(times.values()), **times}
        if self.main:
            self.files["metrics"].append({"step": step, **finite(row)})
            self._draw(step, row)

    def _draw(self, step: int, row: dict[str, float]) -> None:
        """The numbers to tensorboard. Its folder may be deleted at any time and is made again; where it cannot be, the
        run goes on without it."""
        if self._board is None:
            return
        try:
            (self.directory / "tensorboard").mkdir(exist_ok=True)
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            self._board = None
            self.say(f"tensorboard events can no longer be written ({error}): the run goes on without them")

    def keep(self, completions: Sequence[dict[str, Any]]) -> None:
        """Lines of completions.jsonl."""
        for row in completions if self.main else ():
            self.files["completions"].append(row)

    def show(self, what: RenderableType) -> None:
        """Print a table or the like, above the bar."""
        self.console.print(what)

    def flush(self) -> None:
        """Force the rows to disk: what a checkpoint is to go on from must not be lost after it."""
        for file in self.files.values():
            file.flush()
        if self.main and self._board is not None:
            with suppress(OSError):
                self._board.flush()

    def say(self, text: str) -> None:
        """Print lines, which may hold foreign text: no markup and no control character in them is obeyed."""
        self.console.print(escape_controls(text, keep="\n"), markup=False, highlight=False, soft_wrap=True)

    def bar(self, description: str, total: int, *, completed: int = 0) -> Callable[..., None]:
        """A progress bar with elapsed and remaining time; returns progress(metrics, show=..., close=...), called once a
        step, which moves the bar, prints the metrics as a line where `show`, and ends the bar when it is full."""
        columns = (
            TextColumn("{task.description:8}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        note = TextColumn("{task.fields[note]}", markup=False)
        bar = Progress(*columns, note, console=self.console, disable=not self.main)
        task = bar.add_task(escape_controls(description), total=total, completed=completed, note="")
        if completed < total:
            bar.start()

        def progress(metrics: dict[str, float], *, show: bool, close: bool = False) -> None:
            bar.update(task, advance=not close, note=one_line(metrics))
            if show:
                self.say(f"{description} {int(bar.tasks[0].completed):5}/{total}  {one_line(metrics)}")
            if close or bar.finished:
                bar.stop()

        return progress

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        if self.main and self._board is not None:
            with suppress(OSError):  # tensorboard's thread raises here what stopped it
                self._board.close()


def finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """The numbers as JSON can hold them: None for NaN and infinity."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


SHOWN = {
    "loss": "loss",
    "solve_rate": "solve rate",
    "accuracy": "accuracy",
    "reward": "reward",
    "rewards/solve_rate/mean": "solved",
    "rewards/accuracy/mean": "correct",
    "rollout_corr/rollout_is_eff_sample_size": "ESS",
    "rollout_corr/k3_kl": "k3",
    "eval/solve_rate": "validation solve rate",
}


MILD, STRONG = 0.95, 0.70  # ESS that AIS reports early in training, and late where nothing is corrected [digest]
BACKWARDS = 0.005  # largest contribution of a sign of A, averaged over tokens, that still passes for noise [ours]


def one_line(metrics: dict[str, float]) -> str:
    """The few numbers worth a look while a run goes on, and the `health` of the step."""
    numbers = [f"{short} {metrics[name]:.3g}" for name, short in SHOWN.items() if name in metrics]
    return "  ".join([*numbers, *filter(None, [health(metrics)])])


def health(metrics: dict[str, float]) -> str:
    """The step in a word or two; empty without mismatch metrics.

    strong mismatch, mismatch  ESS of the raw ratios old / rollout over all rows is below STRONG, below MILD.
    updates backfire           a contribution C = -(r - 1) A of the step's updates, for one sign of A, against the
        learner's start or against the rollout, is above BACKWARDS: ratios moved against their advantages. K1 and K3 can
        stay flat meanwhile (VeXact [digest]). On 4x4 Sudoku (60 steps of two updates, seed 0) it was said at none of
        120 steps unquantised and at FP8, which ended at 0.585, and at 30 of 60 with five levels and no corrector, which
        ended at 0.12 [ours].
    healthy                    none of these.
    """
    ess = metrics.get("rollout_corr/ess")
    if ess is None:
        return ""
    moved = [v for n, v in metrics.items() if n.startswith("off_policy/") and "/contribution_" in n]
    found = ["strong mismatch"] if ess < STRONG else ["mismatch"] if ess < MILD else []
    found += ["updates backfire"] if max(moved, default=0.0) > BACKWARDS else []
    return ", ".join(found) or "healthy"
