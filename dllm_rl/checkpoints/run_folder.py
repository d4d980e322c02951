"""The folder of a run: locked, made, emptied or resumed from."""

from functools import partial
from pathlib import Path

from dllm_rl import manifest
from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.resume import check_names, check_recipe
from dllm_rl.checkpoints.state import TrainingState, check_types
from dllm_rl.distributed.stop import LOCK, as_written
from dllm_rl.files import lock, recover, remove
from dllm_rl.recipe import Recipe, Settings

REHEARSAL = ".rehearsal"  # where a rehearsal writes

FILES = (LOCK, "metrics.jsonl", "completions.jsonl", "summary.json", "training.png", "checkpoints/latest")
HELD = ("metrics.jsonl", "checkpoints", "summary.json")  # by one of these a run's folder is recognised


def open_folder(recipe: Settings) -> tuple[Path | None, TrainingState | None, list[str]]:
    """Lock the run's folder; returns the checkpoint to resume from, its state, and lines to print. Raises ValueError
    if the folder is in use, holds another run, or has no whole checkpoint of this recipe.
    """
    directory = Path(recipe.directory)
    notes: list[str] = []
    check_files(directory)
    check_names(recipe)
    try:
        if not lock(directory / LOCK):
            notes.append(
                f"warning: the file system of output_dir={str(directory)!r} has no locks: see to it that no other run "
                "writes there"
            )
    except BlockingIOError as error:
        raise ValueError(
            f"output_dir={str(directory)!r} is being written by another run, {error.strerror}; stop it, or give another"
        ) from None
    except OSError as error:
        raise OSError(f"output_dir={str(directory)!r} cannot be written ({error.strerror}); give another") from None
    recover(directory / "reference")  # a kill may have left it between two names
    remove(directory / REHEARSAL)  # a killed run leaves it
    held = [name for name in HELD if (directory / name).exists()]
    if not recipe.resume_from_checkpoint:
        if held and not recipe.overwrite_output_dir and not has_steps(directory):
            checkpoint.recover_all(directory / "checkpoints")  # the first one, half-written
            notes.append("the run of this folder was stopped before its first step: starting from the beginning")
        elif held and not recipe.overwrite_output_dir:
            raise ValueError(
                f"output_dir={str(directory)!r} already holds a run ({', '.join(held)}); give another, or "
                f"{as_written(resume_from_checkpoint='latest')}, or {as_written(overwrite_output_dir=True)}"
            )
        return None, None, notes
    checkpoint.recover_all(directory / "checkpoints")
    quick = recipe.verify_checkpoint == "quick"
    folder = checkpoint.locate(
        recipe.resume_from_checkpoint,
        directory / "checkpoints",
        quick=quick,
        unread=None if recipe.lora is None else "model*.safetensors",  # adapters go on from their base
        compare=partial(check_recipe, recipe),
        say=notes.append,
    )
    if not folder:
        return None, None, [*notes, "no checkpoint yet: starting from the beginning"]
    state = TrainingState.read(folder)
    needed = "reward" if isinstance(recipe, Recipe) else "loss"  # the end of the run prints and draws it
    check_types(folder, state.eval_before, {needed: float}, prefix="eval_before.")
    reference = directory / "reference"
    if state.reference is not None and manifest.verify(reference, quick=quick)["sha256"] != state.reference:
        raise ValueError(f"{reference} is that of another run than the checkpoint's; put the run's own back")
    for path in checkpoint.set_aside(directory / "checkpoints", folder):
        notes.append(f"set aside, as it is not on the way of the resumed run: {path}")
    return folder, state, [*notes, f"resuming from {folder}"]


def check_files(directory: Path) -> None:
    """Raise ValueError on a FIFO, a device or a directory in place of a file of the run: reading it may never end; and
    on a file in place of a folder.
    """
    for name in FILES:
        path = directory / name
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no regular file; remove it, or give another output_dir")
    for name in ("checkpoints", "reference"):
        path = directory / name
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is no folder; remove it, or give another output_dir")


def has_steps(directory: Path) -> bool:
    """Whether a run's folder holds more than a warm-up: a checkpoint, a summary or the metrics of a step."""
    if (directory / "summary.json").exists() or checkpoint.list_checkpoints(directory / "checkpoints"):
        return True
    metrics = directory / "metrics.jsonl"
    rows = metrics.read_bytes().splitlines() if metrics.exists() else []
    return not all(row.startswith((b'{"warmup_step"', b'{"resume_from"')) for row in rows)


def clear_folder(recipe: Settings) -> None:
    """Delete the folder's run if `overwrite_output_dir` is set and no run is resumed."""
    if recipe.overwrite_output_dir and not recipe.resume_from_checkpoint:
        for name in (*HELD, "completions.jsonl", "tensorboard", "training.png", "reference"):
            remove(Path(recipe.directory) / name)
