"""The tensors of a module with its adapters merged: for copies, files and host memory."""

import copy
from collections.abc import Iterator, Sequence
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
    all_paths,
    base_of,
    is_adapted_or_low_bit,
    is_of_peft,
    layers_of,
    plain_layers,
    with_product,
)
from dllm_rl.models.low_bit import is_bitsandbytes, linear_of, plain_weight


def merged_tensor(layer: Any, kind: str) -> Tensor:
    """Return the layer's parameter or buffer `kind`, with adapters merged and bitsandbytes weights dequantized.

    It is differentiable in the adapters of this library.
    """
    if isinstance(layer, LoraExperts):
        return layer.merged(kind)
    if is_of_peft(layer):  # merged by peft, in a copy: of DoRA and other kinds only peft knows how
        merged = copy.deepcopy(layer)
        if not layer.disable_adapters:
            merged.merge()
        return getattr(merged.base_layer, kind).detach()
    if kind == "weight" and isinstance(layer, LoraLinear):
        return layer.merged()
    return plain_weight(layer) if kind == "weight" and is_bitsandbytes(layer) else getattr(base_of(layer), kind)


@torch.no_grad()
def joined_weights(layers: Sequence[Any]) -> Tensor:
    """Return the `merged_tensor` "weight" of linear layers of one shape, gathered if sharded, one below the other.

    This library's adapters, which must have the same settings, are merged together but for the products: a batched
    product may round otherwise than that of one layer.
    """
    if len(layers) == 1:
        return gather_if_sharded(merged_tensor(layers[0], "weight"))
    if not isinstance(layers[0], LoraLinear):
        return torch.cat([gather_if_sharded(merged_tensor(layer, "weight")) for layer in layers])
    weights = torch.stack([plain_weight(layer.base_layer) for layer in layers])
    products = torch.stack([layer.lora_B.weight.float() @ layer.lora_A.weight.float() for layer in layers])
    return with_product(weights, products, layers[0].lora).flatten(0, 1)


@torch.no_grad()
def merged_tensors(module: nn.Module, persistent_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor's name in a module without adapters, and its `merged_tensor`, one at a time.

    With `persistent_only`, leave out the buffers that a checkpoint does not store.
    """
    for name, tensor in lazy_merged_tensors(module, persistent_only).items():
        yield name, tensor.make()


@torch.no_grad()
def lazy_merged_tensors(module: nn.Module, persistent_only: bool = True) -> dict[str, LazyTensor]:
    """Return the tensors of `merged_tensors` by name. They are computed when they are written."""
    tensors = {}
    for path, layer in plain_layers(module):
        base = base_of(layer)
        for kind, tensor in [*base.named_parameters(recurse=False), *base.named_buffers(recurse=False)]:
            if persistent_only and kind in base._non_persistent_buffers_set:
                continue
            shape, dtype = tuple(tensor.shape), tensor.dtype
            if kind == "weight" and is_bitsandbytes(base):  # the tensor itself contains integer codes
                shape = (base.out_features, base.in_features)
                dtype = getattr(getattr(tensor, "quant_state", None), "dtype", base.plain_dtype)
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
    paths_of = all_paths(module)
    for _, layer in list(plain_layers(module)):
        if is_adapted_or_low_bit(layer):
            merged_layer = _plain(layer, memo)
            for path in paths_of[layer]:
                module.set_submodule(path, merged_layer)
    forget_quantizer(module)
    module.requires_grad_(True)
    policy.lora = None


def _plain(layer: Any, memo: dict[int, Any]) -> nn.Module:
    """Convert a layer with adapters or low-bit weights to an ordinary layer with the merged weights.

    `memo` is a memo of deepcopy.
    """
    if isinstance(layer, LoraExperts):
        return layer.plain(memo)
    return linear_of(merged_tensor(layer, "weight"), merged_bias(layer, memo))


def merged_bias(layer: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of the bias of a linear layer, with adapters merged; None without one. `memo` is of deepcopy."""
    bias = base_of(layer).bias
    if bias is not None and is_of_peft(layer):  # peft may have an adapter on it
        bias = nn.Parameter(merged_tensor(layer, "bias"), requires_grad=False)
    return copy.deepcopy(bias, memo)


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
def host_copy(policy: Policy, *, keep: bool = True) -> Policy:
    """Return a copy of the policy whose module is on the CPU, with its adapters not merged.

    For a sharded module this is a collective: every process must call it. Processes that need no copy pass keep=False,
    and get the policy itself.
    """
    module = policy.module
    layers = layers_of(module)
    memo: dict[int, Any] = {}
    tensors = chain(module.parameters(), module.buffers())
    layer_tensors = chain(layers.parameters(), layers.buffers())
    for tensor, layer_tensor in zip(tensors, layer_tensors, strict=True):
        value = gather_if_sharded(tensor.detach())  # one by one: the device holds at most one gathered tensor
        if keep:
            memo[id(layer_tensor)] = _as_same_kind(tensor, value.to("cpu", copy=True))
    if not keep:
        return policy
    copied = copy.copy(policy)
    copied.module = copy.deepcopy(layers, memo)
    for path, layer in adapted_layers(module).items():
        # `layers` of a sharded module was made before training, so that its counts are stale.
        copied.module.get_submodule(path).calls = layer.calls
    return copied
