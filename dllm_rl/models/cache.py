"""What a model stores of the columns that it ran, so that later columns attend to these without running them again."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class ColumnCache(Protocol):
    """The interface of a cache: `FamilySpec.new_cache` makes one, and the family's `encode` appends columns to it.

    The samplers choose rows and columns of its tensors, which have the rows on the first axis and the columns on the
    second to last one: keys (B, heads, S, D), or a latent state (B, S, D). `encode` must not write into the tensors
    that are stored: it appends by making new ones.
    """

    def tensors(self) -> list[Tensor]:
        """Return the stored tensors; an empty list before the first forward."""

    def set_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Store these tensors, as many as `tensors` returned and in its order. The cache may be a new one."""


class TokenCache:
    """The cache of a module that stores no keys and values: it stores the tokens, and all columns run again.

    Autoregressive sampling works with it; the caches of `Unmask` do not.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None  # (B, S)

    def append(self, tokens: Tensor) -> Tensor:
        """Store the tokens of new columns, and return those of all columns."""
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=1)
        return self.tokens

    def tensors(self) -> list[Tensor]:
        return [] if self.tokens is None else [self.tokens[..., None]]

    def set_tensors(self, tensors: Sequence[Tensor]) -> None:
        (tokens,) = tensors
        self.tokens = tokens[..., 0]


def default_cache(module: Any) -> ColumnCache:
    """Return an empty cache: of keys and values for a module with a config of transformers, else of tokens."""
    config = getattr(module, "config", None)
    if not hasattr(config, "get_text_config"):
        return TokenCache()
    from dllm_rl.models.kv_cache import KVCache  # not at the top: transformers takes half a second to import

    return KVCache(config=config)
