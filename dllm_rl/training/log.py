"""Progress bars, log lines, metrics.jsonl, TensorBoard events and stage timers."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dllm_rl.screen import escape_controls
from dllm_rl.training.cautions import PATIENCE, flat_for
from dllm_rl.training.heartbeat import heartbeat


class RunLog:
    """Owns the run's open files and its screen; silent on all processes but the main one."""

    def __init__(self, directory: Path, *, start: int, main: bool, patient: bool = False) -> None:
        """start    the first step; rows of it and of later ones, from before, count no longer.
        patient  keep a row that the disk has no room for, and write it later, rather than raise OSError.
        """
        self.main, self.directory, self.patient = main, directory, patient
        self.console = Console(quiet=not main, force_jupyter=False)  # plain lines in a notebook: no widgets
        self.seconds: dict[str, float] = {}
        self.entered = ""  # the stage entered last
        self._waiting = b""  # rows that are not written yet
        self._step: dict[str, float] = {}
        self._flat = 0  # steps in a row in which no group's rewards differed
        self._warned = False
        self._done = start
        if main:
            from torch.utils.tensorboard import SummaryWriter

            path = directory / "metrics.jsonl"
            self._jsonl = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            if size := os.fstat(self._jsonl).st_size:
                # A kill may have left half a line. What is there stays: readers skip what the resume runs again.
                torn = os.pread(self._jsonl, 1, size - 1) != b"\n"
                self._append("\n" * torn + json.dumps({"resume_from": start}) + "\n")
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
            finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
            self._append(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
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

    def _append(self, text: str) -> None:
        self._waiting += text.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._jsonl, self._waiting) :]
        except OSError as error:
            if not self.patient:
                path = self.directory / "metrics.jsonl"
                raise OSError(error.errno, f"{path}: {error.strerror}; make room and resume") from error

    def flush(self) -> None:
        """Force the rows to disk: what a checkpoint is to go on from must not be lost after it."""
        if self.main:
            self._append("")
            os.fsync(self._jsonl)
            if self._board is not None:
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
        if self.main:
            self._append("")
            os.close(self._jsonl)
            if self._board is not None:
                with suppress(OSError):  # tensorboard's thread raises here what stopped it
                    self._board.close()


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


def current_rows(path: Path) -> list[dict[str, float | int]]:
    """The rows of a metrics.jsonl that count, a step each.

    `{"resume_from": N}` says that the steps from N on were run again after it. A line that is no JSON object with a
    step, as a kill may leave one, is none.
    """
    rows: list[dict[str, float | int]] = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # neither UTF-8 nor JSON
            continue
        if not isinstance(row, dict):
            continue
        if isinstance(row.get("resume_from"), int):
            rows = [other for other in rows if other["step"] < row["resume_from"]]
        elif isinstance(row.get("step"), int):
            rows.append(row)
    return rows
