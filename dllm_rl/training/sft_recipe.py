"""SFT is supervised fine-tuning as one flat frozen record, beside Recipe; what both have means the same in both."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from dllm_rl.config import describe
from dllm_rl.models.base import Policy
from dllm_rl.models.lora import Lora
from dllm_rl.recipe import Recipe, Settings

_OF_RL = {f.name: f for f in fields(Recipe)}


def _(help: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": help})


def _same(name: str, **changed: Any) -> Any:
    """A field as Recipe has it; `default` and `help` may differ."""
    metadata = {**_OF_RL[name].metadata} | {key: value for key, value in changed.items() if key == "help"}
    return field(default=changed.get("default", _OF_RL[name].default), metadata=metadata)


@dataclass(frozen=True, kw_only=True, repr=False)
class SFT(Settings):
    """What is shown to a model, and how. Names are TRL's where the meaning is the same."""

    name: str = _same("name")
    model: Callable[..., Policy] | str | Policy = _same("model")
    dataset: str | Any = _(
        "rows with `messages`, `prompt` and `completion`, or `text`: a data set, a list, or the path of a file of JSON "
        "lines"
    )
    eval_dataset: str | Any = _("held-out rows; None: the last tenth of dataset, at most 256 rows", None)
    max_length: int = _("longer rows, in tokens, are left out; with packing, also the length of a row of several", 1024)
    completion_length: int | None = _(
        "a diffusion model's completions are filled up with the end token to so many tokens, as it is to generate all "
        "of its positions: RL's max_new_tokens; None: one end token",
        None,
    )
    completion_only_loss: bool = _("of prompt and completion, the completion alone is learned", True)
    assistant_only_loss: bool = _("of messages, the assistant's alone are learned", True)
    packing: bool = _(
        "several sequences in a row of the batch, which do not see each other: the same gradients, less padding", False
    )

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = _same("dtype")
    float32_head: bool = _same("float32_head", help="logits in fp32 where the model computes in 16 bits")
    base_quantization: Literal["nf4", "int8"] | None = _same("base_quantization")
    lora: Callable[[], Lora] | None = _same("lora", help="adapters that are trained in place of the weights; None: all")
    optim: Callable = _same("optim")

    seed: int = _same("seed")
    train_batch_size: int = _same("train_batch_size", help="sequences per step, over all processes")
    micro_batch_size: int | None = _same("micro_batch_size", help="rows per forward; None: all at once")
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

    def __post_init__(self) -> None:
        self.check_settings()
        least = {"train_batch_size": 1, "eval_batch_size": 1, "logging_steps": 1, "save_steps": 1}
        least |= {"save_total_limit": 1, "max_length": 2, "num_steps": 0, "eval_steps": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {bound}")
        for name in ("micro_batch_size", "completion_length", "lr_schedule_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, or none")
        for name in ("learning_rate", "max_grad_norm", "collective_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        if self.peer_timeout is not None and not 0 < self.peer_timeout < float("inf"):
            raise ValueError(f"peer_timeout={self.peer_timeout} must be positive and finite, or none for no watch")
        for name in ("weight_decay", "stop_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.dtype == "float16" and self.lora is None:
            raise ValueError("dtype='float16' needs lora; or use 'bfloat16' or 'float32'")
        if self.base_quantization is not None and self.lora is None:
            raise ValueError(
                f"base_quantization={self.base_quantization!r} is a frozen base: set lora, or leave it out"
            )

    def __repr__(self) -> str:
        """The fields that are not at their default, one a line; of rows held in memory, nothing."""
        chosen = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not f.default]
        shown = [(name, value) for name, value in chosen if "dataset" not in name or isinstance(value, str)]
        return "SFT(\n" + "".join(f"    {name}={describe(value)},\n" for name, value in shown) + ")"


SFT.__doc__ = f"{SFT.__doc__}\n\n" + "\n".join(f"{f.name:22}  {f.metadata['help']}" for f in fields(SFT))
