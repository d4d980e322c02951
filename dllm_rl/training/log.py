"""Progress bars, log lines, metrics.jsonl, TensorBoard events and stage timers."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dllm_rl.files import write_text
from dllm_rl.screen import escape_controls
from dllm_rl.training.cautions import PATIENCE, flat_for
from dllm_rl.training.heartbeat import heartbeat


class RunLog:
    """Owns the run's open files and its screen; silent on all processes but the main one."""

    def __init__(self, directory: Path, *, start: int, main: bool) -> None:
        self.main, self.directory = main, directory
        self.console = Console(quiet=not main)
        self.seconds: dict[str, float] = {}
        self._step: dict[str, float] = {}
        self._flat = 0  # steps in a row in which no group's rewards differed
        self._warned = False
        self._done = start
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
        """Add the block's wall-clock seconds to the stage `name`, for the run and for the present step; one that takes
        long says so."""
        begin = time.perf_counter()
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
            self._jsonl.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
            self._jsonl.flush()
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
            self._jsonl.close()
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


def one_line(metrics: dict[str, float]) -> str:
    """The few numbers worth a look while a run goes on."""
    return "  ".join(f"{short} {metrics[name]:.3g}" for name, short in SHOWN.items() if name in metrics)


def _step_of(line: str) -> int | None:
    """The step of a line of metrics.jsonl; None for one that a killed run left half-written."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return None
