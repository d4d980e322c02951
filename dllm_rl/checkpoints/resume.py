"""Compare a recipe with a checkpoint's: which settings may change when a run is resumed."""

import json
from dataclasses import MISSING, fields
from typing import Any

from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.distributed.stop import as_written
from dllm_rl.identity import digest_of_code, digest_of_value
from dllm_rl.records import ADDRESS, describe_json, nearest_hint, to_json, without_folders
from dllm_rl.settings import Settings

# Fields that trade memory for time. A resume may change them, and says that numbers then differ by rounding.
MEMORY_SETTINGS = ("micro_batch_size", "rollout_batch_size", "gradient_checkpointing", "max_retained_graphs")

# Fields, and fields of groups, that a resume may change without `allow_changed`: they do not change what is computed,
# or only extend it.
MAY_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run"),
    *("evaluation", "saves", "log", "limits", "num_mismatch_groups"),
    *("num_steps", "lr_schedule_steps", "max_prompt_length", "shard_size"),
    *("late.workers", "callbacks", "allow_changed"),
    *MEMORY_SETTINGS,
}

# Fields that no resume can change: the stored weights depend on them. Nor can it change the kind of optimizer.
CANNOT_CHANGE = {"model", "dtype", "lora", "base_quantization"}


def default_settings(record: type[Settings]) -> dict[str, Any]:
    """Return the defaults of a recipe's fields, as they are stored in a checkpoint."""
    return {f.name: to_json(f.default) for f in fields(record) if f.default is not MISSING}


def contents_of(recipe: Settings) -> dict[str, str]:
    """Return the digests of what the settings have only by name: the user's code, such as that of reward functions, and
    what tasks have read from files. The weights of `model` and the rows of SFT have digests of their own.
    """
    contents = {}
    for each in fields(recipe):
        if each.name in MAY_CHANGE | {"model", "dataset", "eval_dataset"}:
            continue
        value = getattr(recipe, each.name)
        if code := digest_of_code(value):
            contents[f"the code of {each.name}"] = code
        if hasattr(value, "content"):
            contents[f"what {each.name} reads from files"] = digest_of_value(value.content)[:16]
    return contents


def check_contents(recipe: Settings, state: TrainingState, allowed: set[str]) -> None:
    """Raise ValueError if code or files of the recipe have changed since the checkpoint's run began or was resumed."""
    contents = contents_of(recipe)
    names = [name for name in contents | state.contents if contents.get(name) != state.contents.get(name)]
    names = [name for name in names if not allowed & {*name.split()}]
    if names:
        settings = ",".join(setting for setting in recipe.settings() if any(setting in name.split() for name in names))
        now, then = (part.get(names[0], "none") for part in (contents, state.contents))
        raise ValueError(
            f"{', '.join(names)} has changed since the checkpoint was written ({now} is not {then}); resume with the "
            f"code and files of that run, or with {as_written(allow_changed=settings)}"
        )


def check_names(settings: dict[str, Any]) -> None:
    """Raise ValueError if the text of a setting contains an address, because no resume would find it equal."""
    for name, value in settings.items():
        text = json.dumps(value)
        if name not in MAY_CHANGE and ADDRESS.search(text):
            raise ValueError(
                f"{name}={text[:200]!r} holds an address, which another process has elsewhere, so that the run could "
                "not be resumed; make it a dataclass, or give its class a __repr__"
            )


def allowed_changes(settings: dict[str, Any]) -> set[str]:
    """Return the fields that `allow_changed` names. Raise ValueError on an unknown one, and on one of CANNOT_CHANGE."""
    names = [name for part in (settings["allow_changed"] or "").split(",") if (name := part.strip())]
    for name in names:
        if name not in settings:
            raise ValueError(f"allow_changed: {name!r} is not a setting{nearest_hint(name, settings)}")
        if name in CANNOT_CHANGE:
            raise ValueError(
                f"allow_changed: the checkpoint's weights and moments depend on {name}; start a new run with "
                f"{as_written(model='CHECKPOINT')}"
            )
    return set(names)


def changes_since(before: dict[str, Any], settings: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """Return the changes of MEMORY_SETTINGS and of `allow_changed`'s fields, one dict per field, with the step before.

    Args:
        before: Settings of the checkpoint.
        settings: Settings of the run that resumes from it.
        step: Number of steps before the change.
    """
    return [
        {"step": step, "field": name, "before": before[name], "after": settings[name]}
        for name in sorted(allowed_changes(settings).union(MEMORY_SETTINGS) & settings.keys())
        if before[name] != settings[name]
    ]


def compared(name: str, stored: Any) -> Any:
    """Return a setting as `to_json` stored it, without those of its fields that are in MAY_CHANGE."""
    if not isinstance(stored, dict):
        return stored
    kept = {field: value for field, value in stored["init_args"].items() if f"{name}.{field}" not in MAY_CHANGE}
    return stored | {"init_args": kept}


def _kind(stored: dict[str, Any]) -> tuple[str, Any]:
    """Return the class of a stored record, and the function of one that a function stands for."""
    return stored["class_path"], stored["init_args"].get("function")


def check_recipe(recipe: Settings, state: TrainingState) -> None:
    """Raise ValueError if a recipe differs from a checkpoint's in a setting that this resume may not change."""
    settings = recipe.settings()
    before = default_settings(type(recipe)) | state.recipe  # a setting that the checkpoint lacks had its default
    if missing := ", ".join(sorted(settings.keys() - before.keys())):
        raise ValueError(f"the checkpoint comes from another kind of run, without {missing}; give its folder as model")
    if getattr(recipe, "needs_reference_policy", False) and recipe.lora is None and state.reference is None:
        needs = "teacher.model='reference'" if before["beta"] == settings["beta"] else f"beta={settings['beta']:g}"
        raise ValueError(
            f"{needs} needs the model that RL started from, which this run did not store: start a new run with "
            f"{as_written(model='CHECKPOINT')}"
        )
    allowed = allowed_changes(settings)
    for name, value in settings.items():
        if name in MAY_CHANGE or compared(name, before[name]) == compared(name, value):
            continue
        is_fixed = name in CANNOT_CHANGE or (name == "optim" and _kind(before[name]) != _kind(value))
        if name in allowed and not is_fixed:
            continue
        if without_folders(before[name]) != without_folders(value):  # the code itself is compared below
            allow = "" if is_fixed else f", or with {as_written(allow_changed=name)}"
            remedy = f"resume with the same recipe{allow}"
            if name == "rollout_quantization":  # the recipe may be the same
                remedy = f"give the checkpoint's, since Float8ByGPU chooses by the GPU and its rows{allow}"
            now, then = describe_json(value), describe_json(before[name])
            raise ValueError(f"{name}={now} differs from the checkpoint's {then}; {remedy}")
    check_contents(recipe, state, allowed)
    if recipe.num_steps < state.step:
        raise ValueError(f"num_steps={recipe.num_steps} is less than the checkpoint's step {state.step}; give more")
    steps = recipe.lr_schedule_steps or recipe.num_steps
    steps_before = before["lr_schedule_steps"] or before["num_steps"]
    is_stretched = any(name in allowed for name in ("lr_schedule", "lr_schedule_steps"))
    added_steps = range(before["num_steps"], recipe.num_steps)
    if added_steps and not any(recipe.lr_schedule(i, steps if is_stretched else steps_before) for i in added_steps):
        raise ValueError(
            f"num_steps={recipe.num_steps}: the learning rate would be 0 from step {added_steps[0]} on, where the "
            f"schedule of {steps if is_stretched else steps_before} steps ends; add "
            f"{as_written(allow_changed='lr_schedule_steps')} without lr_schedule_steps, which stretches it"
        )
    if not is_stretched and any(
        recipe.lr_schedule(i, steps_before) != recipe.lr_schedule(i, steps) for i in range(recipe.num_steps)
    ):
        field = "num_steps" if recipe.lr_schedule_steps is None else "lr_schedule_steps"
        change = f"would change the learning rates of a schedule that began with {steps_before} steps"
        raise ValueError(f"{field}={steps} {change}; add {as_written(lr_schedule_steps=steps_before)}")
