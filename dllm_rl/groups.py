"""Groups of settings of RL and SFT: records of their own in a field of `Recipe`, such as `log.steps`."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from torch.nn import Module

from dllm_rl.records import Record, annotations_of, describe, fit, make_record, option, record_type

# Flat names of the groups' fields, and their paths in a recipe. A recipe answers a flat name by the path.
GROUPED = {
    "logging_steps": "log.steps",
    "report_to": "log.report_to",
    "log_completions_steps": "log.completions_steps",
    "save_steps": "saves.steps",
    "save_total_limit": "saves.total_limit",
    "async_save": "saves.in_background",
    "metric_for_best_model": "saves.best.metric",
    "load_best_model_at_end": "saves.best.load_at_end",
    "push_to_hub": "saves.push_to_hub",
    "stop_seconds": "limits.stop_seconds",
    "reward_timeout": "limits.reward_timeout",
    "collective_timeout": "limits.collective_timeout",
    "peer_timeout": "limits.peer_timeout",
    "sft_warmup_steps": "warmup.steps",
    "sft_warmup_batch_size": "warmup.batch_size",
    "sft_warmup_learning_rate": "warmup.learning_rate",
    "sft_warmup_metric": "warmup.metric",
    "sft_warmup_target": "warmup.target",
    "sft_warmup_eval_steps": "warmup.eval_steps",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "weight_decay": "optim.weight_decay",
    "rollout_workers": "late.workers",
    "max_staleness": "late.max_staleness",
    "teacher_substeps": "teacher.substeps",
    "teacher_coeff": "teacher.coeff",
    "eval_steps": "evaluation.steps",
    "eval_batch_size": "evaluation.batch_size",
}
# TRL's names that `grpo` and `sft` take for the fields of groups, whose paths are in GROUPED.
TRL_FLAT = frozenset(
    [
        "logging_steps",
        "report_to",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "metric_for_best_model",
        "load_best_model_at_end",
        "push_to_hub",
        "adam_beta1",
        "adam_beta2",
        "weight_decay",
    ]
)
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
REFERENCE = "reference"  # value of `teacher.model`: the policy that RL started from


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


class Warmup(Record):
    """Supervised steps on the task's solutions before RL, the setting `warmup`.

    Args:
        steps: Largest number of steps; 0: no warm-up.
        batch_size: Prompts per step, over all processes.
        learning_rate: Learning rate.
        metric: Metric of validation_task that ends the warm-up.
        target: Value of `metric` that ends the warm-up.
        eval_steps: Steps between evaluations of `metric`.
    """

    steps: int = option(default=0, at_least=0)
    batch_size: int = option(default=64, at_least=1)
    learning_rate: float = option(default=2e-3, above=0)
    metric: str = "solve_rate"
    target: float = 1.0
    eval_steps: int = option(default=5, at_least=1)


class Late(Record):
    """Rollouts that Ray actors make while the learner trains, the setting `late`.

    Args:
        workers: Number of actors, at most one per batch that is made at a time: max_staleness + 1.
        max_staleness: Steps by which the rollouts' weights are older than the learner's; 0: it waits for its batch.
    """

    workers: int = option(default=1, at_least=1)
    max_staleness: int = option(default=1, at_least=0)

    def check(self) -> None:
        batches = self.max_staleness + 1
        if self.workers > batches:
            raise ValueError(
                f"workers={self.workers} are more than the {batches} batches made at a time with "
                f"max_staleness={self.max_staleness}: use {batches} workers, or max_staleness={self.workers - 1}"
            )


class Teacher(Record):
    """A model that scores the student's completions (on-policy distillation), the setting `teacher`.

    Args:
        model: The teacher, as `model` of the recipe, or 'reference': the policy that RL started from.
        substeps: Denoising steps of the teacher per step of the sampler; 1: the same steps.
        coeff: Weight of the teacher's reward; the task's has 1 - coeff.
    """

    model: str | Any  # a policy or a function, too: the command line could not keep a value of a protocol's type
    substeps: int = option(default=1, at_least=1)
    coeff: float = option(default=1.0, above=0, at_most=1)

    def check(self) -> None:
        is_wrong, message = is_loaded_module("model", self.model)
        if is_wrong:
            raise ValueError(message)
        if not (isinstance(self.model, str) or has_policy_members(self.model) or callable(self.model)):
            raise ValueError(
                f"model={describe(self.model)} must be a path, a hub id, a policy, or a function that makes one"
            )

    @property
    def is_reference(self) -> bool:
        """Whether the policy that RL started from is the teacher."""
        return self.model == REFERENCE


class Best(Record):
    """The best checkpoint by a metric of the evaluations, which a run keeps: `saves.best`.

    Args:
        metric: Metric that selects it, e.g. solve_rate or loss: the highest, or the lowest if the name ends in loss.
        load_at_end: Evaluate and return the best checkpoint instead of the last weights.
    """

    metric: str
    load_at_end: bool = False

    @property
    def measured(self) -> str:
        """`metric` as the evaluations name it: without `eval/` or transformers' `eval_`."""
        return self.metric.removeprefix("eval/").removeprefix("eval_")


class Saves(Record):
    """Which checkpoints a run writes, keeps and uploads, the setting `saves`.

    Args:
        steps: Steps between checkpoints.
        total_limit: Newest checkpoints to keep, besides the best one.
        in_background: Write checkpoints while training continues, from a host copy of weights and optimizer state.
        best: `Best`, which names the metric that selects the best checkpoint; None: none is selected.
        push_to_hub: OWNER/NAME on the Hugging Face hub to upload the last checkpoint to; None: no upload.
    """

    steps: int = option(default=50, at_least=1)
    total_limit: int = option(default=2, at_least=1)
    in_background: bool = False
    best: Best | None = None
    push_to_hub: str | None = None


class Limits(Record):
    """How long a run waits, in seconds, the setting `limits`.

    Args:
        stop_seconds: Seconds after a stop signal in which the step may begin its updates; else the last update is
            saved.
        reward_timeout: Seconds of one call of the rewards, or of grading a completion; then exit with 124; None: no
            limit.
        collective_timeout: Seconds that a process waits in a collective before the run stops.
        peer_timeout: Seconds without a sign of life after which a process counts as dead; None: never.
    """

    stop_seconds: float = option(default=20.0, at_least=0)
    reward_timeout: float | None = option(default=600.0, above=0)
    collective_timeout: float = option(default=1800.0, above=0)
    peer_timeout: float | None = option(default=40.0, above=0)


class Evaluation(Record):
    """When a run evaluates, the setting `evaluation`.

    Args:
        steps: Steps between evaluations; 0: none; None: evaluations take at most 2 % of the forwards.
        batch_size: Problems (SFT: rows) per evaluation batch, in each process; None: 256 (SFT: 32).
    """

    steps: int | None = option(default=None, at_least=0)
    batch_size: int | None = option(default=None, at_least=1)


def has_policy_members(model: Any) -> bool:
    """Return whether a value may be a policy: settings know no models. `check_policy` looks for all its members."""
    return all(hasattr(model, name) for name in ("module", "spec", "tokenizer"))


def is_loaded_module(name: str, model: Any) -> tuple[bool, str]:
    """Return the conflict of a setting that must be a policy and may be a module that somebody loaded."""
    is_module = isinstance(model, Module) and not has_policy_members(model)
    return is_module, f"{name} is a loaded module: give make_policy(module, tokenizer)"


def type_of(kind: type[Record], name: str) -> Any:
    """Return the type of the setting of `Recipe` or `SFT` with this flat name."""
    record, field = _field_of(kind, name)
    return annotations_of(record)[field]


def check_flat(kind: type[Record], name: str, value: Any) -> None:
    """Raise ValueError, which names the setting by its flat name, if its value has another type or is out of range."""
    record, field = _field_of(kind, name)
    bound = next(each.metadata.get("bound") for each in fields(record) if each.name == field)  # type: ignore[arg-type]
    fit(name, annotations_of(record)[field], value, bound)


def _field_of(kind: type[Record], name: str) -> tuple[type[Record], str]:
    """Return the group's class that has the setting with this flat name, and the field's name there."""
    record: Any = kind
    *groups, field = kind.GROUPED[name].split(".")
    for group in groups:
        default = getattr(record, group, None)
        record = type(default) if isinstance(default, Record) else record_type(annotations_of(record)[group])
    return record, field


def nested(kind: type[Record], settings: Mapping[str, Any], names: Collection[str] = TRL_FLAT) -> dict[str, Any]:
    """Return settings of `Recipe` or `SFT` in which those with flat `names` (default: TRL's) are in a dictionary of
    their group's fields, or in the group's record if it is given too.

    Raises:
        ValueError: A field is set twice to different values: by its flat name, and in its group.
    """
    found = {name: value for name, value in settings.items() if name not in names}
    changes: dict[str, Any] = {}
    for name in [name for name in settings if name in names]:
        group, *path = kind.GROUPED[name].split(".")
        part = changes.setdefault(group, {})
        for step in path[:-1]:
            part = part.setdefault(step, {})
        part[path[-1]] = settings[name]
    for group, values in changes.items():
        given = found.get(group, values)
        # A class's name or a function stands for a record.
        given = given if isinstance(given, dict) else fit(group, annotations_of(kind)[group], given)
        found[group] = _joined(group, given, values)
    return found


def _joined(path: str, given: Any, values: dict[str, Any]) -> Any:
    """Return a group's record or dictionary with more values. A value of another type is left to the group's check.

    Raises:
        ValueError: A field has another value already; in a record, another one than its default.
    """
    if isinstance(given, Record):
        if unknown := values.keys() - annotations_of(type(given)).keys():
            name = min(unknown)
            raise ValueError(
                f"{path}.{name}={values[name]!r} is not a setting of {path}={describe(given)}; leave one of them out"
            )
        settings = [field for field in fields(given) if getattr(given, field.name) != field.default]  # type: ignore[arg-type]
        before = {field.name: getattr(given, field.name) for field in settings}
    elif isinstance(given, dict):
        before = given
    else:
        return given
    changes = dict(values)
    for name in values.keys() & before.keys():
        if isinstance(values[name], dict):
            changes[name] = _joined(f"{path}.{name}", before[name], values[name])
        elif values[name] != before[name]:
            raise ValueError(f"{path}.{name} is set twice, to {values[name]!r} and {before[name]!r}; set it once")
    return given.replace(**changes) if isinstance(given, Record) else given | changes


def with_groups(kind: type[Record], settings: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which a dictionary of a group's fields is the group's record.

    Args:
        kind: Class of the settings: `Recipe` or `SFT`.
        settings: Settings by name.
        before: Groups whose other fields are kept. Another group has its default.

    Raises:
        ValueError: A group cannot have these values; the message begins with its name.
    """
    groups = {path.partition(".")[0] for path in kind.GROUPED.values()}
    defaults: dict[str, Any] = {setting.name: setting.default for setting in fields(kind)}  # type: ignore[arg-type]
    annotations = annotations_of(kind)
    made = dict(settings)
    for name in groups & settings.keys():
        if isinstance(made[name], dict) and "class_path" not in made[name]:
            try:
                group: Any = before.get(name, defaults[name])
                base: Any = record_type(annotations[name])
                made[name] = make_record(base, made[name]) if group is None else group.replace(**made[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return made
