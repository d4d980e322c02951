"""Key-value caches for unmasking: exact for block-causal attention, approximate for full attention.

docs/papers.md explains the tag [paper].
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.device import copy_to_device
from dllm_rl.models.base import Policy, block_ranks, position_ids
from dllm_rl.models.cache import ColumnCache
from dllm_rl.records import Record, option


class Cache(Record):
    """Settings of a key-value cache: which columns are stored while a block is unmasked, and for how many steps."""

    @property
    def kind(self) -> Literal["block", "prefix", "dual"]:
        """Which columns are stored: earlier blocks, the columns before the block, or before and after it."""
        raise TypeError("Cache is the base of BlockCache, PrefixCache and DualCache")

    @property
    def refresh(self) -> int | None:
        """Number of steps after which the cache is recomputed within a block. None: only at its start."""
        return None

    def check_attention(self, attention: str) -> None:
        """Raise ValueError if the cache is not for models with this attention."""
        if (self.kind == "block") != (attention == "block_causal"):
            approximate = "PrefixCache() or DualCache(), which are approximate"
            alternative = "BlockCache()" if attention == "block_causal" else approximate
            raise ValueError(f"cache={self} is not for {attention!r} attention; use None or {alternative}")


class BlockCache(Cache):
    """Store the keys and values of finished blocks, which never change: the exact cache of block-causal models.

    Use it for block-causal policies; `PrefixCache` and `DualCache` are for full attention.
    """

    kind = "block"


class PrefixCache(Cache):
    """Store the keys and values of the columns before the block, computed in its first step. APPROXIMATE.

    Use it with full attention to evaluate faster. In training its error would add to the mismatch between the sampler's
    log-probs and the learner's. With refresh=1 it is exact.

    Args:
        refresh: Number of steps after which the cache is recomputed within a block. None: only at its start.

    Source: the prefix cache of Fast-dLLM, arXiv 2505.22618 [paper].
    """

    refresh: int | None = option(default=None, at_least=1)
    kind = "prefix"


class DualCache(Cache):
    """Store the keys and values of the columns before and after the block, computed in its first step. APPROXIMATE.

    Use it with full attention if many masks follow the block; `PrefixCache` recomputes these masks in every step.

    Args:
        refresh: Number of steps after which the cache is recomputed within a block. None: only at its start.

    Source: the dual cache of Fast-dLLM, arXiv 2505.22618 [paper].
    """

    refresh: int | None = option(default=None, at_least=1)
    kind = "dual"


class CachedForward:
    """The forward of a batch with a cache: `advance` runs only the columns whose keys and values are not stored."""

    def __init__(self, policy: Policy, cache: Cache, attention_mask: Bool[Tensor, "B T"]) -> None:
        self.policy = policy
        self.cache = cache
        self.attention_mask = attention_mask
        self.positions = position_ids(attention_mask)
        self.cached_columns = torch.arange(0)  # columns whose keys and values are in `past`
        self.rows = torch.arange(len(attention_mask))  # rows of `past`
        self.column_cache: ColumnCache  # the family's object, made where nothing is stored
        self.past: list[Tensor] = []  # of `column_cache`; empty before the first forward
        # Of a block-causal model: `past` and `rows` at the block's start.
        self.block_start: tuple[list[Tensor], Tensor] | None = None
        self.columns: tuple[int, int] | None = None  # columns of the current block
        self.step = 0  # step in the current block

    def advance(
        self,
        tokens: Int[Tensor, "B T"],
        rows: Int[Tensor, " R"],
        columns: tuple[int, int],
        *,
        run: Int[Tensor, " r"],
        copies: Int[Tensor, " R"] | None,
    ) -> tuple[Float[Tensor, "r W D"], int]:
        """Return the states of the columns that run, for a step of the block `columns` = [start, end), and their start.

        Of the R rows, only `run` is run; row number i equals row copies[i] of these. None: all run.
        """
        self.step = 0 if columns != self.columns else self.step + 1
        self.columns = columns
        # With `spec.shift` the state one column to the left predicts the block's first token: this column runs too.
        start = max(0, columns[0] - self.policy.spec.shift)
        query_columns, columns_to_store = self._begin_step(start, columns[1], tokens.shape[1])
        if self.past and len(rows) < len(self.rows):  # rows may leave, and return in the next block
            (index,) = copy_to_device(tokens.device, torch.isin(self.rows, rows).nonzero()[:, 0])
            self.past = [x[index] for x in self.past]
        self.rows = rows
        first = int(query_columns[0]) + self.policy.spec.shift
        states = self._forward(tokens, run, query_columns, columns_to_store)
        if copies is not None:  # the rows that were not run are copies
            (index,) = copy_to_device(tokens.device, copies)
            self.past = [x[index] for x in self.past]
        if self.cache.kind == "block" and self.step == 0:
            # Rows that finish the block early leave `past`, and return with the next block.
            self.block_start = self.past, rows
        return states, first

    def _begin_step(self, start: int, end: int, width: int) -> tuple[Int[Tensor, " Q"], Int[Tensor, " C"]]:
        """Return the columns that run in this step, and the columns whose keys and values are stored after it.

        Restore or drop stored keys where a block starts.
        """
        all_columns = torch.arange(width)
        if self.cache.kind == "block":
            if self.step == 0 and self.block_start is not None:
                self.past, self.rows = self.block_start
            return all_columns[len(self.cached_columns) : end], all_columns[:start]
        refresh = self.cache.refresh
        if self.step == 0 or (refresh is not None and self.step % refresh == 0):
            self.past = []
            self.cached_columns = all_columns[:0]
            after = all_columns[end:] if self.cache.kind == "dual" else all_columns[:0]
            return all_columns, torch.cat([all_columns[:start], after])
        # A prefix cache runs the columns after the block in every step; a dual cache stores them.
        return all_columns[start : None if self.cache.kind == "prefix" else end], self.cached_columns

    def _forward(self, tokens: Tensor, rows: Tensor, query_columns: Tensor, columns_to_store: Tensor) -> Tensor:
        """Run `query_columns`, which also attend to the stored columns. Then store only `columns_to_store`.

        All indices are on the host.
        """
        module = self.policy.module
        key_columns = torch.cat([self.cached_columns, query_columns])
        device_rows, query_index, key_index = copy_to_device(tokens.device, rows, query_columns, key_columns)
        if self.past:
            self.column_cache.set_tensors(self.past)  # to which the model appends; the tensors of `past` do not change
        else:
            self.column_cache = self.policy.spec.new_cache(module)
        cache = self.column_cache
        row_tokens, positions = tokens[device_rows], self.positions[device_rows]
        attention_mask = self.attention_mask[device_rows]
        bias = attention_bias(self.policy, row_tokens, attention_mask, positions, query_index, key_index)
        query_tokens, query_positions = row_tokens[:, query_index], positions[:, query_index]
        states = self.policy.encode(query_tokens, bias, query_positions, cache=cache)
        stored = cache.tensors()
        has_window = any(getattr(layer, "sliding_window", None) for layer in getattr(cache, "layers", ()))
        if has_window or not stored or any(x.shape[-2] != len(key_columns) for x in stored):
            why = "has layers with a sliding window" if stored else "keeps no keys and values"
            raise ValueError(f"cache={self.cache}: {type(module).__name__} {why}; use cache=None")
        if not self.past or len(columns_to_store) != len(self.cached_columns):
            # Keys contain their positions, so that the order in which they are stored does not matter.
            is_stored = torch.isin(key_columns, columns_to_store)
            (index,) = copy_to_device(tokens.device, is_stored.nonzero()[:, 0])
            self.past = [x[..., index, :] for x in stored]
            self.cached_columns = columns_to_store
        cache.set_tensors(self.past)  # the memory of the other columns is free again
        return states


def attention_bias(
    policy: Policy,
    tokens: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    positions: Int[Tensor, "B T"],
    query_columns: Int[Tensor, " Q"],
    key_columns: Int[Tensor, " K"],
) -> Float[Tensor, "B 1 Q K"]:
    """Return the additive attention mask of the queries at `query_columns` over the keys of `key_columns`."""
    may_attend = attention_mask[:, None, key_columns].expand(-1, len(query_columns), -1)
    if policy.spec.attention == "block_causal":
        key_rank, query_rank = block_ranks(policy.spec, tokens, positions)
        may_attend = may_attend & (key_rank[:, None, key_columns] <= query_rank[:, query_columns, None])
    dtype = next(policy.module.parameters()).dtype
    bias = torch.zeros(may_attend.shape, dtype=dtype, device=may_attend.device)
    return bias.masked_fill(~may_attend, torch.finfo(dtype).min)[:, None]
