"""The forward of `Unmask`: the hidden states of the positions that a step may write.

Rows of similar length run together (buckets), and a cache stores keys and values between the steps of a block.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.device import copy_to_device
from dllm_rl.models.base import Policy, length_buckets
from dllm_rl.models.forward.routing import Routing, to_token_columns
from dllm_rl.samplers.cache import Cache, CachedForward
from dllm_rl.samplers.canvas import Canvas, RolloutField, StepPlan


class SamplerForward:
    """The forward of a canvas. It has the rows of each bucket and, with a cache, the bucket's keys and values."""

    def __init__(self, policy: Policy, canvas: Canvas, cache: Cache | None, steps: Int[Tensor, "B N"]) -> None:
        self.policy = policy
        self.canvas = canvas
        # Every step calls the model. Without a cache every step also computes the padding. With a cache only a block's
        # first step does, so that the cost of the calls counts more.
        num_forwards = 1 if cache is None else int(steps.max())
        self.buckets = length_buckets(canvas.starts, canvas.tokens.shape[1], policy.device, forwards=num_forwards)
        self.bucket_of_row = torch.zeros_like(canvas.starts)
        self.caches = []
        for number, bucket in enumerate(self.buckets):
            self.bucket_of_row[bucket.rows] = number
            attention_mask = canvas.attention_mask[:, bucket.start :]
            self.caches.append(None if cache is None else CachedForward(policy, cache, attention_mask))

    def __call__(self, plan: StepPlan) -> Float[Tensor, "K D"]:
        """Return the hidden states of the plan's K positions, and count a forward."""
        # In the first step all completions of a prompt are the same: one row is run for each group.
        is_first = self.canvas.forwards == 0
        self.canvas.forwards += 1
        row_buckets = self.bucket_of_row[plan.rows]
        bucket_numbers = row_buckets.unique().tolist()
        if len(bucket_numbers) == 1:
            outputs = self._run(bucket_numbers[0], plan, plan.rows, is_first, plan.row_index, plan.column)
        else:
            outputs = self._run_buckets(bucket_numbers, row_buckets, plan, is_first)
        if len(outputs) > 1:
            plan.records["experts"] = (None, outputs[1], 0)
        return outputs[0]

    def rollout_fields(self) -> dict[str, RolloutField]:
        """Return the forwards' records so far as fields of a `Rollout`, for the completions' positions (B, L)."""
        return {"experts": self.canvas.records.get("experts")}

    def _run_buckets(
        self, bucket_numbers: list[int], row_buckets: Int[Tensor, " R"], plan: StepPlan, is_first: bool
    ) -> list[Tensor]:
        """Run each bucket separately, and return results in the order of the plan's positions.

        `row_buckets` has the bucket of each row, on the host.
        """
        bucket_rows = {number: (row_buckets == number).nonzero()[:, 0] for number in bucket_numbers}
        row_in_bucket = torch.empty_like(plan.rows)
        for rows in bucket_rows.values():
            row_in_bucket[rows] = torch.arange(len(rows))
        position_buckets = row_buckets.repeat_interleave(plan.num_positions)
        bucket_positions = [(position_buckets == number).nonzero()[:, 0] for number in bucket_numbers]
        row_in_bucket, *bucket_positions = copy_to_device(plan.row_index.device, row_in_bucket, *bucket_positions)
        joined: list[Tensor] = []
        for (number, rows), positions in zip(bucket_rows.items(), bucket_positions, strict=True):
            row, column = row_in_bucket[plan.row_index[positions]], plan.column[positions]
            outputs = self._run(number, plan, plan.rows[rows], is_first, row, column)
            if not joined:
                joined = [output.new_empty(len(plan.row_index), *output.shape[1:]) for output in outputs]
            for joined_output, output in zip(joined, outputs, strict=True):
                joined_output[positions] = output
        return joined

    def _run(
        self,
        number: int,
        plan: StepPlan,
        rows: Int[Tensor, " R"],
        is_first: bool,
        row: Int[Tensor, " K"],
        column: Tensor,
    ) -> list[Tensor]:
        """Return the states (K, D) and, if recorded, the experts (K, M, E). `row` has indices in `rows`."""
        run, copies = self.canvas.prompts.shared_rows(rows) if is_first else (rows, None)
        if len(run) == len(rows):  # no rows are equal
            copies = None
        block = int(plan.blocks[0])  # with a cache all rows are in the same block; without one nothing reads it
        if not self.policy.records_experts:
            hidden, first_column = self._forward(number, rows, run, copies, block)
            outputs = [hidden]
        else:
            with Routing(self.policy.module) as routing:
                hidden, first_column = self._forward(number, rows, run, copies, block)
            experts = routing.experts(len(hidden))
            # With a cache the states are not shifted; without one a state is at the token that it predicts.
            outputs = [hidden, to_token_columns(self.policy, experts) if self.caches[number] is None else experts]
        if copies is not None:
            row = copies.to(row.device)[row]
        return [output[row, (column - first_column).clamp(min=0)] for output in outputs]

    def _forward(
        self, number: int, rows: Tensor, run: Tensor, copies: Tensor | None, block: int
    ) -> tuple[Float[Tensor, "r W D"], int]:
        """Return the states of all columns that run, and the canvas's column that the first state predicts.

        Of `rows`, only `run` is run; row number i equals row copies[i] of these. None: all run.
        """
        canvas = self.canvas
        start = self.buckets[number].start
        cached = self.caches[number]
        if cached is None:
            (device_rows,) = copy_to_device(self.policy.device, run)
            hidden = self.policy.hidden(canvas.tokens[device_rows, start:], canvas.attention_mask[device_rows, start:])
            return hidden, start
        begin, end = canvas.bounds[block]
        bounds = (begin - start, end - start)
        hidden, first_column = cached.advance(canvas.tokens[:, start:], rows, bounds, run=run, copies=copies)
        return hidden, first_column + start
