"""Autograd graphs that scoring leaves for the update."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor


class RetainedGraphs:
    """Autograd graphs of the forwards that score a rollout, so that an update does not run these forwards again.

    `LikelihoodEstimator.view_logprobs` adds graphs while there is room, and `LikelihoodEstimator.backward` frees them.

    Args:
        rows: Rows whose graphs are retained: those that the update trains on.
        limit: Largest number of forwards whose graphs are retained. None (default): one, and more while all graphs
            together keep at most about `MAX_BYTES`.
    """

    MAX_BYTES = 2**28

    def __init__(self, rows: Bool[Tensor, " B"], limit: int | None = None) -> None:
        self.rows = rows
        self.limit = limit
        self.logprobs: dict[Any, Tensor] = {}
        self.bytes_of: dict[int, int] = {}  # bytes of each storage that the graphs keep
        self.largest = 0  # most bytes that one graph added

    def has_room(self, num_forwards: int = 1) -> bool:
        """Return whether the graph of a view of so many forwards may be retained."""
        if self.limit is not None:
            return (len(self.logprobs) + 1) * num_forwards <= self.limit
        # A view of several forwards (`Renoise`) has all their graphs: only a limit allows it.
        has_bytes = not self.logprobs or sum(self.bytes_of.values()) + self.largest <= self.MAX_BYTES
        return has_bytes and num_forwards == 1

    def add(self, key: Any, score: Callable[[], Tensor], module: Any) -> Tensor:
        """Retain the graph of the log-probs `score()`, and return them without it. `module` has the weights, whose
        bytes do not count.
        """
        if self.limit is None and not self.logprobs:
            self.bytes_of = {weight.untyped_storage().data_ptr(): 0 for weight in module.parameters()}
            self.largest = 0

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            self.bytes_of.setdefault(storage.data_ptr(), storage.nbytes())
            return tensor.detach()  # the tensor itself may hold the graph that holds it

        before = sum(self.bytes_of.values())
        counted = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with torch.enable_grad(), counted if self.limit is None else nullcontext():
            logprobs = score()
        self.largest = max(self.largest, sum(self.bytes_of.values()) - before)
        if logprobs.requires_grad:  # it does not if nothing is scored
            self.logprobs[key] = logprobs
        return logprobs.detach()
