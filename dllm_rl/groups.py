"""Groups of settings of RL and SFT: records of their own in a field of `Recipe`, such as `log.steps`."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from dllm_rl.records import Record, option

# Flat names of the groups' fields, and their paths in a recipe. A recipe answers a flat name by the path.
GROUPED = {
    "logging_steps": "log.steps",
    "report_to": "log.report_to",
    "log_completions_steps": "log.completions_steps",
}
# TRL's names that `grpo` and `sft` take for the fields of groups, whose paths are in GROUPED.
TRL_FLAT = frozenset({"logging_steps", "report_to"})
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


class Log(Record):
    """What a run prints and whom it tells, the setting `log`.

    Args:
        steps: Steps between lines on the screen (metrics.jsonl has every step).
        report_to: Trackers, separated by commas: tensorboard, wandb, trackio, mlflow; none: no tracker.
        completions_steps: Steps between tables of RL's completions, on the screen and in completions.jsonl; 0: never.
    """

    steps: int = option(default=10, at_least=1)
    report_to: str | None = "tensorboard"
    completions_steps: int = option(default=50, at_least=0)

    def check(self) -> None:
        if unknown := [name for name in self.trackers if name not in TRACKERS]:
            raise ValueError(f"report_to={', '.join(unknown)!r} is not known; use {', '.join(TRACKERS)}, or none")

    @property
    def trackers(self) -> list[str]:
        """Names of the trackers."""
        names = map(str.strip, (self.report_to or "none").split(","))
        return [name for name in names if name != "none"]


def with_groups(
    kind: type[Record], settings: Mapping[str, Any], before: Mapping[str, Any], names: Collection[str] = TRL_FLAT
) -> dict[str, Any]:
    """Return settings in which those with flat `names` are fields of their group's record.

    Args:
        kind: Class of the settings: `Recipe` or `SFT`.
        settings: Settings by name.
        before: Groups whose other fields the settings keep, such as a preset's. Another group has its default.
        names: Flat names that are read. Default: TRL_FLAT.

    Raises:
        ValueError: A group cannot have these values; the message begins with TRL's names.
    """
    grouped = {name: value for name, value in settings.items() if name not in names}
    changes: dict[str, Any] = {}
    for name in [name for name in settings if name in names]:
        group, *path = kind.GROUPED[name].split(".")
        part = changes.setdefault(group, {})
        for step in path[:-1]:
            part = part.setdefault(step, {})
        part[path[-1]] = settings[name]
    defaults: dict[str, Any] = {setting.name: setting.default for setting in fields(kind)}
    for group, values in changes.items():
        try:
            grouped[group] = (grouped.get(group) or before.get(group) or defaults[group]).replace(**values)
        except ValueError as error:
            given = [name for name in settings if name in names and kind.GROUPED[name].startswith(f"{group}.")]
            raise ValueError(f"{', '.join(given)}: {error}") from None
    return grouped
