"""Progress bars, log lines, metrics.jsonl, TensorBoard events and stage timers."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dllm_rl.files import write_text


class RunLog:
    """Owns the run's open files and its screen; silent on all processes but the main one."""

    def __init__(self, directory: Path, *, start: int, main: bool) -> None:
        self.main, self.directory = main, directory
        self.console = Console(quiet=not main)
        self.seconds: dict[str, float] = {}
        self._step: dict[str, float] = {}
        if main:
            from torch.utils.tensorboard import SummaryWriter

            path = directory / "metrics.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            # Steps after the checkpoint that a run resumes from will be run again.
            kept = [line for line in lines if _step_of(line) is not None and _step_of(line) < start]
            write_text(path, "".join(line + "\n" for line in kept))
            self._jsonl = path.open("a")
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to the stage `name`, for the run and for the present step."""
        begin = time.perf_counter()
        yield
        spent = time.perf_counter() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self._step[name] = self._step.get(name, 0.0) + spent

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, the same numbers to tensorboard, with the seconds of this step's stages."""
        times = {f"time/{name}": spent for name, spent in self._step.items()}
        self._step = {}
        row = {**metrics, "step_time": sum(times.values()), **times}
        if self.main:
            self._jsonl.write(json.dumps({"step": step, **row}) + "\n")
            self._jsonl.flush()
            for name, value in row.items():
                self._board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def bar(self, description: str, total: int, *, completed: int = 0) -> Callable[..., None]:
        """A progress bar with elapsed and remaining time; returns progress(metrics, show=..., close=...), called once a
        step, which moves the bar, prints the metrics as a line where `show`, and ends the bar when it is full."""
        columns = (
            TextColumn("{task.description:8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console, disable=not self.main)
        task = bar.add_task(description, total=total, completed=completed, note="")
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
            self._jsonl.close()
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


def _step_of(line: str) -> int | None:
    """The step of a line of metrics.jsonl; None for one that a killed run left half-written."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return None
