"""Keys and values of a forward. The samplers import this module on first use: transformers takes half a second."""

from torch import Tensor
from transformers import DynamicCache


class KVCache(DynamicCache):
    """A cache that stores keys in the dtype of the values.

    Rotary embeddings and autocast leave fp32 keys next to 16-bit values.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return super().update(key_states.to(value_states.dtype), value_states, layer_idx, *args, **kwargs)
