"""The last block computes its output only where somebody reads it.

What a model returns at a position that nobody reads is work for nothing. Up to the last block others attend to it, and
of that block to its key and value; all else there treats every position by itself, so that leaving some out changes no
other one: the same sums, in products of fewer rows, filled up to as many as it takes for the same last bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import missing_rows
from dllm_rl.models.recompute import backbone_of

Places: TypeAlias = tuple[Int[Tensor, " K"], Int[Tensor, " K"]]


@contextmanager
def last_block_at(policy: Policy, places: Places | None) -> Iterator[None]:
    """Forwards inside run the family's `pointwise` layers of the last block at K places alone, rows and columns of the
    model's input; what is returned elsewhere means nothing. Where a forward is differentiated no place is named twice.
    None: everywhere.

    All is run, too, where the family names no such layer, where a block is compiled (every number of places would be
    compiled anew) and where it is run again in the backward, when nobody says any more what is read.
    """
    if places is None:
        yield
        return
    hooks: list[Any] = []
    for layer in _layers(policy):
        read = _Read(places)
        hooks += [layer.register_forward_pre_hook(read.before), layer.register_forward_hook(read.after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layers(policy: Policy) -> list[Any]:
    again = policy.gradient_checkpointing and torch.is_grad_enabled()
    if not policy.spec.pointwise or again or not isinstance(policy.module, nn.Module):
        return []
    lists = [part for part in backbone_of(policy.module).children() if isinstance(part, nn.ModuleList)]
    if not lists or (last := lists[-1][-1])._compiled_call_impl is not None:
        return []
    return [layer for name, layer in last.named_modules() if name in policy.spec.pointwise]


class _Read:
    """Owns which rows of one layer's input are run, for the time of one forward."""

    def __init__(self, places: Places) -> None:
        self.rows, self.columns = places
        self.shape: tuple[int, ...] = ()

    def before(self, _: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        self.shape = tuple(x.shape[:2])
        read = x[self.rows, self.columns]
        return (F.pad(read, (0, 0, 0, missing_rows(len(read))))[None],)

    def after(self, _: Any, __: Any, out: Tensor) -> Tensor:
        whole = out.new_zeros(*self.shape, out.shape[-1])
        return whole.index_put((self.rows, self.columns), out[0, : len(self.rows)])


def predicting(
    policy: Policy, attention_mask: Bool[Tensor, "R W"], rows: Int[Tensor, " K"], columns: Int[Tensor, " K"]
) -> Int[Tensor, " K"]:
    """The columns of a model's input whose states are what `policy.hidden` gives at these rows and columns."""
    if not policy.spec.shift:
        return columns
    before = (columns > 0) & attention_mask[rows, columns - 1]  # a row's first token has only its own state
    return columns - before.long()
