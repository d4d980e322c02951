"""Adapters merged into the weights."""

import copy
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl.models.adapters.experts import LoraExperts
from dllm_rl.models.adapters.linear import LoraLinear, adapted_layers, is_bitsandbytes, linear_of, plain_weight
from dllm_rl.models.base import Module, Policy


def has_extras(module: nn.Module) -> bool:
    """Whether the module has adapters or bitsandbytes weights."""
    return bool(adapted_layers(module)) or any(is_bitsandbytes(layer) for layer in module.modules())


def plain_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers, without the parts of adapted layers."""
    return ((n, m) for n, m in module.named_modules() if not n.endswith((".base_layer", ".lora_A", ".lora_B")))


def merged_tensor(layer: Any, kind: str) -> Tensor:
    """A layer's parameter or buffer, adapters merged (differentiable) and bitsandbytes weights dequantised; any other
    tensor is the layer's own, not a copy."""
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
    """A copy with `merged_state` in ordinary layers; `device` None keeps each tensor's device. The copy is made layer
    by layer, so the module's own device holds at most one layer twice."""
    memo: dict[int, Any] = {}
    for _, layer in plain_layers(module):
        if isinstance(layer, LoraLinear) or is_bitsandbytes(layer):
            memo[id(layer)] = copy.deepcopy(_plain(layer).to(device))
            continue
        if isinstance(layer, LoraExperts):
            memo[id(layer)] = layer.plain(memo).to(device)
            continue
        # deepcopy takes an object's entry in the memo instead of copying the object.
        for parameter in layer.parameters(recurse=False):
            memo[id(parameter)] = nn.Parameter(_copied(parameter, device), requires_grad=parameter.requires_grad)
        for buffer in layer.buffers(recurse=False):
            memo[id(buffer)] = _copied(buffer, device)
    twin = copy.deepcopy(module, memo)
    forget_quantizer(twin)
    return twin


def _copied(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    return tensor.detach().to(device or tensor.device, copy=True)


def merge_lora(policy: Policy) -> None:
    """Merge the policy's adapters into its weights, in place; all weights become trainable."""
    _merge(policy.module)
    policy.module.requires_grad_(True)
    policy.lora = None


@torch.no_grad()
def _merge(module: Module) -> None:
    for path, layer in list(module.named_modules()):
        if isinstance(layer, LoraExperts):
            module.set_submodule(path, layer.plain({}))
        elif not path.endswith(".base_layer") and (isinstance(layer, LoraLinear) or is_bitsandbytes(layer)):
            module.set_submodule(path, _plain(layer))
    forget_quantizer(module)


def _plain(layer: Any) -> nn.Linear:
    """An ordinary layer for an adapted or low-bit one; it shares the bias."""
    return linear_of(merged_tensor(layer, "weight"), getattr(layer, "base_layer", layer).bias)


def forget_quantizer(module: nn.Module) -> None:
    """Drop transformers' marks of a bitsandbytes module, whose weights are now ordinary."""
    for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        vars(module).pop(name, None)
    vars(getattr(module, "config", module)).pop("quantization_config", None)
