"""Key-value caches for unmasking: exact for block-causal attention, approximate for full attention."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from dllm_rl.device import send
from dllm_rl.models.base import Policy, block_ranks, position_ids


@dataclass(frozen=True)
class Cache:
    """Settings of a key-value cache: which columns are stored while a block is unmasked, and for how many steps.

    `block_cache`, `prefix_cache` and `dual_cache` create it.

    Args:
        kind: "block" stores the earlier blocks, which is exact under block-causal attention; "prefix" stores the
            columns before the block; "dual" stores the columns before and after the block.
        refresh: Number of steps after which an approximate cache is recomputed within a block. None: only at its start.
    """

    kind: Literal["block", "prefix", "dual"]
    refresh: int | None = None

    def __post_init__(self) -> None:
        if self.refresh is not None and self.refresh < 1:
            raise ValueError(f"refresh={self.refresh} must be at least 1 step, or None for once a block")

    def check(self, attention: str) -> None:
        if (self.kind == "block") != (attention == "block_causal"):
            approximate = "prefix_cache() or dual_cache(), which are approximate"
            fit = "block_cache()" if attention == "block_causal" else approximate
            raise ValueError(f"cache={self} is not for {attention!r} attention; use None or {fit}")


def block_cache() -> Cache:
    """Store the keys and values of finished blocks, which never change: the exact cache of block-causal models.

    Use it for block-causal policies; `prefix_cache` and `dual_cache` are for full attention.
    """
    return Cache("block")


def prefix_cache(*, refresh: int | None = None) -> Cache:
    """Store the keys and values before the block as of the block's first step (Fast-dLLM's prefix cache). APPROXIMATE.

    Use it with full attention to sample faster if the mismatch is acceptable. refresh=1 is exact.

    Args:
        refresh: Number of steps after which the cache is recomputed within a block. None: only at its start.

    Source: Fast-dLLM, arXiv 2505.22618 [paper].
    """
    return Cache("prefix", refresh)


def dual_cache(*, refresh: int | None = None) -> Cache:
    """Store the keys and values before and after the block (Fast-dLLM's dual cache). APPROXIMATE.

    Use it with full attention where the masks after the block are many; `prefix_cache` recomputes these in every step.

    Args:
        refresh: Number of steps after which the cache is recomputed within a block. None: only at its start.

    Source: Fast-dLLM, arXiv 2505.22618 [paper].
    """
    return Cache("dual", refresh)


class KeysAndValues(DynamicCache):
    """A cache that stores keys in the dtype of the values.

    Rotary embeddings and autocast leave fp32 keys next to 16-bit values.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return super().update(key_states.to(value_states.dtype), value_states, layer_idx, *args, **kwargs)


class CachedStates:
    """The keys and values of a batch. `advance` computes a block's states from the fewest rows and columns."""

    def __init__(self, policy: Policy, cache: Cache, attention_mask: Bool[Tensor, "B T"]) -> None:
        self.policy = policy
        self.cache = cache
        self.attention_mask = attention_mask
        self.positions = position_ids(attention_mask)
        self.kept = torch.arange(0)  # columns whose keys and values are in `past`
        self.rows = torch.arange(len(attention_mask))
        self.past: KeysAndValues | None = None  # of `rows`, from the first forward on
        self.whole: tuple[Any, Tensor] | None = None  # block-causal: cache and rows at the block's start
        self.columns: tuple[int, int] | None = None
        self.step = 0

    def advance(
        self, tokens: Int[Tensor, "B T"], rows: Int[Tensor, " R"], columns: tuple[int, int], *, alike: int = 1
    ) -> tuple[Float[Tensor, "r W D"], int]:
        """Return states of the block `columns` = [start, end) for `rows`, and the first state's column.

        There are r = R / `alike` rows of states.
        """
        self.step = 0 if columns != self.columns else self.step + 1
        self.columns = columns
        # A shifted family reads a block's first state one column to its left, which therefore is part of the block.
        start = max(0, columns[0] - self.policy.spec.shift)
        fresh, keep = self._begin_step(start, columns[1], tokens.shape[1])
        if self.past is not None and len(rows) < len(self.rows):  # rows may leave, and return in the next block
            (wanted,) = send(tokens.device, torch.isin(self.rows, rows).nonzero()[:, 0])
            self.past = mapped(self.past, lambda x: x[wanted])
        self.rows = rows
        first = int(fresh[0]) + self.policy.spec.shift
        states = self._forward(tokens, rows[::alike], fresh, keep)
        if alike > 1 and self.past is not None:  # every run of `alike` rows is the same: one forward served the run
            self.past = mapped(self.past, lambda x: x.repeat_interleave(alike, dim=0))
        if self.cache.kind == "block" and self.step == 0:
            self.whole = self.past, rows  # rows that end early leave `past`, and return with the next block
        return states, first

    def _begin_step(self, start: int, end: int, width: int) -> tuple[Int[Tensor, " F"], Int[Tensor, " C"]]:
        """Return the columns that run in this step, and the columns whose keys and values are stored after it.

        Restore or drop stored keys where a block starts.
        """
        everything = torch.arange(width)
        if self.cache.kind == "block":
            if self.step == 0 and self.whole is not None:
                self.past, self.rows = self.whole
            return everything[len(self.kept) : end], everything[:start]
        refresh = self.cache.refresh
        if self.step == 0 or (refresh is not None and self.step % refresh == 0):
            self.past = None
            self.kept = everything[:0]
            after = everything[end:] if self.cache.kind == "dual" else everything[:0]
            return everything, torch.cat([everything[:start], after])
        # A prefix cache runs the columns after the block in every step; a dual cache stores them.
        return everything[start : None if self.cache.kind == "prefix" else end], self.kept

    def _forward(self, tokens: Tensor, rows: Tensor, fresh: Tensor, keep: Tensor) -> Tensor:
        """Run the `fresh` columns against the stored ones and themselves, then store only `keep`; all on the host."""
        module = self.policy.module
        seen = torch.cat([self.kept, fresh])
        here, new, columns = send(tokens.device, rows, fresh, seen)
        # The model appends the fresh keys to its cache: to a copy, so that the stored ones do not change.
        past = KeysAndValues(config=module.config) if self.past is None else mapped(self.past, lambda x: x)
        positions = self.positions[here]
        mask = attention_bias(self.policy, tokens[here], self.attention_mask[here], positions, new, columns)
        states = self.policy.encode(tokens[here][:, new], mask, positions[:, new], cache=past, use_cache=True)
        if past.get_seq_length() != len(seen):
            raise ValueError(f"cache={self.cache}: {type(module).__name__} keeps no keys and values; use cache=None")
        if self.past is None or len(keep) != len(self.kept):
            # Keys contain their positions, so the order in which they are stored does not matter.
            (wanted,) = send(tokens.device, torch.isin(seen, keep).nonzero()[:, 0])
            self.past = mapped(past, lambda x: x[:, :, wanted])
            self.kept = keep
        return states


def attention_bias(
    policy: Policy,
    tokens: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    positions: Int[Tensor, "B T"],
    fresh: Int[Tensor, " F"],
    seen: Int[Tensor, " C"],
) -> Float[Tensor, "B 1 F C"]:
    """Return the additive mask of fresh columns over seen ones: 0 where a query may look, else the lowest number."""
    allowed = attention_mask[:, None, seen].expand(-1, len(fresh), -1)
    if policy.spec.attention == "block_causal":
        key, query = block_ranks(policy.spec, tokens, positions)
        allowed = allowed & (key[:, None, seen] <= query[:, fresh, None])
    dtype = next(policy.module.parameters()).dtype
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def mapped(past: KeysAndValues, f: Callable[[Tensor], Tensor]) -> KeysAndValues:
    """Return the same cache with other keys and values, without changing `past`."""
    layers: list[Any] = [copy.copy(layer) for layer in past.layers]
    for layer in layers:
        layer.keys = f(layer.keys)
        layer.values = f(layer.values)
    cache = copy.copy(past)
    cache.layers = layers
    return cache
