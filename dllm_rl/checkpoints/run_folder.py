"""The folder of a run: locked, made, emptied or resumed from."""

import difflib
import re
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

from dllm_rl import manifest
from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.state import TrainingState, check_types
from dllm_rl.distributed.stop import LOCK, as_written
from dllm_rl.files import lock, recover, remove
from dllm_rl.members import ADDRESS, plain, same_setting
from dllm_rl.recipe import Recipe, Settings

REHEARSAL = ".rehearsal"  # where a rehearsal writes

# Fields that a resume may change: they do not change what is computed, or only extend it (see `_check_recipe`).
FREE = {
    *("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run"),
    *("eval_steps", "eval_batch_size", "num_mismatch_groups"),
    *("save_steps", "save_total_limit", "save_merged", "verify_checkpoint", "on_save_error", "async_save"),
    *("logging_steps", "log_completions_steps", "report_to", "push_to_hub"),
    *("stop_seconds", "reward_timeout", "collective_timeout", "peer_timeout"),
    *("num_steps", "lr_schedule_steps", "max_prompt_length", "shard_size"),
    *("rollout_workers", "callbacks", "allow_changed"),
    *("metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
}

# Fields that no resume can change: the stored weights or moments depend on them.
FIXED = {"model", "dtype", "lora", "base_quantization", "optim"}

FILES = (LOCK, "metrics.jsonl", "completions.jsonl", "summary.json", "training.png", "checkpoints/latest")
HELD = ("metrics.jsonl", "checkpoints", "summary.json")  # by one of these a run's folder is recognised


def defaults(record: type[Settings]) -> dict[str, Any]:
    return {f.name: plain(f.default) for f in fields(record) if f.default is not MISSING}


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
        compare=partial(_check_recipe, recipe),
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


def check_names(recipe: Settings) -> None:
    """Raise ValueError on a setting whose text holds an address: no resume would find it equal."""
    for name, text in recipe.settings().items():
        if name not in FREE and isinstance(text, str) and ADDRESS.search(text):
            raise ValueError(
                f"{name}={text[:200]!r} holds an address, which another process has elsewhere, so that the run could "
                "not be resumed; make it a dataclass, or give its class a __repr__"
            )


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
    if (directory / "summary.json").exists() or checkpoint.found(directory / "checkpoints"):
        return True
    metrics = directory / "metrics.jsonl"
    rows = metrics.read_bytes().splitlines() if metrics.exists() else []
    return not all(row.startswith((b'{"warmup_step"', b'{"resume_from"')) for row in rows)


def clear_folder(recipe: Settings) -> None:
    """Delete the folder's run if `overwrite_output_dir` is set and no run is resumed."""
    if recipe.overwrite_output_dir and not recipe.resume_from_checkpoint:
        for name in (*HELD, "completions.jsonl", "tensorboard", "training.png", "reference"):
            remove(Path(recipe.directory) / name)


def allowed_changes(recipe: Settings) -> set[str]:
    """The fields that `allow_changed` names. Raises ValueError on an unknown one, and on one of FIXED."""
    names = [name for part in (recipe.allow_changed or "").split(",") if (name := part.strip())]
    known = {f.name for f in fields(recipe)}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"allow_changed: {name!r} is no setting" + (f"; {near[0]} is near" if near else ""))
        if name in FIXED:
            raise ValueError(
                f"allow_changed: the checkpoint's weights and moments depend on {name}; start a new run with "
                f"{as_written(model='CHECKPOINT')}"
            )
    return set(names)


def changes_since(recipe: Settings, state: TrainingState) -> list[dict[str, Any]]:
    """What `allow_changed` changes at a resume: a record per field, with the number of steps before the change."""
    before = defaults(type(recipe)) | state.recipe
    settings = recipe.settings()
    return [
        {"step": state.step, "field": name, "before": before[name], "after": settings[name]}
        for name in sorted(allowed_changes(recipe))
        if not same_setting(before[name], settings[name])
    ]


def renamings(before: Any, now: Any) -> list[tuple[str, str]]:
    """(name before, name now) where two descriptions differ in the names of a script or of functions alone; else []."""
    if not (isinstance(before, str) and isinstance(now, str)):
        return []
    # A name outside of this library is MODULE:NAME; all between such names must be equal.
    old, new = (re.split(r"([\w.]+:[\w.<>]+)", text) for text in (before, now))
    if len(old) != len(new) or old[::2] != new[::2]:
        return []
    return list(dict.fromkeys(pair for pair in zip(old[1::2], new[1::2], strict=True) if pair[0] != pair[1]))


def _check_recipe(recipe: Settings, state: TrainingState) -> None:
    settings = recipe.settings()
    before = defaults(type(recipe)) | state.recipe  # a setting that the checkpoint lacks had its default
    if lacking := ", ".join(sorted(settings.keys() - before.keys())):
        raise ValueError(f"the checkpoint is of another kind of run, without {lacking}; give its folder as model")
    allowed = allowed_changes(recipe)
    for name, value in settings.items():
        if name not in FREE and name not in allowed and not same_setting(before[name], value):
            allow = "" if name in FIXED else f", or with {as_written(allow_changed=name)}"
            if renamed := renamings(before[name], value):
                raise ValueError(
                    f"{name} has the name {renamed[0][1]!r} now, and {renamed[0][0]!r} in the checkpoint, and is else "
                    f"the same; give the script or the function its name again{allow}"
                )
            remedy = f"resume with the same recipe{allow}"
            raise ValueError(f"{name}={value!r} differs from the checkpoint's {before[name]!r}; {remedy}")
    if recipe.num_steps < state.step:
        raise ValueError(f"num_steps={recipe.num_steps} is less than the checkpoint's step {state.step}; give more")
    if "lr_schedule" in allowed or "lr_schedule_steps" in allowed:
        return
    then = before["lr_schedule_steps"] or before["num_steps"]
    now = recipe.schedule_steps
    if any(recipe.lr_schedule(i, then) != recipe.lr_schedule(i, now) for i in range(recipe.num_steps)):
        field = "num_steps" if recipe.lr_schedule_steps is None else "lr_schedule_steps"
        change = f"would change the learning rates of a schedule that began with {then} steps"
        raise ValueError(f"{field}={now} {change}; add {as_written(lr_schedule_steps=then)}")
