"""SFT is supervised fine-tuning as one flat frozen record; fields that Recipe has too mean the same."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, replace
from typing import Any, Literal

from dllm_rl.members import described
from dllm_rl.models.base import Policy
from dllm_rl.models.lora import Lora
from dllm_rl.recipe import Recipe, Settings, _, documented


def _same(name: str, *, help: str | None = None, default: Any = MISSING) -> Any:
    """Recipe's field; `help` and `default` may differ."""
    known = Recipe.__dataclass_fields__[name]
    metadata = dict(known.metadata) | ({} if help is None else {"help": help})
    return field(default=known.default if default is MISSING else default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, repr=False)
class SFT(Settings):
    """What a model is shown, and how. Names are TRL's where the meaning is the same."""

    name: str = _same("name")
    model: Callable[..., Policy] | str | Policy = _same("model")
    dataset: str | Any = _("rows with `messages`, `prompt` and `completion`, or `text`: data set, list, or .jsonl path")
    eval_dataset: str | Any = _("held-out rows; None: the last tenth of dataset, at most 256 rows", None)
    max_length: int = _("longer rows, in tokens, are left out; with packing also the length of a row", 1024, at_least=2)
    completion_length: int | None = _(
        "end tokens fill diffusion completions to this length (RL's max_new_tokens); None: one", None, at_least=1
    )
    completion_only_loss: bool = _("of prompt and completion, the completion alone is learned", True)
    assistant_only_loss: bool = _("of messages, the assistant's alone are learned", True)
    packing: bool = _("several sequences per row, which do not see each other: same gradients, less padding", False)

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = _same("dtype")
    float32_head: bool = _same("float32_head", help="logits in fp32 where the model computes in 16 bits")
    base_quantization: Literal["nf4", "int8"] | None = _same("base_quantization")
    lora: Callable[[], Lora] | None = _same("lora", help="adapters that are trained in place of the weights; None: all")
    optim: Callable = _same("optim")

    seed: int = _same("seed")
    train_batch_size: int = _same("train_batch_size", help="sequences per step, over all processes")
    micro_batch_size: int | None = _("rows per forward; None: all at once", None, at_least=1)
    num_steps: int = _same("num_steps", help="optimiser steps", default=200)
    learning_rate: float = _same("learning_rate")
    adam_beta1: float = _same("adam_beta1")
    adam_beta2: float = _same("adam_beta2", default=0.95)
    weight_decay: float = _same("weight_decay", default=0.01)
    max_grad_norm: float = _same("max_grad_norm")
    lr_schedule: Callable = _same("lr_schedule")
    lr_schedule_steps: int | None = _same("lr_schedule_steps")
    gradient_checkpointing: bool = _same("gradient_checkpointing")
    bf16: bool = _same("bf16")

    eval_steps: int = _same("eval_steps", help="steps between held-out losses; 0: before and after alone")
    eval_batch_size: int = _same("eval_batch_size", help="rows per forward of the held-out loss", default=32)
    logging_steps: int = _same("logging_steps", help="steps between lines on the screen (metrics.jsonl has every step)")
    report_to: str | None = _same("report_to")
    save_steps: int = _same("save_steps", help="steps between checkpoints")
    save_total_limit: int = _same("save_total_limit")
    verify_checkpoint: Literal["full", "quick"] = _same("verify_checkpoint")
    on_save_error: Literal["stop", "continue"] = _same("on_save_error")
    stop_seconds: float = _same("stop_seconds")
    output_dir: str | None = _same("output_dir")
    resume_from_checkpoint: str | None = _same("resume_from_checkpoint")
    collective_timeout: float = _same("collective_timeout")
    peer_timeout: float | None = _same("peer_timeout")
    overwrite_output_dir: bool = _same("overwrite_output_dir")

    def settings(self) -> dict[str, Any]:
        return described(self._without_rows())

    def __repr__(self) -> str:
        return Settings.__repr__(self._without_rows())

    def _without_rows(self) -> "SFT":
        return replace(self, dataset=digest_of(self.dataset), eval_dataset=digest_of(self.eval_dataset))


def digest_of(dataset: Any) -> str | None:
    """What distinguishes a data set: a path, or the number of rows and a digest of at most a hundred."""
    if dataset is None or isinstance(dataset, str):
        return dataset
    count = len(dataset)
    # A run of a million rows must start at once; a hundred rows differ between any two data sets that one mixes up.
    looked_at = [dict(dataset[i]) for i in range(0, count, max(1, count // 100))]
    digest = hashlib.sha256(json.dumps(looked_at, sort_keys=True, default=str).encode())
    return f"{count} rows, {digest.hexdigest()[:16]}"


SFT.__doc__ = documented(SFT)
