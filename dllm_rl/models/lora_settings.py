"""The settings of LoRA adapters, and how peft's settings become them. docs/papers.md explains the tag [paper]."""

from collections.abc import Mapping
from typing import Any

from dllm_rl.records import Record, option


class Lora(Record):
    """Settings of LoRA adapters: W + (alpha / r) B A on linear layers of the blocks.

    Use it as `lora` of `load_policy` or a recipe, to train adapters instead of the weights. A is random and B zero, so
    that fresh adapters change nothing.

    Args:
        r: Rank of the adapters.
        alpha: Scale of the adapters, times r.
        dropout: Dropout rate of the adapters' inputs, in forwards with gradients only. It must be 0 with `experts`.
        targets: Names of layers (`q_proj`), or full paths. None: the family's list. Routers, embeddings and heads have
            no adapters.
        experts: Also adapt each expert of a mixture of experts.
        seed: Seed of A and of dropout.

    Raises:
        ValueError: r is below 1, dropout is outside [0, 1), or dropout is combined with experts.

    Source: LoRA, arXiv 2106.09685 [paper]; A uniform in +-1/sqrt(in_features), as in peft.
    """

    r: int = option(default=16, at_least=1)
    alpha: float = 32.0
    dropout: float = option(default=0.0, at_least=0, below=1)
    targets: tuple[str, ...] | None = None
    experts: bool = False
    seed: int = 0

    def check(self) -> None:
        if self.experts and self.dropout:  # merged weights have no separate input that could be dropped
            raise ValueError(f"lora.dropout={self.dropout}: adapters on experts are merged in a forward; set it to 0")

    @classmethod
    def convert(cls, value: Any) -> "Lora | None":
        """Convert a peft LoraConfig."""
        if type(value).__module__.partition(".")[0] != "peft":
            return None
        return from_peft(value)


def from_peft(config: Any) -> Lora:
    """Convert a peft LoraConfig.

    Raise ValueError for a setting that is not supported here and changes what the adapters compute.
    """
    kind = type(config).__name__
    if kind != "LoraConfig":
        raise ValueError(f"lora={kind}(...) is not LoRA; give peft's LoraConfig, or Lora(r=16)")
    default = type(config)()
    used = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"}
    ignored = {"task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version", "runtime_config"}
    for name, value in vars(config).items():
        if name not in used | ignored and value != getattr(default, name, value):
            raise ValueError(f"lora=LoraConfig({name}={value!r}): this setting is not supported; leave it out")
    if config.inference_mode:
        raise ValueError("lora=LoraConfig(inference_mode=True) is not for training; leave it out")
    targets = config.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        raise ValueError(f"lora=LoraConfig(target_modules={targets!r}) is a pattern; give a list of layer names")
    return Lora(
        r=config.r,
        alpha=alpha_of(vars(config)),
        dropout=float(config.lora_dropout),
        targets=None if targets in (None, "all-linear") else tuple(sorted(targets)),
    )


def alpha_of(fields: Mapping[str, Any]) -> float:
    """Return alpha of a config of peft: rsLoRA divides `lora_alpha` by the root of r, and `Lora` by r."""
    return float(fields["lora_alpha"]) * (fields["r"] ** 0.5 if fields.get("use_rslora") else 1)
