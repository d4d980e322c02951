"""`dllm-rl status`: how far a run is, from the files in its folder."""

import argparse
import math
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.run_folder import RUN_MARKERS
from dllm_rl.cli.stop_run import writing_process
from dllm_rl.distributed.stop import how_to_continue, started_by_command
from dllm_rl.files import read_json
from dllm_rl.likelihoods.estimators import LikelihoodEstimator
from dllm_rl.monitoring.json_lines import current_rows, finite_numbers, warmup_rows
from dllm_rl.monitoring.record import RunRecord
from dllm_rl.records import check_is_folder, from_json
from dllm_rl.screen import escape_controls

RECENT = 20  # steps whose mean time gives the time left


def status_command(arguments: argparse.Namespace) -> None:
    """Print whether the run that writes a folder is going on, its step, reward and health, and the time left.

    Raises:
        ValueError: The folder contains no run.
    """
    print(escape_controls(status_of(Path(arguments.path)), keep="\n"))


def status_of(directory: Path) -> str:
    """Return the text of `dllm-rl status`, of a run that goes on, has ended, was stopped, or was killed.

    Raises:
        ValueError: The folder contains no run.
    """
    check_is_folder(directory, "the folder that a run writes, its output_dir")
    process = None
    with suppress(ValueError):  # no process writes it
        process = "process {} on {}".format(*writing_process(directory))
    if process is None and not any((directory / name).exists() for name in RUN_MARKERS):
        raise ValueError(f"{directory} contains no run; give the folder that a run writes, its output_dir")
    recipe = stored_recipe(directory)
    log = directory / "metrics.jsonl"
    rows = current_rows(log) if log.is_file() else []
    num_done, num_steps = (rows[-1]["step"] + 1 if rows else 0), recipe.get("num_steps")
    is_complete = num_steps is not None and num_done >= num_steps
    heading = f"{directory}: " + (f"going on, {process}" if process else how_it_ended(directory, num_done, is_complete))
    texts = [f"step {num_done}" + ("" if num_steps is None else f"/{num_steps}")]
    numbers = [finite_numbers(row) for row in rows]
    record = RunRecord(numbers, exact=has_exact_ratios(recipe))
    if rows:
        texts.append(record.line())
        times = [row["step_time"] for row in numbers[-RECENT:] if "step_time" in row]
        if process and times and num_steps and not is_complete:
            seconds = (num_steps - num_done) * math.fsum(times) / len(times)
            texts.append(f"ETA {timedelta(seconds=math.ceil(seconds))}")
    elif log.is_file() and (warmup := warmup_rows(log)):
        texts.append(f"warm-up step {warmup[-1]['warmup_step'] + 1}")
    problems = [f"{problem.state}, {problem.name}: {problem.text}" for problem in record.problems]
    return "\n".join([heading, "  ".join(filter(None, texts)), *problems])


def how_it_ended(directory: Path, num_done: int, is_complete: bool) -> str:
    """Return how a run ended that no process writes any more, and how to continue it unless all of its steps are
    done.
    """
    path = directory / "summary.json"
    summary = read_json(path) if path.exists() else {}
    with started_by_command():
        advice = how_to_continue(str(directory))
    stopped = summary.get("stopped")
    if stopped is not None and stopped["step"] == num_done:
        return f"stopped ({stopped['reason']}); {advice}"
    if is_complete and summary and stopped is None:
        return "ended"
    return f"failed or was killed; {advice}"


def stored_recipe(directory: Path) -> dict[str, Any]:
    """Return the settings in the newest checkpoint, as JSON; {} before the first one."""
    for _, folder in reversed(checkpoint.list_checkpoints(directory / "checkpoints")):
        with suppress(ValueError):  # the run has just deleted it, or a kill left it damaged
            return dict(read_json(folder / "state.json")["recipe"])
    return {}


def has_exact_ratios(recipe: dict[str, Any]) -> bool:
    """Return whether a run's importance ratios are known to be exact: not with an estimator of the user's."""
    try:
        estimator: Any = from_json(LikelihoodEstimator, recipe.get("likelihood"), "likelihood")
    except ValueError:
        return False
    return bool(estimator.exact_ratios)
