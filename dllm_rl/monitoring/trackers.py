"""Experiment trackers, through Accelerate: tensorboard, wandb, trackio, mlflow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from dllm_rl.recipe import Settings


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
            tracker.log(values, step=step)
            taken.append(tracker)
        except Exception as error:  # of any kind: a tracker's own
            say(f"warning: {tracker.name} takes no more numbers ({error}): the run goes on without it")
    return taken
