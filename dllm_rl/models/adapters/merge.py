"""Adapters merged into the weights beside them."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl.models.adapters.experts import LoraExperts
from dllm_rl.models.adapters.linear import LoraLinear, adapted_layers, is_bitsandbytes, plain_weight
from dllm_rl.models.base import Module, Policy


def has_extras(module: nn.Module) -> bool:
    """Whether the module holds anything but ordinary layers: adapters, or bitsandbytes weights."""
    return bool(adapted_layers(module)) or any(is_bitsandbytes(layer) for layer in module.modules())


@torch.no_grad()
def merged_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all parameters and buffers under the names that they have without adapters, one at a time.

    Adapters are merged and bitsandbytes weights dequantised; everything else is the module's own tensor, not a copy.
    """
    for path, layer in module.named_modules():
        if re.search(r"\.(base_layer|lora_A|lora_B)$", path):
            continue
        own = layer.base_layer if isinstance(layer, LoraLinear | LoraExperts) else layer
        for kind, tensor in [*own.named_parameters(recurse=False), *own.named_buffers(recurse=False)]:
            if isinstance(layer, LoraExperts):
                tensor = layer.merged(kind)
            elif kind == "weight" and own is not layer:
                tensor = layer.merged()
            elif kind == "weight" and is_bitsandbytes(own):
                tensor = plain_weight(own)
            yield f"{path}.{kind}" if path else kind, tensor


@torch.no_grad()
def merged_copy(module: Module, *, device: torch.device | str | None = None) -> Module:
    """A copy of the module, on another device where one is given, that holds `merged_state` in ordinary layers.

    One layer after the other: its own device holds at most one of them a second time.
    """
    memo: dict[int, Any] = {}
    for path, layer in module.named_modules():
        if re.search(r"\.(base_layer|lora_A|lora_B)$", path):
            continue
        if isinstance(layer, LoraLinear) or is_bitsandbytes(layer):
            memo[id(layer)] = copy.deepcopy(_plain(layer).to(device))
            continue
        if isinstance(layer, LoraExperts):
            memo[id(layer)] = layer.plain(memo).to(device)
            continue
        # deepcopy takes what the memo holds for an object instead of copying it.
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
    """Turn the policy's adapters into part of its weights, in place; all of them are trainable again."""
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
    """An ordinary layer in place of one with an adapter or in few bits; the bias is the layer's own."""
    base = getattr(layer, "base_layer", layer)
    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    plain.weight = nn.Parameter(layer.merged() if base is not layer else plain_weight(layer), requires_grad=False)
    plain.bias = base.bias
    return plain


def forget_quantizer(module: nn.Module) -> None:
    """Drop what transformers sets on a module that bitsandbytes quantised: its weights are ordinary ones."""
    for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        vars(module).pop(name, None)
    vars(getattr(module, "config", module)).pop("quantization_config", None)
