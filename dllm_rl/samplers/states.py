"""The forward of a sampler: the states of the positions that a step may write.

Rows of similar length run together, and a cache stores keys and values between the steps of a block.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.device import send
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.buckets import length_buckets
from dllm_rl.models.forward.routing import Routing, of_tokens
from dllm_rl.samplers.cache import Cache, CachedStates
from dllm_rl.samplers.canvas import Canvas, RolloutField, Turn


class States:
    """The forward of a canvas: which rows run together, and each bucket's keys and values if there is a cache."""

    def __init__(self, policy: Policy, canvas: Canvas, cache: Cache | None, steps: Int[Tensor, "B N"]) -> None:
        self.policy = policy
        self.canvas = canvas
        forwards = 1 if cache is None else int(steps.max())  # over which a cached bucket's padding is spread
        self.buckets = length_buckets(canvas.starts, canvas.tokens.shape[1], policy.device, forwards=forwards)
        self.bucket = torch.zeros_like(canvas.starts)
        self.caches = []
        for number, bucket in enumerate(self.buckets):
            self.bucket[bucket.rows] = number
            seen = canvas.attention_mask[:, bucket.start :]
            self.caches.append(None if cache is None else CachedStates(policy, cache, seen))

    def __call__(self, turn: Turn) -> Float[Tensor, "K D"]:
        """Return the states of the turn's K positions, and count a forward."""
        # In the first step all completions of a prompt are the same: one forward serves the group.
        alike = self.canvas.prompts.group_size if self.canvas.forwards == 0 else 1
        self.canvas.forwards += 1
        owner = self.bucket[turn.rows]
        numbers = owner.unique().tolist()
        if len(numbers) == 1:
            found = self._run(numbers[0], turn, turn.rows, alike, turn.row, turn.column)
        else:
            found = self._join(numbers, owner, turn, alike)
        if len(found) > 1:
            turn.notes["experts"] = (None, found[1], 0)
        return found[0]

    def rollout_fields(self) -> dict[str, RolloutField]:
        """Return the fields of a `Rollout` that the forwards have recorded so far, for the completion's places."""
        return {"experts": self.canvas.noted.get("experts")}

    def _join(self, numbers: list[int], owner: Int[Tensor, " R"], turn: Turn, alike: int) -> list[Tensor]:
        """Run each bucket separately. Results are in the order of the turn's positions. `owner` is on the host."""
        members = {number: (owner == number).nonzero()[:, 0] for number in numbers}
        within = torch.empty_like(turn.rows)  # the index of each row in its bucket
        for rows in members.values():
            within[rows] = torch.arange(len(rows))
        owner_of_position = owner.repeat_interleave(turn.num_positions)
        positions = [(owner_of_position == number).nonzero()[:, 0] for number in numbers]
        within, *positions = send(turn.row.device, within, *positions)
        joined: list[Tensor] = []
        for (number, rows), here in zip(members.items(), positions, strict=True):
            found = self._run(number, turn, turn.rows[rows], alike, within[turn.row[here]], turn.column[here])
            if not joined:
                joined = [part.new_empty(len(turn.row), *part.shape[1:]) for part in found]
            for whole, part in zip(joined, found, strict=True):
                whole[here] = part
        return joined

    def _run(
        self, number: int, turn: Turn, rows: Int[Tensor, " R"], alike: int, row: Int[Tensor, " K"], column: Tensor
    ) -> list[Tensor]:
        """Return the states (K, D) and, if recorded, the experts (K, M, E). `row` indexes `rows` for each position."""
        block = int(turn.blocks[0])  # with a cache all rows are in the same block; without one nothing reads it
        if not self.policy.records_experts:
            hidden, first = self._forward(number, rows, block, alike)
            parts = [hidden]
        else:
            with Routing(self.policy.module) as routing:
                hidden, first = self._forward(number, rows, block, alike)
            experts = routing.experts(len(hidden))
            # A cache returns states that are not shifted; without one a state is at the token that it predicts.
            parts = [hidden, of_tokens(self.policy, experts) if self.caches[number] is None else experts]
        return [part[row // alike, (column - first).clamp(min=0)] for part in parts]

    def _forward(self, number: int, rows: Tensor, block: int, alike: int) -> tuple[Float[Tensor, "r W D"], int]:
        """Return the states of all columns that run, and the canvas's column that the first state predicts."""
        canvas = self.canvas
        start = self.buckets[number].start
        cached = self.caches[number]
        if cached is None:
            (seen,) = send(self.policy.device, rows[::alike])
            return self.policy.hidden(canvas.tokens[seen, start:], canvas.attention_mask[seen, start:]), start
        begin, end = canvas.bounds[block]
        bounds = (begin - start, end - start)
        hidden, first = cached.advance(canvas.tokens[:, start:], rows, bounds, alike=alike)
        return hidden, first + start
