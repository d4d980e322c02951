"""Log lines, metrics.jsonl, completions.jsonl, trackers and stage timers."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from rich.console import Console, RenderableType

from dllm_rl.device import peak_memory
from dllm_rl.monitoring.health import EQUAL_REWARD_STEPS
from dllm_rl.monitoring.json_lines import JsonLines, current_rows, known
from dllm_rl.monitoring.progress import ProgressDisplay, progress_bar
from dllm_rl.recipe import Settings
from dllm_rl.screen import escape_controls


class RunLog:
    """The run's open files and its screen; silent on all processes except the main one."""

    def __init__(
        self,
        directory: Path,
        *,
        start: int,
        main: bool,
        patient: bool = False,
        completions: bool = False,  # write a completions.jsonl too
        trackers: Sequence[GeneralTracker] = (),
    ) -> None:
        self.main = main
        # Plain lines in a notebook, no widgets. A kernel and some CI services set FORCE_COLOR, which rich takes for a
        # terminal: a live view would print cursor codes there.
        live = None if sys.stdout.isatty() else False
        self.console = Console(quiet=not main, force_jupyter=False, force_interactive=live)
        self.begun = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.entered = self.inside = ""  # the stage entered last, and the present one
        self.entering: Callable[[], None] = lambda: None  # called at the beginning of each stage
        self._step: dict[str, float] = {}
        self._flat = 0  # steps in a row in which no group's rewards differed
        self._warned = False
        self._done = start
        self.files: dict[str, JsonLines] = {}
        completions = completions or (directory / "completions.jsonl").exists()
        names = ("metrics", "completions") if completions else ("metrics",)
        for name in names if main else ():
            self.files[name] = JsonLines(directory / f"{name}.jsonl", start=start, patient=patient)
        self.trackers = list(trackers)
        before = current_rows(directory / "metrics.jsonl") if main and start else []
        self.last = known(before[-1]) if before else {}  # the last step's numbers

    @property
    def patience(self) -> float:
        """For how many times `peer_timeout` the main thread may stand still in the present stage."""
        if self.inside in ("rollout", "scoring", "update", "sync", "gradients"):
            return 1.0
        # A grader may wait for a network until reward_timeout. In other stages a disk or a screen may be slow.
        return math.inf if self.inside in ("reward", "evaluation", "warm-up") else 10.0

    @property
    def place(self) -> str:
        """The stage entered last and the steps done, in words."""
        return f"{self.entered or 'the beginning of a step'}, after {self._done} steps"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to the stage `name`, of the run and of the step, with a `heartbeat`."""
        begin = time.perf_counter()
        self.entered = self.inside = name
        self.entering()
        try:
            with heartbeat(f"{name}, after {self._done} steps,", self.say if self.main else None):
                yield
        finally:
            self.inside = ""
        spent = time.perf_counter() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self._step[name] = self._step.get(name, 0.0) + spent

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write a step's metrics, and its stages' seconds, to metrics.jsonl (NaN, infinity: null) and to trackers."""
        times = {f"time/{name}": spent for name, spent in self._step.items()}
        self._step = {}
        self._done = step + 1
        self._flat = self._flat + 1 if metrics.get("frac_reward_zero_std") == 1 else 0
        if self._flat == EQUAL_REWARD_STEPS and not self._warned:
            self._warned = True
            self.say(
                f"warning: in the last {EQUAL_REWARD_STEPS} steps the rewards of every group were equal, which teaches "
                "nothing: see whether the grader distinguishes completions, or take easier problems or more generations"
            )
        row = {**metrics, "step_time": sum(times.values()), "memory/peak_gb": peak_memory(), **times}
        self.last = row
        if self.main:
            self.files["metrics"].append({"step": step, **finite(row)})
            self.trackers = track(self.trackers, numbers(row), step, self.say)

    def write_warmup(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line `{"warmup_step": 0, "warmup/loss": ...}` to metrics.jsonl."""
        if self.main:
            self.files["metrics"].append({"warmup_step": step, **finite(metrics)})
            # Other trackers refuse RL steps that begin at 0 again.
            boards = [tracker for tracker in self.trackers if tracker.name == "tensorboard"]
            track(boards, numbers(metrics), step, self.say)

    def write_change(self, change: dict[str, Any]) -> None:
        """Write a line `{"changed": "learning_rate", "after_step": 10, ...}` to metrics.jsonl."""
        if self.main:
            row = {"changed": change["field"], "after_step": change["step"]}
            self.files["metrics"].append(row | {"before": change["before"], "after": change["after"]})

    def keep(self, completions: Sequence[dict[str, Any]]) -> None:
        for row in completions if self.main else ():
            self.files["completions"].append(row)

    def show(self, what: RenderableType) -> None:
        self.console.print(what)

    def flush(self) -> None:
        """Force the rows to disk, before a checkpoint that continues from them."""
        for file in self.files.values():
            file.flush()

    def say(self, text: str) -> None:
        """Print lines safely: markup and control characters have no effect."""
        self.console.print(escape_controls(text, keep="\n"), markup=False, highlight=False, soft_wrap=True)

    def view(
        self, description: str, total: int, *, curve: str, completed: int = 0, exact: bool = True
    ) -> ProgressDisplay:
        """Return the display of a part of the run, to be called once per step. It draws the metric `curve`."""
        rows = current_rows(self.files["metrics"].path) if self.main and completed else []
        bar = progress_bar(self.console, description, total, completed=completed)
        return ProgressDisplay(bar, curve=curve, past=list(map(known, rows)), exact=exact, stage=lambda: self.entered)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        for tracker in self.trackers:
            with suppress(Exception):  # of any kind: a tracker's own
                tracker.finish()


def finite(row: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def numbers(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if math.isfinite(value)}


def check_trackers(recipe: Settings) -> None:
    there = set(map(str, get_available_trackers()))
    for name in recipe.trackers:
        if name not in there:
            raise ValueError(
                f"report_to={recipe.report_to!r}: {name} is not installed; pip install {name}, or leave it out"
            )


def start_trackers(recipe: Settings, accelerator: Accelerator, *, start: int) -> list[GeneralTracker]:
    """The main process's trackers: the recipe names the project, the folder the run. Raises ValueError on a failure."""
    run = Path(recipe.directory).name
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": start},
        "wandb": {"name": run, "dir": recipe.directory},
        "trackio": {"name": run},
        "mlflow": {"run_name": run},
    }
    try:
        accelerator.init_trackers(recipe.name, init_kwargs=options)
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # tensorboard would make a separate run of them
                tracker.store_init_configuration(recipe.settings())
    except Exception as error:  # of any kind: a tracker's own
        raise ValueError(f"report_to={recipe.report_to!r} did not start: {error}") from error
    return list(accelerator.trackers)


def track(
    trackers: list[GeneralTracker], values: dict[str, float], step: int, say: Callable[[str], None]
) -> list[GeneralTracker]:
    """Send a step's numbers; returns the trackers that took them. The run goes on without those that fail."""
    taken = []
    for tracker in trackers:
        try:
            if tracker.name == "tensorboard":  # its folder may be deleted at any time
                Path(tracker.logging_dir).mkdir(parents=True, exist_ok=True)
            # mlflow's file store keeps a/b in a file: grad_norm/iteration_1 would need a folder named grad_norm.
            flat = {name.replace("/", "."): value for name, value in values.items()}
            tracker.log(flat if tracker.name == "mlflow" else values, step=step)
            taken.append(tracker)
        except Exception as error:  # of any kind: a tracker's own
            say(f"warning: {tracker.name} takes no more numbers ({error}): the run goes on without it")
    return taken


FIRST = 60.0  # seconds until the first line; the time doubles for each further one


@contextmanager
def heartbeat(stage: str, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Print the stage and its duration after 60 s, 120 s, 240 s ...: a stuck process's line names its stage."""
    done = threading.Event()
    began = time.monotonic()
    rank = os.environ.get("RANK", "0")

    def beat() -> None:
        passed = FIRST
        while not done.wait(max(0.0, began + passed - time.monotonic())):
            line = f"process {rank}: {stage} has taken {passed:g} s so far"
            say(line) if say else print(line, file=sys.stderr, flush=True)
            passed *= 2

    threading.Thread(target=beat, daemon=True).start()  # a frozen process prints none
    try:
        yield
    finally:
        done.set()
