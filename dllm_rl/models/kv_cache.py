"""The cache of transformers' modules. `default_cache` imports this module on first use."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache


class KVCache(DynamicCache):
    """Keys and values of transformers' modules. Keys are stored in the dtype of the values.

    Rotary embeddings and autocast leave fp32 keys next to 16-bit values.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return super().update(key_states.to(value_states.dtype), value_states, layer_idx, *args, **kwargs)

    def tensors(self) -> list[Tensor]:
        """Return keys and values of the first layer, then of the second, and so on."""
        layers: list[Any] = self.layers
        return [x for layer in layers if layer.is_initialized for x in (layer.keys, layer.values)]

    def set_tensors(self, tensors: Sequence[Tensor]) -> None:
        all_layers: list[Any] = self.layers
        layers = [layer for layer in all_layers if layer.is_initialized] or all_layers
        for layer, keys, values in zip(layers, tensors[::2], tensors[1::2], strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
