"""The folder of a run: locked, made, emptied or resumed from."""

import dataclasses
from pathlib import Path
from typing import Any

from dllm_rl import manifest
from dllm_rl.checkpoints import checkpoint
from dllm_rl.config import plain
from dllm_rl.distributed.stop import LOCK
from dllm_rl.files import lock, recover, remove
from dllm_rl.recipe import Recipe, Settings

REHEARSAL = ".rehearsal"  # where a rehearsal writes

# Fields that may change between the parts of a resumed run: they do not touch what is computed, or only extend it
# (that the schedule stays as it was is checked).
FREE = {
    "output_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "eval_steps",
    "eval_batch_size",
    "mismatch_sample",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "log_completions_steps",
    "report_to",
    "push_to_hub",
    "num_steps",
    "lr_schedule_steps",
    "verify_checkpoint",
    "on_save_error",
    "async_save",
    "stop_seconds",
    "reward_timeout",
    "collective_timeout",
    "peer_timeout",
    "shard_size",
    "max_prompt_length",
    "dry_run",
}


DEFAULTS = {f.name: plain(f.default) for f in dataclasses.fields(Recipe) if f.default is not dataclasses.MISSING}
HELD = ("metrics.jsonl", "checkpoints", "summary.json")  # what tells a run's folder


def open_folder(recipe: Settings) -> tuple[Path | None, list[str]]:
    """Lock the run's folder; returns the checkpoint to resume from, and what is to be said of it. Raises ValueError."""
    directory = Path(recipe.directory)
    notes: list[str] = []
    try:
        lock(directory / LOCK)
    except BlockingIOError as error:
        raise ValueError(
            f"output_dir={str(directory)!r} is being written by another run, {error.strerror}; stop that one, or give "
            "another output_dir"
        ) from None
    recover(directory / "reference")
    remove(directory / REHEARSAL)  # of a run that was killed in it
    held = [name for name in HELD if (directory / name).exists()]
    if not recipe.resume_from_checkpoint:
        if held and not recipe.overwrite_output_dir:
            raise ValueError(
                f"output_dir={str(directory)!r} already holds a run ({', '.join(held)}); give another, or "
                "--resume_from_checkpoint latest, or --overwrite_output_dir"
            )
        return None, notes
    checkpoint.recover_all(directory / "checkpoints")
    quick = recipe.verify_checkpoint == "quick"
    folder = checkpoint.locate(recipe.resume_from_checkpoint, directory / "checkpoints", quick=quick, say=notes.append)
    if folder:
        state = checkpoint.read_state(folder)
        _check_state(folder, state, recipe)
        # A setting that the checkpoint does not know had its default.
        before = DEFAULTS | state["recipe"]
        _check_same_recipe(before, recipe.settings())
        _check_schedule(recipe, before, state["step"])
        _check_reference(state, directory / "reference", quick=quick)
        for path in checkpoint.set_aside(directory / "checkpoints", folder):
            notes.append(f"set aside, as it is not on the way of the resumed run: {path}")
    return folder, notes


def clear_folder(recipe: Settings) -> None:
    """Delete the run that the folder holds, where that is asked for and it is not resumed."""
    if recipe.overwrite_output_dir and not recipe.resume_from_checkpoint:
        for name in (*HELD, "completions.jsonl", "tensorboard", "training.png", "reference"):
            remove(Path(recipe.directory) / name)


def _check_state(folder: Path, state: dict[str, Any], recipe: Settings) -> None:
    """Raise ValueError where state.json lacks what a run goes on from, or has it in another type."""
    settings = state.get("recipe")
    known: dict[str, Any] = settings if isinstance(settings, dict) else {}
    rl = isinstance(recipe, Recipe)
    fine = {
        "recipe": known == settings,
        "recipe.num_steps": type(known.get("num_steps")) is int,
        "recipe.lr_schedule_steps": isinstance(known.get("lr_schedule_steps"), int | None),
        "version": type(state.get("version")) is int,
        "warmup_steps": not rl or type(state.get("warmup_steps")) is int,
        "dtype": state.get("dtype") in ("float32", "float16", "bfloat16", "float64"),
        "seconds": isinstance(state.get("seconds"), int | float),
        "stages": _are_numbers(state.get("stages")),
        "eval_before": _are_numbers(state.get("eval_before")) and (rl or "loss" in state["eval_before"]),
    }
    wrong = [name for name, holds in fine.items() if not holds]
    if wrong:
        raise ValueError(
            f"{folder}: state.json is damaged: {wrong[0]} is missing, or of another type; take an earlier checkpoint"
        )


def _are_numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(value, int | float) for value in values.values())


def _check_same_recipe(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError on a setting that differs, or that the checkpoint's kind of run has not."""
    before = dict.fromkeys(now) | before
    changed = [name for name in now if name not in FREE and before[name] != now[name]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{name}={now[name]!r} differs from the checkpoint's {before[name]!r}; resume with the same recipe"
        )


def _check_schedule(recipe: Settings, before: dict[str, Any], step: int) -> None:
    """Raise ValueError when the run would end before it resumes, or with other learning rates than it began with."""
    if recipe.num_steps < step:
        raise ValueError(f"num_steps={recipe.num_steps} is less than the checkpoint's step {step}; give more steps")
    then, now = before["lr_schedule_steps"] or before["num_steps"], recipe.schedule_steps
    if any(recipe.lr_schedule(i, then) != recipe.lr_schedule(i, now) for i in range(recipe.num_steps)):
        field = "num_steps" if recipe.lr_schedule_steps is None else "lr_schedule_steps"
        raise ValueError(
            f"{field}={now} would change the learning rates of a schedule that began with {then} steps; "
            f"add --lr_schedule_steps {then}"
        )


def _check_reference(state: dict[str, Any], folder: Path, *, quick: bool) -> None:
    """Raise ValueError when the run's reference is not whole, or not that of its checkpoint."""
    expected = state.get("reference")
    if expected is not None and manifest.verify(folder, quick=quick)["sha256"] != expected:
        raise ValueError(f"{folder} is that of another run than the checkpoint's; put the run's own back")
