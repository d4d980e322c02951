"""The log of a run: lines on the screen, metrics.jsonl, completions.jsonl, trackers and stage timers."""

import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from rich.console import Console

from dllm_rl.device import peak_memory
from dllm_rl.monitoring.json_lines import JsonLines, current_rows, finite_numbers
from dllm_rl.monitoring.progress import ProgressDisplay
from dllm_rl.monitoring.record import RunRecord
from dllm_rl.screen import escape_controls
from dllm_rl.settings import Settings

MAX_FAILED = 3  # steps in a row that a tracker may fail
FIRST_HEARTBEAT = 60.0  # seconds of a stage until its first line; each further line comes after twice the time


class RunLog:
    """The run's log files, trackers and screen. Only the main process writes and prints."""

    def __init__(
        self,
        directory: Path,
        *,
        start: int,
        main: bool,
        sampled: int | None = None,  # steps of a resumed run that are not sampled again; None: `start`
        completions: bool = False,  # whether to write completions.jsonl
        held_out: bool = False,  # whether to write held_out.jsonl, whose steps count the updates before an evaluation
        trackers: Sequence[GeneralTracker] = (),
    ) -> None:
        self.main = main
        # Plain lines in a notebook, no widgets. Kernels and some CI services set FORCE_COLOR, so that rich assumes a
        # terminal; a live display would print cursor codes there.
        force_interactive = None if sys.stdout.isatty() else False
        self.console = Console(quiet=not main, force_jupyter=False, force_interactive=force_interactive)
        self.begun = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.entered = ""  # the stage that began last
        self.entering: Callable[[], None] | None = None  # called when a stage begins
        self.step_seconds: dict[str, float] = {}  # seconds of the stages of the current step
        self._warned: set[tuple[str, str]] = set()  # states and names of the problems that the screen has said
        self._steps_done = start
        self.files: dict[str, JsonLines] = {}
        completions = completions or (directory / "completions.jsonl").exists()
        begins = {"metrics": start}
        begins |= {"completions": start if sampled is None else sampled} if completions else {}
        begins |= {"held_out": start + 1} if held_out else {}
        for name, begin in begins.items() if main else ():
            self.files[name] = JsonLines(directory / f"{name}.jsonl", start=begin)
        self.trackers = list(trackers)
        self._started = list(trackers)  # also those that accept no more numbers
        self._refused: dict[str, set[str]] = {}  # tracker -> names of metrics that it does not accept
        self._failed: dict[str, int] = {}  # tracker -> number of the last steps that it did not accept
        rows_before = current_rows(directory / "metrics.jsonl") if main and start else []
        self.record = RunRecord(map(finite_numbers, rows_before))
        self.last = finite_numbers(rows_before[-1]) if rows_before else {}  # metrics of the last step

    @property
    def place(self) -> str:
        """The stage that began last and the number of steps done, in words."""
        return f"{self.entered or 'the beginning of a step'}, after {self._steps_done} steps"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to the stage `name`, for the run and for the step.

        A stage that takes long prints its name after 60 s, 120 s, 240 s ..., so that the output of a stuck process
        names it.
        """
        start_time = time.perf_counter()
        with self._watched(name):
            yield
        seconds = time.perf_counter() - start_time
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.step_seconds[name] = self.step_seconds.get(name, 0.0) + seconds

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        """In this context, name what runs, and print its name if it takes long."""
        self.entered = name
        if self.entering is not None:
            self.entering()
        done = threading.Event()
        threading.Thread(target=self._print_heartbeats, args=(done,), daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _print_heartbeats(self, done: threading.Event) -> None:
        place, rank = self.place, os.environ.get("RANK", "0")
        elapsed, begun = FIRST_HEARTBEAT, time.monotonic()
        while not done.wait(max(0.0, begun + elapsed - time.monotonic())):
            line = f"process {rank}: {place}, has taken {elapsed:g} s so far"
            self.say(line) if self.main else print(line, file=sys.stderr, flush=True)
            elapsed *= 2

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write a step's metrics and the seconds of its stages to metrics.jsonl (NaN and infinity as null) and to
        trackers. Warn of each problem that keeps the run from learning, once.
        """
        times = {f"time/{name}": seconds for name, seconds in self.step_seconds.items()}
        self.step_seconds = {}
        self._steps_done = step + 1
        row = {**metrics, "step_time": sum(times.values()), "memory/peak_gb": peak_memory(), **times}
        self.last = row
        self.record.add(finite_numbers({"step": step, **row}))
        for problem in self.record.problems:
            if (problem.state, problem.name) not in self._warned:
                self._warned.add((problem.state, problem.name))
                self.say(f"warning: {problem.state}, {problem.name}: {problem.text}")
        if self.main:
            self.files["metrics"].append({"step": step, **finite(row)})
        if self.trackers:  # in the main process alone; their servers may not answer for long
            with self._watched("trackers"):
                self.trackers = track(self.trackers, finite_numbers(row), step, self.say, self._refused, self._failed)

    def write_warmup(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line `{"warmup_step": 0, "warmup/loss": ...}` to metrics.jsonl."""
        if self.main:
            self.files["metrics"].append({"warmup_step": step, **finite(metrics)})
            # Only tensorboard: other trackers would refuse the RL steps, which begin at 0 again.
            tensorboards = [tracker for tracker in self.trackers if tracker.name == "tensorboard"]
            track(tensorboards, finite_numbers(metrics), step, self.say)

    def write_change(self, change: dict[str, Any]) -> None:
        """Write a line `{"changed": "learning_rate", "after_step": 10, ...}` to metrics.jsonl."""
        if self.main:
            row = {"changed": change["field"], "after_step": change["step"]}
            self.files["metrics"].append(row | {"before": change["before"], "after": change["after"]})

    def keep(self, rows: Sequence[dict[str, Any]], file: str = "completions") -> None:
        """Write rows to completions.jsonl, or to held_out.jsonl."""
        for row in rows if self.main else ():
            self.files[file].append(row)

    def flush(self) -> dict[str, tuple[int, str]]:
        """Force the rows to disk. Call it before a checkpoint, since a resume continues from them, and store what it
        returns: the size and the digest of each file's rows.
        """
        return {name: file.flush() for name, file in self.files.items()}

    def say(self, text: str) -> None:
        """Print lines safely: markup and control characters have no effect."""
        self.console.print(escape_controls(text, keep="\n"), markup=False, highlight=False, soft_wrap=True)

    def view(self, description: str, total: int, *, completed: int = 0) -> ProgressDisplay:
        """Return the display of a part of the run, to be called once per step."""
        return ProgressDisplay(self.console, description, total, completed=completed)

    def close(self) -> None:
        """Close the files and end the trackers, also those that accept no more numbers: mlflow would otherwise refuse
        the next run of this process. A second call does nothing.
        """
        files, self.files = self.files, {}
        for file in files.values():
            file.close()
        started, self._started = self._started, []
        end_trackers(started)


def finite(row: dict[str, float]) -> dict[str, float | None]:
    """Return the row with None in place of NaN and infinity."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def check_trackers(names: list[str]) -> None:
    """Raise ValueError if a tracker of `report_to` is not installed."""
    available = set(map(str, get_available_trackers()))
    for name in names:
        if name not in available:
            report_to = ",".join(names)
            raise ValueError(f"report_to={report_to!r}: {name} is not installed; pip install {name}, or leave it out")


def start_trackers(recipe: Settings, accelerator: Accelerator, *, start: int) -> list[GeneralTracker]:
    """Start the trackers in the main process. The run has the name of its folder, the project the recipe's name, or
    with wandb that of the environment variable WANDB_PROJECT.

    Raises:
        ValueError: A tracker did not start.
    """
    run = Path(recipe.directory).name
    project = os.environ.get("WANDB_PROJECT", recipe.name) if "wandb" in recipe.log.trackers else recipe.name
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": start},
        "wandb": {"name": run, "dir": recipe.directory},
        "trackio": {"name": run},
        "mlflow": {"run_name": run},
    }
    try:
        accelerator.init_trackers(project, init_kwargs=options)
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # tensorboard would show the settings as a separate run
                tracker.store_init_configuration(recipe.settings())
    except Exception as error:  # any exception of a tracker
        end_trackers(accelerator.trackers)  # those that did start
        raise ValueError(f"report_to={recipe.log.report_to!r} did not start: {error}") from error
    return list(accelerator.trackers)


def end_trackers(trackers: Sequence[GeneralTracker]) -> None:
    """End the trackers; ignore those that cannot."""
    for tracker in trackers:
        with suppress(Exception):  # any exception of a tracker
            tracker.finish()


def track(
    trackers: list[GeneralTracker],
    values: dict[str, float],
    step: int,
    say: Callable[[str], None],
    refused: dict[str, set[str]] | None = None,
    failed: dict[str, int] | None = None,
) -> list[GeneralTracker]:
    """Send the numbers of a step to the trackers; return the trackers that get the next ones, too. A tracker that
    accepts none in MAX_FAILED steps in a row, for example because its server does not answer, is left out. One that
    refuses single numbers, for their names, gets the others.

    Args:
        trackers: Trackers that have accepted the numbers of the steps before.
        values: Numbers by name.
        step: Number of the step.
        say: Function that prints a warning.
        refused: Names that each tracker, by its name, has refused so far; they are not sent again, and new ones are
            added. None (default): none so far.
        failed: Number of steps in a row that each tracker, by its name, has not accepted, which is updated. None
            (default): none so far.
    """
    refused = {} if refused is None else refused
    failed = {} if failed is None else failed
    working = []
    for tracker in trackers:
        unwanted = refused.setdefault(tracker.name, set())
        wanted = {name: value for name, value in values.items() if name not in unwanted}
        try:
            try:
                send(tracker, wanted, step)
            except Exception:  # any exception of a tracker
                reasons = send_each(tracker, wanted, step)
                unwanted.update(reasons)
                for name, reason in reasons.items():
                    say(f"warning: {tracker.name} does not accept the metric {name!r} ({reason}): it gets the others")
            failed[tracker.name] = 0
        except Exception as error:  # any exception of a tracker
            failed[tracker.name] = count = failed.get(tracker.name, 0) + 1
            rest = "it gets those of the next step"
            if count == MAX_FAILED:
                rest = f"the run continues without it, after {count} such steps in a row"
            say(f"warning: {tracker.name} did not accept the numbers of step {step} ({error}): {rest}")
        if failed[tracker.name] < MAX_FAILED:
            working.append(tracker)
    return working


def send(tracker: GeneralTracker, values: dict[str, float], step: int) -> None:
    """Send the numbers of a step to a tracker, whose exceptions are of any type."""
    if tracker.name == "tensorboard":  # its folder may be deleted at any time
        Path(tracker.logging_dir).mkdir(parents=True, exist_ok=True)
    if tracker.name == "mlflow":
        # Its file store uses names as paths: grad_norm/iteration_1 would need a folder named like the metric grad_norm.
        # Of other characters it accepts only some, and the name of a lambda, of a chat's role or of a unit has more.
        values = {re.sub(r"[^\w.\-: ]", "_", name.replace("/", ".")): value for name, value in values.items()}
    tracker.log(values, step=step)


def send_each(tracker: GeneralTracker, values: dict[str, float], step: int) -> dict[str, Exception]:
    """Send numbers that were not accepted together; return the reasons of those that the tracker refuses.

    The number with the plainest name goes first, and again after each number that was not accepted. If the tracker
    refuses that one, it is not for its name, and the tracker's exception is raised: each further one might wait for a
    server that does not answer. If the tracker takes it, the others are tried together, and each one twice, since a
    single time-out says nothing of a name.
    """
    reasons: dict[str, Exception] = {}
    first, *others = sorted(values, key=lambda name: not (name.isascii() and name.isidentifier()))
    send(tracker, {first: values[first]}, step)
    with suppress(Exception):  # any exception of a tracker
        send(tracker, {name: values[name] for name in others}, step)
        return {}
    for name in others:
        try:
            send(tracker, {name: values[name]}, step)
        except Exception:  # any exception of a tracker
            send(tracker, {first: values[first]}, step)
            try:
                send(tracker, {name: values[name]}, step)
            except Exception as error:  # any exception of a tracker
                reasons[name] = error
    return reasons
