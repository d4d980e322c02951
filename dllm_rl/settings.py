"""The settings that RL and SFT share."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal

from dllm_rl.algorithms.optimizers import AdamW, LinearDecay, LRSchedule, Optimizer
from dllm_rl.callbacks import StopBelow, check_callbacks
from dllm_rl.groups import GROUPED, Evaluation, Limits, Log, Saves, is_loaded_module
from dllm_rl.models.base import Policy
from dllm_rl.models.lora_settings import Lora
from dllm_rl.records import Record, annotations_of, describe, fields_of_group, option, to_json


def documented(record: type) -> str:
    """Return the record's docstring with a line per field: its name, help text and bound, or the fields of a group."""
    lines = [f"{record.__doc__}\n"]
    for setting in fields(record):
        bound = setting.metadata["bound"]
        lines.append(f"{setting.name:22}  {setting.metadata['help']}" + (f" ({bound})" if bound else ""))
        lines += [f"    .{part}" for part in fields_of_group(annotations_of(record)[setting.name])]
    return "\n".join(lines)


class Settings(Record):
    """The settings that RL and SFT share. Their names are those of TRL or verl where the meaning is the same."""

    GROUPED: ClassVar[Mapping[str, str]] = GROUPED
    EVALUATION_BATCH: ClassVar[int] = 32  # default of evaluation.batch_size

    name: str = option(help="name of the run; its default folder is runs/NAME-seedSEED")
    model: Callable[..., Policy] | str | Policy = option(
        help="a checkpoint's path or hub id; in Python also a policy (it is copied), or a function (seed=...) -> policy"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        default="float32", help="dtype of weights loaded from a path; auto: the stored dtype"
    )
    base_quantization: Literal["nf4", "int8"] | None = option(
        default=None, help="load the checkpoint's weights in this bitsandbytes format and freeze them; needs lora"
    )
    lora: Lora | None = option(default=None, help="LoRA adapters to train, e.g. Lora(r=16); None: train all weights")
    optim: Optimizer = option(
        default=AdamW(beta2=0.95, weight_decay=0.01),
        help="optimizer, with its betas and decay: AdamW, AdamW8bit",
    )

    seed: int = option(default=0, help="seed of everything random in the run")
    train_batch_size: int = option(default=32, help="prompts (SFT: sequences) per step, over all processes", at_least=1)
    num_steps: int = option(default=200, help="training steps", at_least=0)
    learning_rate: float = option(default=5e-4, help="learning rate of the optimizer, before lr_schedule", above=0)
    max_grad_norm: float = option(
        default=1.0, help="largest norm of the gradient; larger gradients are clipped", above=0
    )
    lr_schedule: LRSchedule = option(default=LinearDecay(), help="factor on the learning rate at each step")
    lr_schedule_steps: int | None = option(
        default=None, help="length of lr_schedule in steps; None: num_steps", at_least=1
    )
    gradient_checkpointing: bool = option(
        default=False,
        help="recompute blocks in the backward: less memory, same gradients, 1/3 more work (1/2 with adapters)",
    )
    bf16: bool = option(default=False, help="autocast forwards to bf16; the weights keep `dtype`")

    evaluation: Evaluation = option(default=Evaluation(), help="when evaluations of held-out problems or rows run")
    log: Log = option(default=Log(), help="what a run prints, and its trackers")
    saves: Saves = option(default=Saves(), help="which checkpoints a run writes and keeps")
    callbacks: Any = option(default=(), help="dllm_rl.Callback objects")
    output_dir: str | None = option(
        default=None, help="folder of the run; None: runs/NAME-seedSEED, or with -2, -3 ... if it is used"
    )
    resume_from_checkpoint: str | None = option(
        default=None, help="checkpoint folder to resume from, or 'latest': the newest one in output_dir"
    )
    allow_changed: str | None = option(
        default=None, help="fields that a resume may change, separated by commas, e.g. learning_rate,corrector"
    )
    limits: Limits = option(default=Limits(), help="how long a run waits for rewards, processes and its last step")
    overwrite_output_dir: bool = option(default=False, help="delete a run that is already in output_dir")

    @property
    def directory(self) -> str:
        return self.output_dir or f"runs/{self.name}-seed{self.seed}"

    @property
    def best_metric(self) -> str | None:
        """The metric that selects the best checkpoint, as the evaluations name it; None: none is selected."""
        return None if self.saves.best is None else self.saves.best.measured

    @property
    def evaluation_batch_size(self) -> int:
        """The `evaluation.batch_size` in effect."""
        return self.evaluation.batch_size or self.EVALUATION_BATCH

    @property
    def loads_best(self) -> bool:
        """Whether the run ends with the best checkpoint instead of the last weights."""
        return self.saves.best is not None and self.saves.best.load_at_end

    @property
    def saves_only_adapters(self) -> bool:
        """Whether checkpoints before the last one have only adapters. Their base must be in a folder or on the hub."""
        return self.lora is not None and isinstance(self.model, str)

    @property
    def evaluated_metrics(self) -> dict[str, str]:
        """Metrics of the evaluations that the recipe needs, by the setting that names them in messages."""
        names = {}
        if self.saves.best is not None:
            names[f"saves.best.metric={self.saves.best.metric!r}"] = self.saves.best.measured
        for callback in self.callbacks:
            if isinstance(callback, StopBelow) and callback.metric.startswith("eval/"):
                setting = f"callbacks: {type(callback).__name__}({callback.metric!r})"
                names[setting] = callback.metric.removeprefix("eval/")
        return names

    def is_better(self, value: float, best: float | None) -> bool:
        """Return whether a value of the `best_metric` is better than the best so far (None before the first)."""
        is_loss = str(self.best_metric).endswith("loss")
        return math.isfinite(value) and (best is None or (value < best if is_loss else value > best))

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON, as checkpoints and summary.json store them."""
        return {f.name: to_json(getattr(self, f.name)) for f in fields(self)}

    def check(self) -> None:
        """Raise ValueError if fields cannot be combined."""
        check_callbacks(self.callbacks)
        for is_wrong, message in self.conflicts():
            if is_wrong:
                raise ValueError(message)

    def low_bit_conflicts(self, base: str) -> list[tuple[bool, str]]:
        """Return the conflicts with bitsandbytes weights, whose origin the messages call `base`."""
        rest = f"lora=None with {base}, which is frozen, would train embeddings, norms and head alone"
        return [(self.lora is None, f"{rest}: set lora, or give a model in 16 or 32 bits")]

    def conflicts(self) -> list[tuple[bool, str]]:
        """Return pairs (whether certain fields are in conflict, the error message with the remedy)."""
        return [
            is_loaded_module("model", self.model),
            (
                self.dtype == "float16" and self.lora is None and isinstance(self.optim, AdamW),
                "dtype='float16' needs lora, or another optim: AdamW's second moments and its epsilon underflow to "
                "0 in float16; or use 'bfloat16' or 'float32'",
            ),
            (
                self.base_quantization is not None and self.lora is None,
                f"base_quantization={self.base_quantization!r} freezes the base model: set lora, or leave it out",
            ),
            (
                self.evaluation.steps == 0 and bool(self.evaluated_metrics),
                f"{', '.join(self.evaluated_metrics)} is measured every evaluation.steps, and evaluation.steps=0 never "
                "measures: set evaluation.steps",
            ),
        ]

    def __repr__(self) -> str:
        """Return the fields that differ from their default, one per line."""
        lines = [f"{type(self).__name__}("]
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value != setting.default:  # only what a variant changes
                lines.append(f"    {setting.name}={describe(value)},")
        return "\n".join([*lines, ")"])
