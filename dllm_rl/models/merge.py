"""A module's tensors with adapters merged, for checkpoints and weight syncs. Custom modules are supported too."""

import copy
from collections.abc import Container, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl.models.base import Module, Policy, gather_if_sharded
from dllm_rl.models.checkpoint.tensors import LazyTensor
from dllm_rl.models.lora import (
    LoraExperts,
    LoraLinear,
    adapted_layers,
    base_of,
    is_adapted_or_low_bit,
    is_bitsandbytes,
    linear_of,
    plain_weight,
    replace_layer,
)


def has_adapted_or_low_bit(module: nn.Module) -> bool:
    """Return whether a layer of the module has adapters or bitsandbytes weights."""
    return any(map(is_adapted_or_low_bit, module.modules()))


def plain_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return names and layers. A layer with adapters appears once, without its inner layers."""
    inner_names = {f"{path}.{name}" for path in adapted_layers(module) for name in ("base_layer", "lora_A", "lora_B")}
    return ((name, layer) for name, layer in module.named_modules() if name not in inner_names)


def layers_of(module: Module) -> Module:
    """Return the module or, if it is sharded, a module with the same layers and without weights."""
    return module.sharding.plain if hasattr(module, "sharding") else module


def merged_tensor(layer: Any, kind: str) -> Tensor:
    """Return the layer's parameter or buffer `kind`, with adapters merged and bitsandbytes weights dequantized.

    It is differentiable in the adapters.
    """
    if isinstance(layer, LoraExperts):
        return layer.merged(kind)
    if kind == "weight" and is_adapted_or_low_bit(layer):
        return layer.merged() if isinstance(layer, LoraLinear) else plain_weight(layer)
    return getattr(base_of(layer), kind)


@torch.no_grad()
def merged_tensors(
    module: nn.Module, skip: Container[str] = (), persistent_only: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor's name in a module without adapters, and its `merged_tensor`, one at a time.

    Args:
        module: Module, with or without adapters.
        skip: Names to leave out.
        persistent_only: Leave out buffers that a checkpoint does not store.
    """
    for path, layer in plain_layers(module):
        base = base_of(layer)
        left_out = base._non_persistent_buffers_set if persistent_only else ()
        for kind, _ in [*base.named_parameters(recurse=False), *base.named_buffers(recurse=False)]:
            name = f"{path}.{kind}" if path else kind
            if name not in skip and kind not in left_out:
                yield name, merged_tensor(layer, kind)


@torch.no_grad()
def lazy_merged_tensors(module: nn.Module) -> dict[str, LazyTensor]:
    """Return a checkpoint's tensors under the names of `merged_tensors`. They are computed when they are written."""
    tensors = {}
    for path, layer in plain_layers(module):
        base = base_of(layer)
        for kind, tensor in [*base.named_parameters(recurse=False), *base.named_buffers(recurse=False)]:
            if kind in base._non_persistent_buffers_set:
                continue
            shape, dtype = tuple(tensor.shape), tensor.dtype
            if kind == "weight" and is_bitsandbytes(base):  # the tensor itself contains integer codes
                shape = (base.out_features, base.in_features)
                dtype = getattr(getattr(tensor, "quant_state", None), "dtype", torch.float32)
            compute = torch.no_grad()(partial(merged_tensor, layer, kind))
            tensors[f"{path}.{kind}" if path else kind] = LazyTensor(shape, dtype, compute)
    return tensors


@torch.no_grad()
def merged_copy(module: Module, *, device: torch.device | str | None = None) -> Module:
    """Return a copy of the module with merged weights in ordinary layers.

    `device` is the device of the copy; with None each tensor keeps its device.
    """
    memo: dict[int, Any] = {}  # deepcopy uses an object's entry in the memo instead of copying the object
    for _, layer in plain_layers(module):
        if is_adapted_or_low_bit(layer):
            memo[id(layer)] = _plain(layer, memo).to(device)  # layer by layer: at most one layer is in memory twice
            continue
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            memo[id(tensor)] = _as_same_kind(tensor, tensor.detach().to(device or tensor.device, copy=True))
    merged = copy.deepcopy(module, memo)
    forget_quantizer(merged)
    return merged


@torch.no_grad()
def merge_lora(policy: Policy) -> None:
    """Merge the policy's adapters into its weights, in place. All weights become trainable.

    Call it to train the full weights after adapters, or before `add_lora` with new ones.
    """
    module = policy.module
    memo = {id(tensor): tensor for tensor in module.parameters()}  # so that `_plain` does not copy biases
    for _, layer in list(plain_layers(module)):
        if is_adapted_or_low_bit(layer):
            replace_layer(module, layer, _plain(layer, memo))
    forget_quantizer(module)
    module.requires_grad_(True)
    policy.lora = None


def _plain(layer: Any, memo: dict[int, Any]) -> nn.Module:
    """Convert a layer with adapters or low-bit weights to an ordinary layer with the merged weights.

    `memo` is a memo of deepcopy.
    """
    if isinstance(layer, LoraExperts):
        return layer.plain(memo)
    return linear_of(merged_tensor(layer, "weight"), copy.deepcopy(base_of(layer).bias, memo))


def _as_same_kind(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value`, as a Parameter if `tensor` is one."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def forget_quantizer(module: nn.Module) -> None:
    """Remove the attributes by which transformers recognizes a bitsandbytes module: its weights are now ordinary."""
    for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        vars(module).pop(name, None)
    vars(getattr(module, "config", module)).pop("quantization_config", None)


@torch.no_grad()
def merged_state_dict(module: nn.Module, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Return a module's parameters and persistent buffers, with adapters merged.

    A tied tensor appears once, under its first name.
    """
    module_ids = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    seen: set[int] = set()
    tensors = {}
    for name, tensor in merged_tensors(module, persistent_only=True):
        if id(tensor) in seen:
            continue
        seen |= module_ids & {id(tensor)}  # not of merged tensors: after they are freed, their ids may be reused
        tensors[name] = tensor if device is None else tensor.detach().to(device)  # one extra tensor at a time
    return tensors


@torch.no_grad()
def host_copy(module: Module, *, keep: bool = True) -> Module | None:
    """Return a copy of the module on the CPU, with its adapters not merged. With keep=False return None.

    For a sharded module this is a collective: every process must call it. Processes that need no copy pass keep=False.
    """
    layers = layers_of(module)
    memo: dict[int, Any] = {}
    tensors = chain(module.parameters(), module.buffers())
    layer_tensors = chain(layers.parameters(), layers.buffers())
    for tensor, layer_tensor in zip(tensors, layer_tensors, strict=True):
        value = gather_if_sharded(tensor.detach())  # one by one: the device holds at most one gathered tensor
        if keep:
            memo[id(layer_tensor)] = _as_same_kind(tensor, value.to("cpu", copy=True))
    if not keep:
        return None
    copied = copy.deepcopy(layers, memo)
    for path, layer in adapted_layers(module).items():
        # `layers` of a sharded module was made before training, so that its counts are stale.
        copied.get_submodule(path).calls = layer.calls
    return copied
