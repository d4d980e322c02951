"""Several runs side by side that start from one model, such as a method and what it is compared with."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

from dllm_rl.callbacks import Callback, RunControl
from dllm_rl.checkpoints.run_folder import default_folder
from dllm_rl.cli.run_recipe import as_program
from dllm_rl.distributed.stop import how_to_continue
from dllm_rl.evaluation.compare import Comparison, compare
from dllm_rl.files import read_json
from dllm_rl.recipe import Recipe
from dllm_rl.screen import escape_controls
from dllm_rl.training.trainer import train
from dllm_rl.training.validation import format_metrics

PROCESSES = multiprocessing.get_context("forkserver")  # an arm is forked from a process that has imported this
PROCESSES.set_forkserver_preload(["dllm_rl.training.trainer", "matplotlib.backends.backend_agg", "matplotlib.figure"])


def train_arms(arms: Mapping[str, Recipe], *, output_dir: str | None = None) -> Comparison:
    """Train recipes at the same time on one machine, each in a process with one CPU thread, and compare them.

    Call it for a method and its controls: it warms the model up once, so that all arms start from the same weights.
    Each arm is an ordinary run in the folder of its name, and what it prints is in its log.txt. If one arm fails, or on
    Ctrl-C, the others save a checkpoint and end; with `resume_from_checkpoint="latest"` all of them go on.

        comparison = train_arms({"plain": recipe, "TIS": recipe.replace(corrector=TIS())}, output_dir="runs/tis")
        print("\\n".join(comparison.sentences()))

    Args:
        arms: Recipe of each arm by its name, which is also its folder's. The first one is what the others are compared
            with, and its warm-up is that of all. Nothing but what is compared should differ.
        output_dir: The folder of all arms. Default: that of the first recipe.

    Returns:
        The comparison of the arms on `eval_task`, as of `dllm_rl.evaluation.compare.compare`.

    Raises:
        ValueError: A recipe cannot run, or the program was launched as several processes.
        ChildProcessError: An arm failed; the message has the last line of its log.
        OSError: A file cannot be written.
    """
    import torch

    first = next(iter(arms.values()))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("each arm has a process of its own: launch one, with recipes/accelerate/cpu.yaml")
    if first.resume_from_checkpoint not in (None, "latest"):
        raise ValueError(
            f"resume_from_checkpoint={first.resume_from_checkpoint!r} belongs to one run, and these are several: give "
            "latest, and the output_dir of all"
        )
    folder = Path(output_dir or first.output_dir or default_folder(first)).absolute()
    print(escape_controls(f"{len(arms)} arms of {first.num_steps} steps, into {folder}: {'; '.join(arms)}"), flush=True)
    torch.set_num_threads(1)  # the arms share the cores, and other numbers of threads round differently
    forkserver.ensure_running()  # it imports during the warm-up
    model = {}
    if first.warmup.steps:
        warm = train(first.replace(num_steps=0, evaluation={"steps": 0}, output_dir=str(folder)))
        model = {"model": warm["checkpoint"], "warmup": {"steps": 0}}
    placed = {
        name: arm.replace(**model, name=f"{first.name}-{name}", output_dir=str(folder / name))
        for name, arm in arms.items()
    }
    print(f"The arms train side by side; what they print is in {folder}/ARM/log.txt.", flush=True)
    try:
        train_side_by_side(placed)
    except KeyboardInterrupt:
        print(f"stopped: {how_to_continue(str(folder))}")
        raise
    for name, arm in placed.items():
        for problem in read_json(Path(arm.directory) / "summary.json")["problems"]:
            print(escape_controls(f"{name}: {problem['state']}, {problem['name']}: {problem['text']}"))
    return compare({name: [arm.directory] for name, arm in placed.items()})


def train_side_by_side(arms: Mapping[str, Recipe]) -> None:
    """Train the arms at the same time, and wait for them."""
    processes = {
        name: PROCESSES.Process(target=train_arm, args=(name, arm), daemon=True)  # type: ignore[attr-defined]
        for name, arm in arms.items()
    }
    try:
        for process in processes.values():
            process.start()
        while running := [process.sentinel for process in processes.values() if process.is_alive()]:
            wait(running)
            if failed := [name for name, process in processes.items() if process.exitcode]:
                log = Path(arms[failed[0]].directory) / "log.txt"
                lines = log.read_text().splitlines() if log.exists() else []
                ended = f"the arm {failed[0]} ended with status {processes[failed[0]].exitcode}"
                raise ChildProcessError(f"{ended}: {''.join(lines[-1:])} ({log})")
    finally:
        for process in processes.values():
            if process.is_alive():
                process.terminate()  # by a signal, on which its run stops after the step, and saves
        for process in processes.values():
            if process.pid is not None:
                process.join()


def train_arm(name: str, recipe: Recipe) -> None:
    """Train an arm in this process, which prints into a file."""
    import torch

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    folder = Path(recipe.directory)
    folder.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.dup(1), "w") as screen, (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        with as_program():
            train(replace(recipe, callbacks=(*recipe.callbacks, OnScreen(name, screen))))


def end_with_parent() -> None:
    """When the process that started this one has ended, stop this one's run, which saves a checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


class OnScreen(Callback):
    """Print an arm's evaluations on the screen of the program that started it."""

    def __init__(self, name: str, screen: IO[str]) -> None:
        self._arm, self._screen = name, screen  # no settings of the run, in which two arms or seeds would differ

    def on_evaluate(self, run: RunControl, metrics: Mapping[str, float]) -> None:
        shown = format_metrics({name.removeprefix("eval/"): value for name, value in metrics.items()})
        print(
            escape_controls(f"{self._arm}: {run.step} of {run.num_steps} steps, {shown}"), file=self._screen, flush=True
        )

    def state(self) -> dict[str, Any]:
        return {}
