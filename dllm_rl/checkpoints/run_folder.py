"""The folder of a run: lock it, create or empty it, and find the checkpoint to resume from."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from dllm_rl import manifest
from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.resume import check_names, check_recipe, default_settings
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.distributed.stop import LOCK, as_written
from dllm_rl.files import flush, lock, recover, remove
from dllm_rl.records import from_json
from dllm_rl.settings import Settings

Train = TypeVar("Train", bound=Callable[..., Any])

# Folder of the checkpoint that a rehearsal writes and deletes. A rehearsal (`training.rehearsal`) runs one group
# through a step without an update, before the first step.
REHEARSAL = ".rehearsal"
RUN_MARKERS = ("metrics.jsonl", "checkpoints", "summary.json")  # a folder that has one of these contains a run
OF_A_RUN = (
    *RUN_MARKERS,
    "completions.jsonl",
    "held_out.jsonl",
    "best.jsonl",
    "tensorboard",
    "training.png",
    "reference",
)


def in_own_folder(train: Train) -> Train:
    """Decorate `train` to set output_dir to an absolute path before it runs: user code, such as a reward function, may
    change the working directory. Without an output_dir it is runs/NAME-seedSEED, or runs/NAME-seedSEED-2 and so on if
    that has a run; a resume takes the newest one.
    """

    @wraps(train)
    def wrapped(recipe: Any, *others: Any, **options: Any) -> Any:
        folder = Path(recipe.directory)
        if recipe.output_dir is None and not recipe.dry_run:
            folder = default_folder(recipe)
            if os.environ.get("RANK", "0") == "0":
                print(f"output_dir: {folder}", flush=True)
        which = recipe.resume_from_checkpoint
        try:
            if which not in (None, "latest"):
                which = str(Path(which).absolute())
            recipe = recipe.replace(output_dir=str(folder.absolute()), resume_from_checkpoint=which)
        except FileNotFoundError:
            raise ValueError(
                f"output_dir={str(folder)!r}, or resume_from_checkpoint, is relative to the working directory, which "
                "has been deleted; change to one that exists, or give absolute paths"
            ) from None
        return train(recipe, *others, **options)

    return cast(Train, wrapped)


def default_folder(recipe: Settings) -> Path:
    """Return the folder of a recipe without output_dir: a new one, or the newest one for a resume. Several processes
    cannot agree on a new one before they are connected, and always take the first.
    """
    first = newest = Path(recipe.directory)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return first
    number = 1
    while (following := first.with_name(f"{first.name}-{number + 1}")).exists():
        newest, number = following, number + 1
    continues = recipe.resume_from_checkpoint or recipe.overwrite_output_dir or not has_steps(newest)
    return newest if continues else following


def open_folder(recipe: Settings) -> tuple[Path | None, TrainingState | None, list[str]]:
    """Lock the run's folder and prepare it.

    Returns:
        The checkpoint to resume from and its state (None, None for a new run), and lines to print.

    Raises:
        ValueError: The folder is in use by another run; it contains a run, and the recipe neither resumes it nor
            overwrites it, or would overwrite paid rewards; no checkpoint is complete; or it is of another recipe.
        OSError: The folder cannot be written.
    """
    directory = Path(recipe.directory)
    notes: list[str] = []
    check_names(recipe.settings())
    try:
        if not lock(directory / LOCK):
            notes.append(
                f"warning: the file system of output_dir={str(directory)!r} has no locks: make sure that no other run "
                "writes there"
            )
        if not flush(directory):
            notes.append(
                f"warning: the file system of output_dir={str(directory)!r} cannot write folders to disk (fsync): a "
                "power failure may lose the newest checkpoint"
            )
    except BlockingIOError as error:
        raise ValueError(
            f"output_dir={str(directory)!r} is being written by another run, {error.strerror}; stop it, give another "
            f"output_dir, or delete {str(directory / LOCK)!r} if that machine has crashed"
        ) from None
    except OSError as error:
        raise OSError(f"output_dir={str(directory)!r} cannot be written ({error.strerror}); give another") from None
    recover(directory / "reference")  # if its write was interrupted, restores the complete version
    remove(directory / REHEARSAL)  # an interrupted run leaves it
    existing_files = [name for name in RUN_MARKERS if (directory / name).exists()]
    if not recipe.resume_from_checkpoint:
        check_not_deleted(recipe, directory)
        calls = directory / "oracle.jsonl"
        if recipe.overwrite_output_dir and calls.exists() and calls.stat().st_size:
            raise ValueError(
                f"output_dir={str(directory)!r} has rewards that were paid for, in oracle.jsonl, and "
                f"{as_written(overwrite_output_dir=True)} would delete them; move or delete that file, or give another "
                "output_dir"
            )
        if existing_files and not recipe.overwrite_output_dir and not has_steps(directory):
            checkpoint.recover_all(directory / "checkpoints")  # removes an incompletely written checkpoint
            notes.append("the run of this folder was stopped before its first step: starting from the beginning")
        elif existing_files and not recipe.overwrite_output_dir:
            raise ValueError(
                f"output_dir={str(directory)!r} already contains a run ({', '.join(existing_files)}); give another "
                f"output_dir, or {as_written(resume_from_checkpoint='latest')}, or "
                f"{as_written(overwrite_output_dir=True)}"
            )
        return None, None, notes
    checkpoint.recover_all(directory / "checkpoints")
    folder = checkpoint.locate(
        recipe.resume_from_checkpoint,
        directory / "checkpoints",
        unread=None if recipe.lora is None else "model*.safetensors",  # with adapters, full weights are not read
        compare=partial(check_recipe, recipe),
        say=notes.append,
    )
    if not folder:
        return None, None, [*notes, "no checkpoint yet: starting from the beginning"]
    state = TrainingState.read(folder)
    # The checkpoint has the digest of the reference policy's manifest.
    reference = directory / "reference"
    if state.reference is not None and manifest.verify(reference)["sha256"] != state.reference:
        raise ValueError(f"{reference} belongs to another run than the checkpoint; restore the folder of this run")
    for path in checkpoint.set_aside(directory / "checkpoints", folder):
        notes.append(f"set aside, since the resumed run will not use it: {path}")
    if reason := why_forget_best(recipe, state, folder):
        notes.append(f"the best checkpoint so far, of step {state.best_step}, no longer counts: {reason}")
        state = replace(state, best_step=None, best_value=None)
    return folder, state, [*notes, f"resuming from {folder}"]


def why_forget_best(recipe: Settings, state: TrainingState, folder: Path) -> str | None:
    """Return why a run that resumes from the checkpoint in `folder` cannot use its best checkpoint; None if it can,
    or if it has none.
    """
    if state.best_step is None:
        return None
    before = default_settings(type(recipe)) | state.recipe
    best_before = from_json(type(recipe.saves), before["saves"], "saves").best
    if best_before is None or recipe.best_metric != best_before.measured:
        return "saves.best.metric has changed"
    for name in ("validation_task", "eval_sampler", "eval_dataset", "eval_split"):
        if name in before and recipe.settings()[name] != before[name]:
            return f"{name} has changed"
    directory = Path(recipe.directory) / "checkpoints"
    best = checkpoint.folder_of(directory, state.best_step)
    is_of_this_folder = folder.resolve().parent == directory.resolve()
    return None if is_of_this_folder and best.exists() else f"{directory} does not have it"


def has_steps(directory: Path) -> bool:
    """Return whether a run's folder contains more than a warm-up: a checkpoint, a summary, or metrics of a step."""
    if (directory / "summary.json").exists() or checkpoint.list_checkpoints(directory / "checkpoints"):
        return True
    metrics = directory / "metrics.jsonl"
    rows = metrics.read_bytes().splitlines() if metrics.exists() else []
    return not all(row.startswith((b'{"warmup_step"', b'{"resume_from"')) for row in rows)


def clear_folder(directory: Path) -> None:
    """Delete the run in a folder."""
    for name in OF_A_RUN:
        remove(directory / name)


def check_not_deleted(recipe: Settings, directory: Path) -> None:
    """Raise ValueError if overwrite_output_dir would delete what the run reads."""
    teacher = getattr(getattr(recipe, "teacher", None), "model", None)
    for setting, source in (("model", recipe.model), ("teacher.model", teacher)) if recipe.overwrite_output_dir else ():
        parents = [*Path(source).resolve().parents, Path(source).resolve()] if isinstance(source, str) else []
        if any((directory / name).resolve() in parents for name in OF_A_RUN):
            raise ValueError(
                f"{setting}={source!r} belongs to the run in output_dir={str(directory)!r}, which "
                f"{as_written(overwrite_output_dir=True)} would delete; give another output_dir"
            )
