"""The summary of a run that ends, or that a signal stops: summary.json and the plot."""

import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dllm_rl.checkpoints import checkpoint as checkpoints
from dllm_rl.distributed.collectives import machine
from dllm_rl.distributed.stop import Stopped
from dllm_rl.files import write_json
from dllm_rl.monitoring import plots
from dllm_rl.screen import line_of
from dllm_rl.training.any_recipe import AnyRecipe
from dllm_rl.training.run import Run
from dllm_rl.training.summary import Summary


def best_folder(run: Run[AnyRecipe]) -> Path | None:
    """Return the folder of the best checkpoint by `saves.best`; None if no step has been evaluated."""
    if run.state.best_step is None:
        return None
    return checkpoints.folder_of(Path(run.recipe.directory) / "checkpoints", run.state.best_step)


def summary_of(
    run: Run[AnyRecipe], results: dict[str, Any], *, checkpoint: str, stop_reason: str | None
) -> dict[str, Any]:
    """Return the content of summary.json: `results`, and what every run has.

    Args:
        run: The run.
        results: Results of the evaluations.
        checkpoint: Folder of the checkpoint with the weights of the results.
        stop_reason: Why the run ended before its last step; None if it did not.
    """
    recipe = run.recipe
    summary = results | {
        "seconds": time.perf_counter() - run.log.begun,
        "stages": {name: round(seconds, 3) for name, seconds in run.log.seconds.items()},
        "seed": recipe.seed,
        "num_processes": run.accelerator.num_processes,
        "checkpoint": checkpoint,
        "problems": [asdict(problem) for problem in run.log.record.problems],  # of the last steps
        "machine": machine(run.accelerator),
        "recipe": recipe.settings(),
    }
    if run.state.best_step is not None:
        summary |= {"best_checkpoint": str(best_folder(run)), "best_step": run.state.best_step}
        summary |= {"best_metric": recipe.best_metric, "best_value": run.state.best_value}
    if run.state.changes:
        summary["changes"] = run.state.changes
    if stop_reason is not None:
        summary["stopped"] = {"step": run.state.step, "reason": stop_reason}
    return summary


def write_files(run: Run[AnyRecipe], summary: dict[str, Any]) -> tuple[Path, Path | None]:
    """Write summary.json and the plot; return their paths. The plot's is None for a run without steps, or with a
    warning if it cannot be drawn. Call it in the main process.
    """
    directory = Path(run.recipe.directory)
    path = directory / "summary.json"
    write_json(path, summary)
    if not run.recipe.num_steps:
        return path, None
    try:
        return path, plots.plot(directory)
    except Exception as error:  # of any type, from matplotlib or the disk: the run itself has succeeded
        run.log.say(f"warning: {directory / 'training.png'} could not be drawn: {line_of(error)}")
        return path, None


def as_returned(run: Run[AnyRecipe], summary: dict[str, Any]) -> Summary:
    """Return what the run returns: its summary with the policy, which completes as the run's evaluations do."""
    policy: Any = run.policy
    policy.module.zero_grad(set_to_none=True)
    policy.eval_sampler = getattr(run.recipe, "eval_sampler", None)  # SFT has none
    return Summary(summary, policy)


def summarize_stop(run: Run[AnyRecipe], stopped: Stopped) -> None:
    """Write summary.json and the plot of a run that a signal has stopped, and put the summary into `stopped`. Call it
    after the run's last checkpoint was written.

    It calls no collective, since other processes may be anywhere, and does not evaluate: a signal leaves little time.
    """
    steps_done, number = run.state.step, run.stop.received
    if not number:  # another process was lost
        return
    folder = run.checkpoint
    if run.saved is not None:
        folder = str(checkpoints.folder_of(Path(run.recipe.directory) / "checkpoints", run.saved))
    results = {"eval_before": run.state.eval_before}
    summary = summary_of(run, results, checkpoint=folder, stop_reason=signal.Signals(number).name)
    if run.accelerator.is_main_process:
        try:
            write_files(run, summary)
        except OSError as error:  # of the disk, or of a terminal that was closed: the exit status says more
            stopped.add_note(f"summary.json after step {steps_done} was not written: {line_of(error)}")
    if run.policy.weights_version == run.state.version:  # no update of another step has begun
        stopped.summary = as_returned(run, summary)
