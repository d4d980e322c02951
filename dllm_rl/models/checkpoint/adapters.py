"""Saved adapters: files in peft's format, and peft's LoraConfig."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllm_rl.models.base import Policy
from dllm_rl.models.checkpoint.tensors import (
    FLOAT_DTYPES,
    check_regular,
    mismatched_tensors,
    rename_tensor,
    stock_to_original,
)
from dllm_rl.models.lora import STACKS, LoraExperts, adapted_layers, add_lora, base_of
from dllm_rl.models.lora_settings import Lora, alpha_of
from dllm_rl.models.low_bit import is_bitsandbytes

PREFIX = "base_model.model."  # prefix of every name in peft's files
# Fields of peft's LoraConfig that are read, or that do not change what is computed from the same tensors.
PEFT_FIELDS = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias", "inference_mode"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "auto_mapping", "runtime_config", "ensure_weight_tying"),
    *("eva_config", "corda_config", "lora_ga_config"),
}
# Values of init_lora_weights that leave the base as it is; PiSSA, OLoRA, LoftQ and similar subtract from its weights.
PEFT_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
REMEDY = "leave it out, or use the model that peft's merge_and_unload() returns"


def check_peft_config(config: Any, source: str | Path = "peft_config") -> None:
    """Raise ValueError for adapters of peft that this library cannot read.

    It is for whoever trains peft's adapters, too, so that `load_policy` opens what they save: call it before training.

    Args:
        config: Config of peft, or the fields of its adapter_config.json.
        source: The name of the setting or of the folder, for the message.

    Raises:
        ValueError: The adapters are not LoRA, or a setting needs more than the matrices A and B and one scale (DoRA,
            `bias`, `modules_to_save`, `rank_pattern`, ...).
    """
    fields = config if isinstance(config, Mapping) else config.to_dict()
    method = getattr(fields.get("peft_type"), "value", fields.get("peft_type"))
    if method not in (None, "LORA"):
        raise ValueError(f"{source}: peft_type={method!r} is not supported; only LoRA is: {REMEDY}")
    if (bias := fields.get("bias")) not in (None, "none"):
        raise ValueError(f"{source}: bias={bias!r} is not supported; {REMEDY}")
    if (init := fields.get("init_lora_weights")) not in PEFT_INITS:
        raise ValueError(
            f"{source}: init_lora_weights={init!r} also changed the base, which is not supported; save the adapters "
            "as plain LoRA (peft's path_initial_model_for_weight_conversion)"
        )
    for name, value in fields.items():
        # Numbers and texts are options of settings that are themselves a flag (named use_...), a dict or a list.
        is_on = value is True or (
            bool(value) and (name.startswith("use_") or isinstance(value, dict | list | set | tuple))
        )
        if name not in PEFT_FIELDS and is_on:
            raise ValueError(f"{source}: {name}={value!r} is not supported; {REMEDY}")


def adapter_state(policy: Policy) -> dict[str, Tensor]:
    """Return the adapters' tensors under peft's names, which contain the module names of the original checkpoint."""
    state: dict[str, Tensor] = {}
    names = stock_to_original(policy.spec)
    for path, layer in adapted_layers(policy.module).items():
        if isinstance(layer, LoraExperts):  # under the stock class's path: original checkpoints have no stacks
            state |= {f"{PREFIX}{path}{name}": tensor for name, tensor in layer.peft_state().items()}
            continue
        original_path = rename_tensor(f"{path}.weight", names).removesuffix(".weight")
        for matrix in ("lora_A", "lora_B"):
            state[f"{PREFIX}{original_path}.{matrix}.weight"] = getattr(layer, matrix).weight.detach()
    return state


def save_adapter(
    policy: Policy, directory: str | Path, *, base: str | None = None, base_digest: str | None = None
) -> None:
    """Write the adapters as peft's adapter_model.safetensors and adapter_config.json.

    Call it to save adapters without their base; `load_policy` opens the folder together with a given `base`.

    Args:
        policy: Policy with adapters.
        directory: Folder to write, created if missing.
        base: Folder or hub id of the base's weights. None: the adapters name none, and `load_adapter` adds them to it.
        base_digest: `digest_of_checkpoint` of the base, which `load_policy` compares. None: it is not compared.

    Raises:
        ValueError: The policy has no adapters.
    """
    lora = policy.lora
    if lora is None:
        raise ValueError(f"{type(policy.module).__name__} has no adapters; save_pretrained writes its weights")
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    state = adapter_state(policy)
    calls = next(iter(adapted_layers(policy.module).values())).calls  # all layers have the same count
    metadata = {"format": "pt", "seed": str(lora.seed), "dropout_calls": str(calls)}
    metadata["dtype"] = str(next(policy.module.parameters()).dtype).removeprefix("torch.")  # of the base
    if base_digest is not None:
        metadata["base_digest"] = base_digest
    low_bit = next((layer for layer in map(base_of, policy.module.modules()) if is_bitsandbytes(layer)), None)
    if low_bit is not None:
        metadata["quantization"] = "nf4" if hasattr(low_bit.weight, "quant_state") else "int8"
    tensors = {name: tensor.cpu().clone() for name, tensor in state.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata)
    linear, experts = _adapted_paths(state)
    config = {
        "peft_type": "LORA",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": linear,
    }
    if experts:
        config["target_parameters"] = [f"{path}.{name}" for path in experts for name in STACKS]
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(policy: Policy, directory: str | Path) -> None:
    """Add adapters to the policy, in place, and load their weights, which this library or peft saved.

    Raise ValueError for a method other than LoRA, or for tensors that do not fit.
    """
    directory = Path(directory).expanduser()
    config, saved_state, metadata = read_adapter(directory)
    # peft on a module in the stock class's layout has saved the stock class's names.
    names = stock_to_original(policy.spec)
    state = {_original_name(name, names): tensor for name, tensor in saved_state.items()}
    linear, experts = _adapted_paths(state)
    stock_paths = {
        rename_tensor(f"{path}.weight", policy.spec.files.tensor_names).removesuffix(".weight") for path in linear
    }
    # Tensors of other layers do not fit, see below.
    targets = sorted(path for path, _ in policy.module.named_modules() if path in stock_paths)
    settings = Lora(
        r=config["r"],
        alpha=alpha_of(config),
        dropout=float(config["lora_dropout"]),
        targets=tuple(targets),
        experts=bool(experts),
        seed=int(metadata.get("seed", 0)),  # peft's files have none. It matters only for dropout: A and B are loaded
    )
    add_lora(policy, settings)
    policy_tensors = adapter_state(policy)
    if mismatched := mismatched_tensors(state, policy_tensors):
        kind = type(policy.module).__name__
        raise ValueError(
            f"{directory}: adapter tensors {mismatched[:3]} do not fit {kind}; use the base that they were trained on"
        )
    for name, tensor in state.items():
        policy_tensors[name].copy_(tensor)
    for path, layer in adapted_layers(policy.module).items():
        layer.calls = int(metadata.get("dropout_calls", 0))
        if isinstance(layer, LoraExperts):
            layer.load_peft_state({name: state[f"{PREFIX}{path}{name}"] for name in layer.peft_state()})


def _original_name(name: str, names: Any) -> str:
    """Return the name of an adapter's tensor in the original checkpoint; an original name is unchanged."""
    path, separator, matrix = name.removeprefix(PREFIX).partition(".lora_")
    return PREFIX + rename_tensor(f"{path}.weight", names).removesuffix(".weight") + separator + matrix


def _adapted_paths(state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the paths of adapted linear layers, and of adapted modules of experts.

    peft wraps a module of experts twice, once per stack, so that its adapters have two paths: one ends in
    `.base_layer`.
    """
    paths = {name.split(".lora_")[0].removeprefix(PREFIX) for name in state}
    experts = sorted(path for path in paths if f"{path}.base_layer" in paths)
    expert_paths = {f"{path}{wrapper}" for path in experts for wrapper in ("", ".base_layer")}
    return sorted(paths - expert_paths), experts


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the fields of adapter_config.json. Raise ValueError for a damaged file, invalid numbers, or adapters that
    are not read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: the adapters are missing; give the folder of saved ones, or an earlier checkpoint")
    check_regular(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: the adapters are damaged: {error}") from None
    fields: dict[str, Any] = config if isinstance(config, dict) else {}
    check_peft_config(fields, folder)
    for name, kinds in {"r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float)}.items():
        value: Any = fields.get(name)
        # True is an int for isinstance. JSON has integers too large for a float; NaN and infinity fail too.
        if type(value) not in kinds or not abs(value) < 1e30:
            raise ValueError(f"{folder}: adapter_config.json is damaged: {name}={value!r} is not a number")
    if not 0 <= fields["lora_dropout"] < 1:
        raise ValueError(
            f"{folder}: lora_dropout={fields['lora_dropout']} is not in [0, 1); correct adapter_config.json"
        )
    return fields


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Return config, tensors and metadata of saved adapters. Raise ValueError for damaged files or invalid numbers."""
    fields = read_adapter_config(folder)
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is not a mapping)
            metadata = file.metadata() or {}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder}: the adapters are damaged: {error}") from None
    for name, tensor in state.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{folder}: {name} has dtype {tensor.dtype}, which is not an adapter's; save the adapters again"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {name} has NaN or infinite numbers; use earlier adapters")
    if not any(fields["r"] in tensor.shape for tensor in state.values()):
        raise ValueError(
            f"{folder}: adapter_config.json is damaged: no adapter tensor has a dimension of size r={fields['r']}"
        )
    return fields, state, metadata
