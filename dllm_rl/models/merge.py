"""A module's tensors with adapters merged: what a checkpoint saves and loads, and a sync writes. Custom modules too."""

import copy
from collections.abc import Container, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl.models.base import Module, Policy, whole
from dllm_rl.models.lora import LoraExperts, LoraLinear, adapted_layers, is_bitsandbytes, linear_of, plain_weight


def has_extras(module: nn.Module) -> bool:
    """Whether the module has adapters or bitsandbytes weights."""
    return bool(adapted_layers(module)) or any(is_bitsandbytes(layer) for layer in module.modules())


def plain_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers, without the parts of adapted layers."""
    return ((n, m) for n, m in module.named_modules() if not n.endswith((".base_layer", ".lora_A", ".lora_B")))


def merged_tensor(layer: Any, kind: str) -> Tensor:
    """A layer's tensor, adapters merged (differentiable) and bitsandbytes weights dequantised; else its own."""
    if isinstance(layer, LoraExperts):
        return layer.merged(kind)
    if kind == "weight" and isinstance(layer, LoraLinear):
        return layer.merged()
    if kind == "weight" and is_bitsandbytes(layer):
        return plain_weight(layer)
    return getattr(layer.base_layer if isinstance(layer, LoraLinear) else layer, kind)


@torch.no_grad()
def merged_state(module: nn.Module, *, skip: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name without adapters, `merged_tensor`) of all parameters and buffers except `skip`, one at a time."""
    for path, layer in plain_layers(module):
        own = layer.base_layer if isinstance(layer, LoraLinear | LoraExperts) else layer
        for kind, _ in [*own.named_parameters(recurse=False), *own.named_buffers(recurse=False)]:
            name = f"{path}.{kind}" if path else kind
            if name not in skip:
                yield name, merged_tensor(layer, kind)


@torch.no_grad()
def merged_copy(module: Module, *, device: torch.device | str | None = None) -> Module:
    """A copy with `merged_state` in ordinary layers; `device` None keeps each tensor's device."""
    memo: dict[int, Any] = {}
    for _, layer in plain_layers(module):
        if isinstance(layer, LoraLinear) or is_bitsandbytes(layer):
            memo[id(layer)] = copy.deepcopy(_plain(layer).to(device))  # one by one: a device holds one layer twice
            continue
        if isinstance(layer, LoraExperts):
            memo[id(layer)] = layer.plain(memo).to(device)
            continue
        # deepcopy takes an object's entry in the memo instead of copying the object.
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            value = tensor.detach().to(device or tensor.device, copy=True)
            memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    twin = copy.deepcopy(module, memo)
    forget_quantizer(twin)
    return twin


@torch.no_grad()
def merge_lora(policy: Policy) -> None:
    """Merge the policy's adapters into its weights, in place; all weights become trainable."""
    module = policy.module
    for path, layer in list(module.named_modules()):
        if isinstance(layer, LoraExperts):
            module.set_submodule(path, layer.plain({}))
        elif not path.endswith(".base_layer") and (isinstance(layer, LoraLinear) or is_bitsandbytes(layer)):
            module.set_submodule(path, _plain(layer))
    forget_quantizer(module)
    module.requires_grad_(True)
    policy.lora = None


def _plain(layer: Any) -> nn.Linear:
    """An ordinary layer for an adapted or low-bit one; it shares the bias."""
    return linear_of(merged_tensor(layer, "weight"), getattr(layer, "base_layer", layer).bias)


def forget_quantizer(module: nn.Module) -> None:
    """Drop transformers' marks of a bitsandbytes module, whose weights are now ordinary."""
    for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        vars(module).pop(name, None)
    vars(getattr(module, "config", module)).pop("quantization_config", None)


@torch.no_grad()
def own_tensors(module: nn.Module, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """A module's parameters and persistent buffers, adapters merged; a tied tensor under its first name."""
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    seen: set[int] = set()
    found = {}
    for name, tensor in merged_state(module, skip=transient(module)):
        if id(tensor) in seen:
            continue
        seen |= own & {id(tensor)}  # a merged tensor is new: its id may return after it is freed
        found[name] = tensor if device is None else tensor.detach().to(device)  # its own holds one extra tensor
    return found


def transient(module: nn.Module) -> set[str]:
    """Names of the buffers that no checkpoint contains."""
    names: set[str] = set()
    for path, layer in module.named_modules():
        stem = f"{path}." if path else ""  # the module itself has no path
        names |= {f"{stem}{name}" for name in layer._non_persistent_buffers_set}
    return names


@torch.no_grad()
def host_copy(module: Module, *, keep: bool = True) -> Module:
    """A copy on the host, adapters unmerged, by all processes of a sharded module together; None without `keep`."""
    layers = module.sharding.plain if hasattr(module, "sharding") else module
    memo: dict[int, Any] = {}
    tensors = chain(module.parameters(), module.buffers())
    for tensor, place in zip(tensors, chain(layers.parameters(), layers.buffers()), strict=True):
        value = whole(tensor.detach())  # the device holds one gathered tensor at a time
        if keep:  # deepcopy takes an object's entry in the memo instead of copying the object
            value = value.to("cpu", copy=True)
            memo[id(place)] = nn.Parameter(value, tensor.requires_grad) if isinstance(place, nn.Parameter) else value
    if not keep:
        return None
    found = copy.deepcopy(layers, memo)
    for path, layer in adapted_layers(module).items():
        found.get_submodule(path).calls = layer.calls  # `plain` was copied before training began
    return found
