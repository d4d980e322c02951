"""The tensors of any module, custom ones included: what a checkpoint saves and loads."""

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dllm_rl.models.adapters.linear import adapted_layers
from dllm_rl.models.adapters.merge import merged_state
from dllm_rl.models.base import Module, whole
from dllm_rl.models.checkpoint.tensors import misfits, read_tensors
from dllm_rl.models.untrusted import check_regular


@torch.no_grad()
def own_tensors(module: nn.Module, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
    """A module's parameters and persistent buffers, adapters merged; a tied tensor under its first name.

    device  receives each tensor as it is merged, so that the module's device holds one extra tensor; None: no move.
    """
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    seen: set[int] = set()
    found = {}
    for name, tensor in merged_state(module, skip=transient(module)):
        if id(tensor) in seen:
            continue
        seen |= own & {id(tensor)}  # a merged tensor is new: its id may return after it is freed
        found[name] = tensor if device is None else tensor.detach().to(device)
    return found


@torch.no_grad()
def load_tensors(module: nn.Module, folder: Path) -> None:
    """Copy a folder's tensors into the module's `own_tensors`. Raises ValueError on other names or shapes."""
    check_regular(folder)
    state = read_tensors(folder)
    own = own_tensors(module)
    if odd := misfits(state, own):
        raise ValueError(
            f"{folder}: tensors {odd[:3]} do not fit {type(module).__name__}; make the module that they were saved from"
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])


def transient(module: nn.Module) -> set[str]:
    """Names of the buffers that no checkpoint contains."""
    names: set[str] = set()
    for path, layer in module.named_modules():
        stem = f"{path}." if path else ""  # the module itself has no path
        names |= {f"{stem}{name}" for name in layer._non_persistent_buffers_set}
    return names


@torch.no_grad()
def host_copy(module: Module, *, keep: bool = True) -> Module:
    """A copy of a module on the host, adapters unmerged; None without `keep`. All processes of a sharded module call it
    together. The device holds one gathered tensor at a time."""
    layers = module.sharding.plain if hasattr(module, "sharding") else module
    memo: dict[int, Any] = {}
    tensors = chain(module.parameters(), module.buffers())
    for tensor, place in zip(tensors, chain(layers.parameters(), layers.buffers()), strict=True):
        value = whole(tensor.detach())
        if keep:  # deepcopy takes an object's entry in the memo instead of copying the object
            value = value.to("cpu", copy=True)
            memo[id(place)] = nn.Parameter(value, tensor.requires_grad) if isinstance(place, nn.Parameter) else value
    if not keep:
        return None
    found = copy.deepcopy(layers, memo)
    for path, layer in adapted_layers(module).items():
        found.get_submodule(path).calls = layer.calls  # `plain` was copied before training began
    return found
