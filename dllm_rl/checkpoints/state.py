"""State of a run besides weights and optimizer: one record, stored as state.json."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dllm_rl.files import read_json
from dllm_rl.models.base import Policy, frozen_names

NAME = "state.json"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """State of a run after `step` complete steps. Random numbers depend only on (seed, step), so no state of a
    generator is stored.
    """

    step: int = 0
    version: int  # the policy's weights_version: number of steps that have changed its weights
    dtype: Literal["float32", "float16", "bfloat16", "float64"]
    stages: dict[str, float] = field(default_factory=dict)  # seconds spent in each stage
    seconds: float = 0.0  # seconds since the start of the run, without pauses
    eval_before: dict[str, float] = field(default_factory=dict)
    warmup_steps: int = 0
    changes: list | None = None  # settings that resumes have changed: records of step, field, before and after
    best_step: int | None = None  # step of the best checkpoint by saves.best
    best_value: float | None = None
    # Metrics of the last step, if the run ended between its update and its line in the log: a resume first evaluates
    # that step, calls the callbacks and logs it. None: the last step is logged.
    unlogged: dict | None = None
    unlogged_seconds: dict[str, float] = field(default_factory=dict)  # in each stage of that step, up to its update
    contents: dict[str, str] = field(default_factory=dict)  # digests of the recipe's code and files (`contents_of`)
    base: str | None = None  # digest of the weights under the adapters
    teacher: str | None = None  # digest of what teaches; None: nothing, or the reference
    reference: str | None = None  # digest of the manifest in the run's folder `reference`
    frozen: list | None = None  # names of frozen weights, in a run without adapters
    begin_ids: list | None = None  # ids before every prompt of plain text, `dllm_rl.decoding.vocabulary.begin_ids`
    # Size and digest of the lines of metrics.jsonl, completions.jsonl and held_out.jsonl, without the ending.
    logs: dict[str, Any] = field(default_factory=dict)
    callbacks: list | None = None  # pairs of a callback's class name and its state
    recipe: dict[str, Any]

    @property
    def logged_steps(self) -> int:
        """Number of steps that are evaluated and logged: `step`, or one less if the last step is not."""
        return self.step - (self.unlogged is not None)

    @classmethod
    def first(cls, settings: dict[str, Any], policy: Policy, **other_fields: Any) -> "TrainingState":
        """Return the state of a new run with this policy and these settings, as JSON."""
        dtype: Any = str(next(policy.module.parameters()).dtype).removeprefix("torch.")
        frozen = None if policy.lora else frozen_names(policy.module) or None
        return cls(version=policy.weights_version, dtype=dtype, frozen=frozen, recipe=settings, **other_fields)

    @classmethod
    def read(cls, folder: Path) -> "TrainingState":
        """Read the state of a checkpoint. Raises ValueError if state.json is missing or damaged."""
        content, names = read_json(folder / NAME), {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in names})

    def write(self, folder: Path) -> None:
        """Write state.json."""
        (folder / NAME).write_text(json.dumps(asdict(self), indent=1))
