"""Adapters on disk, in peft's format."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dllm_rl.models.adapters.experts import STACKS, LoraExperts
from dllm_rl.models.adapters.linear import adapted_layers, add_lora
from dllm_rl.models.base import Policy
from dllm_rl.models.checkpoint.tensors import misfits, renamed
from dllm_rl.models.lora import Lora
from dllm_rl.models.untrusted import read_adapter


def adapter_state(policy: Policy) -> dict[str, Tensor]:
    """The adapters' tensors as peft names them, after the authors' own module names."""
    backwards = tuple((b, a) for a, b in policy.spec.names)
    out: dict[str, Tensor] = {}
    for path, layer in adapted_layers(policy.module).items():
        if isinstance(layer, LoraExperts):  # a stock class's own names: the authors have no stacks
            out |= {f"base_model.model.{path}{name}": tensor for name, tensor in layer.saved().items()}
            continue
        stem = renamed(f"{path}.weight", backwards).removesuffix(".weight")
        for part in ("lora_A", "lora_B"):
            out[f"base_model.model.{stem}.{part}.weight"] = getattr(layer, part).weight.detach()
    return out


def save_adapter(policy: Policy, directory: str | Path) -> None:
    """Write the adapters alone, in peft's format: adapter_model.safetensors and adapter_config.json.

    Raises ValueError when the policy has none.
    """
    state, lora = adapter_state(policy), policy.lora
    if lora is None:
        raise ValueError(f"{type(policy.module).__name__} has no adapters; save_pretrained writes its weights")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    calls = next(iter(adapted_layers(policy.module).values())).calls
    metadata = {"format": "pt", "seed": str(lora.seed), "dropout_calls": str(calls)}
    save_file(
        {name: tensor.cpu().clone() for name, tensor in state.items()},
        directory / "adapter_model.safetensors",
        metadata,
    )
    stems = _stems(state)
    experts = _of_experts(stems)
    config = {
        "peft_type": "LORA",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": sorted(stems - {f"{path}{part}" for path in experts for part in ("", ".base_layer")}),
        **({"target_parameters": [f"{path}.{name}" for path in experts for name in STACKS]} if experts else {}),
        "base_model_name_or_path": policy.spec.source,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(policy: Policy, directory: str | Path) -> None:
    """Put saved adapters, ours or peft's, on the policy, in place, with every tensor accounted for.

    Raises ValueError on another method than plain LoRA, or on tensors that do not fit the module.
    """
    directory = Path(directory)
    config, state, metadata = read_adapter(directory)
    plain = {
        "peft_type": "LORA",
        "use_dora": False,
        "use_rslora": False,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
    }
    for field, value in plain.items():
        if config.get(field) not in (value, None):
            raise ValueError(
                f"{directory}: {field}={config[field]!r} is not supported; only plain LoRA ({field}={value!r}) is"
            )
    stems = _stems(state)
    experts = _of_experts(stems)
    linear = stems - {f"{path}{part}" for path in experts for part in ("", ".base_layer")}
    paths = tuple(sorted(renamed(f"{stem}.weight", policy.spec.names).removesuffix(".weight") for stem in linear))
    settings = {"r": config["r"], "alpha": config["lora_alpha"], "dropout": config["lora_dropout"]}
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
            layer.load({part: state[f"base_model.model.{path}{part}"] for part in layer.saved()})


def _stems(state: dict[str, Tensor]) -> set[str]:
    return {name.split(".lora_")[0].removeprefix("base_model.model.") for name in state}


def _of_experts(stems: set[str]) -> list[str]:
    """Paths of modules with adapters on two parameters: peft wraps one wrapper in another."""
    return sorted(stem for stem in stems if f"{stem}.base_layer" in stems)
