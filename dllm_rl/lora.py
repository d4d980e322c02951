"""Low-rank adapters: put on, taken off for the reference, merged for the rollout and for saving. peft is imported only where
adapters are made; everything else recognises them by their parts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that carry adapters, by name."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "base_layer") and hasattr(layer, "lora_A")}


@torch.no_grad()
def merged_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight and persistent buffer under the names of the adapter-free module."""
    yield from module.state_dict().items()
