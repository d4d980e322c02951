"""Adapters on disk, in peft's format."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dllm_rl.models.adapters.experts import STACKS, LoraExperts
from dllm_rl.models.adapters.linear import adapted_layers, add_lora
from dllm_rl.models.base import Policy
from dllm_rl.models.checkpoint.tensors import backwards, misfits, renamed
from dllm_rl.models.lora import Lora
from dllm_rl.models.untrusted import read_adapter

PREFIX = "base_model.model."  # peft's, of every name


def adapter_state(policy: Policy) -> dict[str, Tensor]:
    """The adapters' tensors under peft's names, built from the authors' module names."""
    out: dict[str, Tensor] = {}
    for path, layer in adapted_layers(policy.module).items():
        if isinstance(layer, LoraExperts):  # a stock class's own names: the authors have no stacks
            for name, tensor in layer.saved().items():
                out[f"{PREFIX}{path}{name}"] = tensor
            continue
        stem = renamed(f"{path}.weight", backwards(policy.spec)).removesuffix(".weight")
        for part in ("lora_A", "lora_B"):
            out[f"{PREFIX}{stem}.{part}.weight"] = getattr(layer, part).weight.detach()
    return out


def save_adapter(policy: Policy, directory: str | Path) -> None:
    """Write the adapters as peft's adapter_model.safetensors and adapter_config.json. Raises ValueError without any."""
    lora = policy.lora
    if lora is None:
        raise ValueError(f"{type(policy.module).__name__} has no adapters; save_pretrained writes its weights")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = adapter_state(policy)
    calls = next(iter(adapted_layers(policy.module).values())).calls  # layers count dropout masks alike
    metadata = {"format": "pt", "seed": str(lora.seed), "dropout_calls": str(calls)}
    save_file(
        {name: tensor.cpu().clone() for name, tensor in state.items()},
        directory / "adapter_model.safetensors",
        metadata,
    )
    linear, experts = _paths(state)
    config = {
        "peft_type": "LORA",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": linear,
        **({"target_parameters": [f"{path}.{name}" for path in experts for name in STACKS]} if experts else {}),
        "base_model_name_or_path": policy.spec.source,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(policy: Policy, directory: str | Path) -> None:
    """Put saved adapters, ours or peft's, on the policy, in place. Raises ValueError on a method other than plain LoRA,
    or on tensors that do not fit the module."""
    directory = Path(directory)
    config, state, metadata = read_adapter(directory)
    plain: dict[str, Any] = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none"}
    plain |= {"modules_to_save": None, "rank_pattern": {}}
    for field, value in plain.items():
        if config.get(field) not in (value, None):
            raise ValueError(
                f"{directory}: {field}={config[field]!r} is not supported; only plain LoRA ({field}={value!r}) is"
            )
    linear, experts = _paths(state)
    paths = tuple(sorted(renamed(f"{stem}.weight", policy.spec.names).removesuffix(".weight") for stem in linear))
    settings = {"r": config["r"], "alpha": config["lora_alpha"], "dropout": config["lora_dropout"]}
    # peft's files have no seed: it matters for dropout alone, since A and B are overwritten.
    add_lora(policy, Lora(**settings, targets=paths, experts=bool(experts), seed=int(metadata.get("seed", 0))))
    have = adapter_state(policy)
    if odd := misfits(state, have):
        raise ValueError(
            f"{directory}: adapter tensors {odd[:3]} do not fit {type(policy.module).__name__}; give their own base"
        )
    for name, tensor in state.items():
        have[name].copy_(tensor)
    for path, layer in adapted_layers(policy.module).items():
        layer.calls = int(metadata.get("dropout_calls", 0))
        if isinstance(layer, LoraExperts):
            layer.load({part: state[f"{PREFIX}{path}{part}"] for part in layer.saved()})


def _paths(state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Paths of linear layers, and of experts: two parameters of one module, which peft wraps one inside the other."""
    stems = {name.split(".lora_")[0].removeprefix(PREFIX) for name in state}
    experts = sorted(stem for stem in stems if f"{stem}.base_layer" in stems)
    return sorted(stems - {f"{path}{part}" for path in experts for part in ("", ".base_layer")}), experts
