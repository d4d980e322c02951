"""The hidden states that a step reads; rows of similar length run together."""

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from dllm_rl.device import send
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.buckets import length_buckets
from dllm_rl.models.forward.routing import Routing, of_tokens
from dllm_rl.samplers.cache import Cache, CachedStates
from dllm_rl.samplers.canvas import Canvas


class States:
    """Owns which rows of a canvas run together, and each bucket's keys and values, where there is a cache.

    steps  per block and row: the forwards over which a cached bucket's padding is spread
    """

    def __init__(self, policy: Policy, canvas: Canvas, cache: Cache | None, steps: Int[Tensor, "B N"]) -> None:
        self.policy, self.canvas = policy, canvas
        forwards = 1 if cache is None else int(steps.max())
        self.buckets = length_buckets(canvas.starts, canvas.tokens.shape[1], policy.device, forwards=forwards)
        self.bucket = torch.zeros_like(canvas.starts)
        self.caches = []
        for number, bucket in enumerate(self.buckets):
            self.bucket[bucket.rows] = number
            seen = canvas.attention_mask[:, bucket.start :]
            self.caches.append(None if cache is None else CachedStates(policy, cache, seen))

    def __call__(
        self, rows: Int[Tensor, " R"], block: int, counts: Int[Tensor, " R"], r: Tensor, columns: Tensor, *, alike: int
    ) -> tuple[Float[Tensor, "K D"], Integer[Tensor, "K M E"] | None]:
        """The states of K positions, and the experts of each where the policy records them. The positions are `columns`
        (K,) of the r-th (K,) of rows, row by row, both on the device.

        rows, counts  rows that take part, on the host, and how many of the K positions each has
        block         of the first row, and of all rows where there is a cache
        alike         every run of `alike` rows is the same: one forward serves the run
        """
        owner = self.bucket[rows]
        numbers = owner.unique().tolist()
        if len(numbers) == 1:
            found = self._run(numbers[0], rows, block, alike, r, columns)
            return found[0], found[1] if len(found) > 1 else None
        members = [(owner == number).nonzero()[:, 0] for number in numbers]
        within = torch.empty_like(rows)  # the place of each row in its bucket
        for here in members:
            within[here] = torch.arange(len(here))
        of = owner.repeat_interleave(counts)
        within, *places = send(r.device, within, *((of == number).nonzero()[:, 0] for number in numbers))
        joined: list[Tensor] = []
        for number, here, place in zip(numbers, members, places, strict=True):
            found = self._run(number, rows[here], block, alike, within[r[place]], columns[place])
            joined = joined or [x.new_empty(len(r), *x.shape[1:]) for x in found]
            for whole, part in zip(joined, found, strict=True):
                whole[place] = part
        return joined[0], joined[1] if len(joined) > 1 else None

    def _run(self, number: int, rows: Tensor, block: int, alike: int, r: Tensor, columns: Tensor) -> list[Tensor]:
        """As `__call__`, for rows of one bucket: the states (K, D) and, if recorded, the experts (K, M, E)."""
        if not self.policy.records_experts:
            hidden, first = self._forward(number, rows, block, alike)
            parts = [hidden]
        else:
            with Routing(self.policy.module) as routing:
                hidden, first = self._forward(number, rows, block, alike)
            experts = routing.experts(len(hidden))
            # A cache gives the states as they are; without one they lie at the tokens that they predict.
            parts = [hidden, of_tokens(self.policy, experts) if self.caches[number] is None else experts]
        return [x[r // alike, (columns - first).clamp(min=0)] for x in parts]

    def _forward(self, number: int, rows: Tensor, block: int, alike: int) -> tuple[Float[Tensor, "r W D"], int]:
        """The states of all columns that run, and the canvas's column that the first state predicts."""
        canvas, start, cached = self.canvas, self.buckets[number].start, self.caches[number]
        if cached is None:
            (seen,) = send(self.policy.device, rows[::alike])
            return self.policy.hidden(canvas.tokens[seen, start:], canvas.attention_mask[seen, start:]), start
        begin, end = canvas.bounds[block]
        bounds = (begin - start, end - start)
        hidden, first = cached.advance(canvas.tokens[:, start:], rows, bounds, alike=alike)
        return hidden, first + start
