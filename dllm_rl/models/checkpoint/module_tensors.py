"""The tensors of any module, one of the user's own included: what is saved of it, and put back."""

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
    """A module's parameters and lasting buffers, adapters merged; a tied tensor under its first name.

    device  where they go, one by one as they are merged, so that the module's own device holds one more and not all;
            None: where they are.
    """
    skip, found, seen = transient(module), {}, set()
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}  # what is merged is new, and passes
    for name, tensor in merged_state(module):
        if name in skip or id(tensor) in seen:
            continue
        seen |= own & {id(tensor)}
        found[name] = tensor if device is None else tensor.detach().to(device)
    return found


@torch.no_grad()
def load_tensors(module: nn.Module, folder: Path) -> None:
    """Put a folder's tensors into the module whose `own_tensors` they are. Raises ValueError where they are not."""
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
    """Names of the buffers that no checkpoint holds."""
    return {f"{path}.{name}" for path, layer in module.named_modules() for name in layer._non_persistent_buffers_set}


@torch.no_grad()
def host_copy(module: Module) -> Module:
    """A copy of a module that this process holds whole, on the host; the device holds no tensor more."""
    memo: dict[int, Any] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        value = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(module, memo)


@torch.no_grad()
def gathered(module: Module, *, keep: bool) -> Module:
    """A sharded module, whole, on the host, adapters as they are: all processes call it together, and get it where they
    `keep` it. The device holds one tensor whole at a time."""
    memo: dict[int, Any] = {}
    tensors, plain = (chain(each.parameters(), each.buffers()) for each in (module, module.sharding.plain))
    for tensor, place in zip(tensors, plain, strict=True):
        value = whole(tensor.detach())
        if keep:  # deepcopy takes what the memo holds for an object instead of copying it
            value = value.to("cpu", copy=True)
            memo[id(place)] = nn.Parameter(value, tensor.requires_grad) if isinstance(place, nn.Parameter) else value
    if not keep:
        return None
    found = copy.deepcopy(module.sharding.plain, memo)
    for path, layer in adapted_layers(module).items():
        found.get_submodule(path).calls = layer.calls
    return found
