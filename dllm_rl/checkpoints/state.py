"""A run's state besides weights and optimiser: one record, which state.json holds."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from dllm_rl.files import read_json
from dllm_rl.models.base import Policy, frozen_of
from dllm_rl.recipe import Settings
from dllm_rl.renamed import renamed_settings

NAME = "state.json"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A run after `step` complete steps. Random numbers are functions of (seed, step) and are not saved."""

    step: int = 0
    version: int  # the policy's: steps that have changed its weights
    dtype: Literal["float32", "float16", "bfloat16", "float64"]
    stages: dict[str, float] = field(default_factory=dict)  # seconds by stage
    seconds: float = 0.0  # of the run
    eval_before: dict[str, float] = field(default_factory=dict)
    warmup_steps: int = 0
    changes: list | None = None  # what resumes have changed: records of step, field, before and after
    best_step: int | None = None  # of the best checkpoint by metric_for_best_model
    best_value: float | None = None
    reference: str | None = None  # digest of the manifest of the run's folder `reference`
    frozen: list | None = None  # names of weights that training without adapters leaves alone
    recipe: dict[str, Any]

    @classmethod
    def first(cls, recipe: Settings, policy: Policy, **known: Any) -> "TrainingState":
        dtype: Any = str(next(policy.module.parameters()).dtype).removeprefix("torch.")
        frozen = None if policy.lora else frozen_of(policy.module) or None
        return cls(version=policy.weights_version, dtype=dtype, frozen=frozen, recipe=recipe.settings(), **known)

    @classmethod
    def read(cls, folder: Path) -> "TrainingState":
        """A checkpoint's. Raises ValueError if state.json is missing or damaged, or a field is of another type."""
        found: Any = read_json(folder / NAME)
        if not isinstance(found, dict):
            raise ValueError(f"{folder}: {NAME} is damaged: it is no JSON object")
        kinds = {f.name: f.type for f in fields(cls)}
        check_types(folder, found, kinds)
        # The schedule of a resumed run is compared with these two; the other settings are only compared.
        check_types(folder, found["recipe"], {"num_steps": int, "lr_schedule_steps": int | None}, prefix="recipe.")
        known: dict[str, Any] = {name: found.get(name) for name in kinds}
        known["recipe"] = renamed_settings(known["recipe"])
        return cls(**known)

    def write(self, folder: Path) -> None:
        (folder / NAME).write_text(json.dumps(asdict(self), indent=1))


def check_types(folder: Path, found: dict[str, Any], kinds: dict[str, Any], *, prefix: str = "") -> None:
    """Raise ValueError on the first of the fields `kinds` that is missing, or of another type."""
    for name, kind in kinds.items():
        if not _is_of(found.get(name), kind):
            why = f"{prefix}{name} is missing, or of another type"
            raise ValueError(f"{folder}: {NAME} is damaged: {why}; take an earlier checkpoint")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of an annotated type; an int is a float too."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_is_of(value, each) for each in get_args(kind))
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_is_of(each, get_args(kind)[1]) for each in value.values())
    # Not isinstance: a bool is an int. JSON's integers may be of any length, and no float holds those.
    if type(value) is int and kind in (int, float):
        return abs(value) < 1 << 53
    return kind is Any or type(value) is kind
