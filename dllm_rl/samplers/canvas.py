"""State of the unmasking loop: the canvas on the device, the counts of masks on the host, and the plan of a step.

L is the number of positions of a completion. An offset is the index of a position in its completion, from 0.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dllm_rl.device import copy_to_device
from dllm_rl.models.base import Policy
from dllm_rl.rng import uniforms
from dllm_rl.samplers.rules import steps_per_block
from dllm_rl.types import BatchRecord, Prompts, Rollout, SamplingParams

# Streams of random numbers (`rng.uniforms`): one draws tokens, the other is for ranks and commit rules.
TOKEN_STREAM = 0
RANK_STREAM = 1
RolloutField = BatchRecord | Tensor | None  # an optional field of a rollout


@dataclass
class Canvas:
    """The batch as the model sees it (B, T), and the records of the completions' positions (B, L).

    Args:
        prompts: Prompts of the batch.
        tokens: Prompts, written tokens and masks.
        attention_mask: False on padding.
        columns: Column in T of each position.
        block: Block of each position.
        bounds: First column and end of each block. Only caches read them.
        starts: Column of each row's first non-padding token, on the host.
        pad_id: Token id of padding.
        mask_id: Token id of the mask.
        pad_finished: Whether the masks of rows that stopped early become padding in the rollout.
        events: Every write and remasking, if the commit rule rewrites tokens; `revise.packed_events` explains the
            entries. None: the rule does not rewrite.
        infill_mask: For infilling, the columns of the completion, including those inside the prompt. Rows may then have
            fewer than L positions: the remaining offsets are never masked, and their `columns` have no meaning. None:
            no infilling.

    Attributes:
        masked: Positions that are masked.
        unmask_step: Step that wrote each position; -1 if masked.
        logprobs: Log-prob of each written token, in nats.
        records: Records (B, L, ...) of optional features, by name; see `store`.
        fills: Fill value of each record, by name: its value at positions without a record.
        finished: Rows that stopped early.
        forwards: Number of model calls.
    """

    prompts: Prompts
    tokens: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    columns: Int[Tensor, "B L"]
    block: Int[Tensor, "B L"]
    bounds: list[tuple[int, int]]
    starts: Int[Tensor, " B"]
    pad_id: int
    mask_id: int
    pad_finished: bool
    masked: Bool[Tensor, "B L"] = field(init=False)
    unmask_step: Int[Tensor, "B L"] = field(init=False)
    logprobs: Float[Tensor, "B L"] = field(init=False)
    records: dict[str, Tensor] = field(init=False, default_factory=dict)
    fills: dict[str, int] = field(init=False, default_factory=dict)
    finished: Bool[Tensor, " B"] = field(init=False)
    forwards: int = 0
    events: list[tuple[Tensor, ...]] | None = None
    infill_mask: Bool[Tensor, "B T"] | None = None

    def __post_init__(self) -> None:
        self.masked = torch.ones_like(self.columns, dtype=torch.bool)
        if self.infill_mask is not None:
            offsets = torch.arange(self.columns.shape[1], device=self.columns.device)
            self.masked = offsets < self.infill_mask.sum(-1, keepdim=True)
        self.unmask_step = torch.full_like(self.columns, -1)
        self.logprobs = torch.zeros(self.columns.shape, device=self.columns.device)
        self.finished = torch.zeros(len(self.columns), dtype=torch.bool, device=self.columns.device)

    def write(self, rows: Tensor, offsets: Tensor, steps: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """Commit tokens at these rows and offsets; all arguments have one entry per written position."""
        self.tokens[rows, self.columns[rows, offsets]] = tokens
        # A tensor of False, because the host would wait until a Python False is copied to the GPU.
        self.masked[rows, offsets] = torch.zeros_like(rows, dtype=torch.bool)
        self.logprobs[rows, offsets] = logprobs
        self.unmask_step[rows, offsets] = steps
        if self.events is not None:
            self.events.append((rows, offsets, steps, tokens, logprobs))

    def apply_step(self, plan: "StepPlan", writes: "StepWrites") -> None:
        """Write the tokens of a step, mask again the positions that it remasks, and store the plan's records."""
        if (remasked := writes.decision.remasked) is not None:
            self.remask(*plan.rows_and_offsets(remasked), plan.row_steps[remasked])
        chosen, drawn = writes.chosen, writes.drawn
        self.write(*plan.rows_and_offsets(chosen), plan.row_steps[chosen], drawn.tokens, drawn.logprobs)
        for name, (index, values, fill) in plan.records.items():
            if index is None:  # values cover all K candidates; keep the chosen ones
                index, values = chosen, values[chosen]
            self.store(name, *plan.rows_and_offsets(index), values, fill)

    def store(self, name: str, rows: Tensor, offsets: Tensor, values: Shaped[Tensor, "K *C"], fill: int = 0) -> None:
        """Store an optional feature's values at these positions. `fill` is the value of positions without a record."""
        if name not in self.records:
            self.records[name] = values.new_full((*self.masked.shape, *values.shape[1:]), fill)
            self.fills[name] = fill
        self.records[name][rows, offsets] = values

    def remask(self, rows: Tensor, offsets: Tensor, steps: Tensor) -> None:
        """Mask written positions again; all arguments have one entry per position."""
        assert self.events is not None, "remasking needs a rule that rewrites"
        zeros = torch.zeros_like(rows, dtype=self.logprobs.dtype)
        self.events.append((rows, offsets, steps, torch.full_like(rows, -1), zeros))
        self.tokens[rows, self.columns[rows, offsets]] = torch.full_like(rows, self.mask_id)
        self.masked[rows, offsets] = torch.ones_like(rows, dtype=torch.bool)
        self.logprobs[rows, offsets] = zeros
        self.unmask_step[rows, offsets] = torch.full_like(rows, -1)
        for name, values in self.records.items():
            values[rows, offsets] = torch.full_like(values[rows, offsets], self.fills[name])

    def completions(self) -> Int[Tensor, "B L"]:
        return self.tokens.gather(-1, self.columns)

    def mark_finished(self, rows: Tensor, eos_ids: tuple[int, ...]) -> Tensor:
        """Mark as finished those of `rows` (on the host) that have written an end token. Return them, on the host."""
        eos, device_rows = copy_to_device(self.tokens.device, torch.tensor(eos_ids, dtype=torch.long), rows)
        has_eos = (torch.isin(self.completions()[device_rows], eos) & ~self.masked[device_rows]).any(-1)
        self.finished[device_rows] |= has_eos
        return rows[has_eos.cpu()]

    def rollout(self, sampling_params: SamplingParams, weights_version: int, **fields: RolloutField) -> Rollout:
        """Return the rollout so far. Its columns are those of the prompts, followed by those of the completions.

        With infilling, its columns are those of the canvas, because prompts contain written positions too. `fields` are
        optional fields of the rollout, for the completions' positions (B, L).
        """
        if self.infill_mask is not None:
            tokens = self.tokens.clone()
            attention_mask = self.attention_mask.clone()
        else:
            prompts, device = self.prompts, self.tokens.device
            is_padding = self.masked & self.finished[:, None] & self.pad_finished
            completions = self.completions().masked_fill(is_padding, self.pad_id)
            tokens = torch.cat([prompts.tokens.to(device), completions], dim=1)
            attention_mask = torch.cat([prompts.attention_mask.to(device), ~is_padding], dim=1)
        return Rollout(
            tokens=tokens,
            attention_mask=attention_mask,
            completion_mask=self._to_columns(~self.masked, False),
            unmask_step=self._to_columns(self.unmask_step, -1),
            logprobs=self._to_columns(self.logprobs, 0.0),
            group=self.prompts.group.to(self.tokens.device),
            weights_version=weights_version,
            sampling_params=sampling_params,
            forwards=self.forwards,
            **{name: self._field_to_columns(value) for name, value in fields.items()},
        )

    def _field_to_columns(self, value: RolloutField) -> Any:
        """Apply `_to_columns` to an optional field of a rollout."""
        if not isinstance(value, BatchRecord):
            return None if value is None else self._to_columns(value, 0)
        changes = {}
        for name, tensor in vars(value).items():
            if isinstance(tensor, Tensor):
                changes[name] = self._to_columns(tensor, value.FILL.get(name, 0))
        return replace(value, **changes)

    def _to_columns(self, values: Shaped[Tensor, "B L *C"], fill: bool | int | float) -> Shaped[Tensor, "B T *C"]:
        """Return values of the completions' positions at their columns, and `fill` at the other columns."""
        if self.infill_mask is None:
            width = self.prompts.tokens.shape[1]
            return F.pad(values, (*(0, 0) * (values.dim() - 2), width, 0), value=fill)
        offset = (self.infill_mask.long().cumsum(-1) - 1).clamp(min=0)
        add_axes = (..., *[None] * (values.dim() - 2))  # as many axes as `values` has
        gathered = values.gather(1, offset[add_axes].expand(*offset.shape, *values.shape[2:]))
        return torch.where(self.infill_mask[add_axes], gathered, torch.full_like(gathered, fill))


def make_canvas(policy: Policy, prompts: Prompts, length: int, block_size: int, *, block_aligned: bool) -> Canvas:
    """Return a canvas of prompts, each followed by `length` masks.

    With `block_aligned` (a block-causal policy with a cache), each block has the same columns in all rows.
    """
    spec = policy.spec
    device = policy.device
    assert spec.mask_id is not None, "a diffusion model has a mask token"
    prompt_tokens, prompt_mask = prompts.tokens.cpu(), prompts.attention_mask.cpu()
    num_rows = len(prompt_mask)
    # Only block-causal blocks count from the prompt's first token.
    prompt_sizes = prompt_mask.sum(-1) if spec.attention == "block_causal" else torch.zeros(num_rows, dtype=torch.long)
    block_offsets = prompt_sizes % block_size  # a block-causal completion begins inside its prompt's last block
    full_blocks = prompt_sizes // block_size
    block = (block_offsets[:, None] + torch.arange(length)) // block_size
    if block_aligned:  # prompts are padded by complete blocks
        blocks_start = int(full_blocks.max()) * block_size
        columns = blocks_start + block_offsets[:, None] + torch.arange(length)
        starts = blocks_start - full_blocks * block_size
        tokens = torch.full((num_rows, int(columns.max()) + 1), policy.pad_id)
        attention_mask = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, prompt in enumerate(prompt_tokens):
            prompt_columns = slice(int(starts[row]), int(starts[row] + prompt_sizes[row]))
            tokens[row, prompt_columns] = prompt[prompt_mask[row]]
            attention_mask[row, prompt_columns] = True
    else:
        blocks_start = prompts.tokens.shape[1]
        columns = (blocks_start + torch.arange(length)).expand(num_rows, -1)
        zeros = torch.zeros(columns.shape, dtype=torch.long)
        tokens = torch.cat([prompt_tokens, zeros], dim=1)
        attention_mask = torch.cat([prompt_mask, zeros.bool()], dim=1)
    width = tokens.shape[1]
    tokens.scatter_(-1, columns, torch.full_like(columns, spec.mask_id))
    attention_mask.scatter_(-1, columns, torch.ones_like(columns, dtype=torch.bool))
    return Canvas(
        prompts=prompts,
        tokens=tokens.to(device),
        attention_mask=attention_mask.to(device),
        columns=columns.contiguous().to(device),
        block=block.to(device),
        bounds=[(start, min(start + block_size, width)) for start in range(blocks_start, width, block_size)],
        starts=attention_mask.long().argmax(-1),
        pad_id=policy.pad_id,
        mask_id=spec.mask_id,
        pad_finished=spec.attention == "block_causal",
    )


@dataclass(frozen=True)
class StepPlan:
    """One step of R rows, each in its current block. The step may write K candidate positions, listed row by row.

    Attributes:
        rows: Rows of the canvas, on the host.
        blocks: Current block of each row, on the host.
        num_masked: Number of masked positions in each block, on the host.
        steps_left: Remaining steps of each block, including this one, on the host.
        num_positions: Number of the K positions that each row has, on the host.
        steps_left_on_device: Copy of `steps_left` on the device.
        total_steps: Total steps of each block, on the device.
        masked: Masked positions of the blocks.
        written: Written positions that the step may rewrite. None: the rule does not rewrite.
        row_index: Index in `rows` of each position's row.
        offset: Offset of each position in its completion.
        canvas_row: Row of each position in the canvas.
        column: Column of each position in the canvas.
        seed: Seed of each position's row.
        row_steps: Number of steps in which each position's row has taken part.
        records: Records of optional features, by name: the indices among the K positions (None: all), the values, and
            the fill value of `Canvas.store`.
    """

    rows: Int[Tensor, " R"]
    blocks: Int[Tensor, " R"]
    num_masked: Int[Tensor, " R"]
    steps_left: Int[Tensor, " R"]
    num_positions: Int[Tensor, " R"]
    steps_left_on_device: Int[Tensor, " R"]
    total_steps: Int[Tensor, " R"]
    masked: Bool[Tensor, "R L"]
    written: Bool[Tensor, "R L"] | None
    row_index: Int[Tensor, " K"]
    offset: Int[Tensor, " K"]
    canvas_row: Int[Tensor, " K"]
    column: Int[Tensor, " K"]
    seed: Int[Tensor, " K"]
    row_steps: Int[Tensor, " K"]
    records: dict[str, tuple[Tensor | None, Tensor, int]] = field(default_factory=dict)

    def uniforms(self, stream: int, index: Int[Tensor, " C"] | slice = slice(None)) -> Float[Tensor, " C"]:
        """Return a number in [0, 1) for each of the K positions, or for those with these indices.

        The number depends only on the row's seed, the row's step and the offset.
        """
        return uniforms(self.seed[index], self.row_steps[index], self.offset[index], stream=stream)

    def rows_and_offsets(self, index: Int[Tensor, " C"]) -> tuple[Int[Tensor, " C"], Int[Tensor, " C"]]:
        """Return the canvas rows and the offsets of those of the K positions that have these indices."""
        return self.canvas_row[index], self.offset[index]

    def scatter_to_rows(self, values: Float[Tensor, " K"]) -> Float[Tensor, "R L"]:
        """Return values of the K positions at their rows and offsets, and -inf at the other positions."""
        out = torch.full(self.masked.shape, -torch.inf, device=values.device)
        out[self.row_index, self.offset] = values
        return out

    def positions_in(self, mask: Bool[Tensor, "R L"], count: int) -> Int[Tensor, " C"]:
        """Return the indices, among the K, of the positions that `mask` marks. `count` is their number.

        Because the host passes `count`, it does not wait for the device to count them.
        """
        return mask[self.row_index, self.offset].nonzero_static(size=count)[:, 0]


@dataclass(frozen=True)
class CommitDecision:
    """The decision of a commit rule in one step.

    Attributes:
        chosen: Positions that are written.
        num_chosen: Number of chosen positions of each row, on the host.
        net_unmasked: By how much the number of masked positions of each row decreases, on the host.
        remasked: Indices, among the K, of positions that are masked again. None: the rule never masks again.
        stays_open: Rows that stay in their block although nothing is masked, until its steps are used up. None: the
            rule does not rewrite.
    """

    chosen: Bool[Tensor, "R L"]
    num_chosen: Int[Tensor, " R"]
    net_unmasked: Int[Tensor, " R"]
    remasked: Int[Tensor, " M"] | None = None
    stays_open: Bool[Tensor, " R"] | None = None


class Drawn(NamedTuple):
    """Tokens drawn at K positions.

    Attributes:
        tokens: Token ids.
        logprobs: Log-probs under the sampling distribution, in nats.
        normalizer: Log-sum-exp of the logits that the rank reads. If the rank reads no normalizer: of the logits from
            which the token was drawn.
        log_mass: First result of `filter_support`. None without top_k and top_p.
        support: Second result of `filter_support`.
    """

    tokens: Int[Tensor, " K"]
    logprobs: Float[Tensor, " K"]
    normalizer: Float[Tensor, " K"]
    log_mass: Float[Tensor, " K"] | None = None
    support: Int[Tensor, "K C"] | None = None

    def at(self, index: Int[Tensor, " C"]) -> "Drawn":
        return Drawn(*(values[index] for values in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(values for values in self if values is not None)


@dataclass(frozen=True)
class StepWrites:
    """The positions and tokens that a step writes.

    Attributes:
        decision: Decision of the commit rule.
        chosen: Indices, among the plan's K positions, of those that are written.
        drawn: Tokens drawn at these positions.
    """

    decision: CommitDecision
    chosen: Int[Tensor, " C"]
    drawn: Drawn


class BlockTracker:
    """The number of masked positions and of remaining steps of each row and block.

    The counts are on the host, so that planning a step does not wait for the device.
    """

    def __init__(
        self,
        block: Int[Tensor, "B L"],
        diffusion_steps: int | None,
        *,
        wait_for_all_rows: bool,
        masked: Bool[Tensor, "B L"] | None = None,
    ) -> None:
        """Start with the positions of `masked` masked, and no step taken.

        Args:
            block: Block of each position.
            diffusion_steps: Number of steps per completion. None: one per position.
            wait_for_all_rows: Whether a row enters a block only when all rows have completed the block before.
            masked: Positions that begin masked. None: all.
        """
        block = block.cpu()
        is_masked = torch.ones_like(block) if masked is None else masked.cpu().long()
        self.wait_for_all_rows = wait_for_all_rows
        # The tensors below have one entry per row and block.
        no_masks = torch.zeros(len(block), int(block.max()) + 1, dtype=torch.long)
        self.num_masked = no_masks.scatter_add(-1, block, is_masked)
        unique_rows, index = self.num_masked.unique(dim=0, return_inverse=True)  # most rows have the same block sizes
        steps = torch.zeros_like(unique_rows)
        for row, sizes in enumerate(unique_rows):
            steps[row, sizes > 0] = torch.tensor(steps_per_block(diffusion_steps, sizes[sizes > 0].tolist()))
        self.steps_left = steps[index]
        self.sizes = self.num_masked.clone()
        self.total_steps = self.steps_left.clone()
        self.stays_open = torch.zeros_like(self.num_masked, dtype=torch.bool)
        self.row_steps = torch.zeros(len(block), dtype=torch.long)  # steps in which the row has taken part

    def next_rows(self) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"]]:
        """Return the rows of the next step and the current block of each row. No rows: all blocks are complete."""
        is_open = (self.num_masked > 0) | self.stays_open
        blocks = is_open.int().argmax(-1)
        takes_part = is_open.any(-1)
        if self.wait_for_all_rows and takes_part.any():
            takes_part &= blocks == blocks[takes_part].min()
        rows = takes_part.nonzero()[:, 0]
        return rows, blocks[rows]

    def record(
        self,
        rows_and_blocks: tuple[Tensor, Tensor],
        net_unmasked: Int[Tensor, " R"],
        stays_open: Bool[Tensor, " R"] | None = None,
    ) -> Int[Tensor, " C"]:
        """Record a step of these rows and blocks, and return the rows whose block is now complete.

        `net_unmasked` and `stays_open` are those of `CommitDecision`.
        """
        self.num_masked[rows_and_blocks] -= net_unmasked
        self.steps_left[rows_and_blocks] -= 1
        rows = rows_and_blocks[0]
        self.row_steps[rows] += 1
        if stays_open is not None:
            self.stays_open[rows_and_blocks] = stays_open & (self.steps_left[rows_and_blocks] > 0)
        return rows[(self.num_masked[rows_and_blocks] == 0) & ~self.stays_open[rows_and_blocks]]

    def finish_rows(self, rows: Int[Tensor, " C"]) -> None:
        """Remove rows that ended early from all later steps."""
        self.num_masked[rows] = 0
        self.stays_open[rows] = False


def plan_step(canvas: Canvas, tracker: BlockTracker, seeds: Int[Tensor, " B"]) -> StepPlan | None:
    """Return the rows and positions of the next step, or None if every block is complete."""
    rows, blocks = tracker.next_rows()
    if not len(rows):
        return None
    num_masked = tracker.num_masked[rows, blocks]
    # At least 1, because adaptive rules may take more steps than `diffusion_steps`.
    steps_left = tracker.steps_left[rows, blocks].clamp(min=1)
    # All counts go to the device in one copy, for which the host does not wait.
    host_counts = (rows, blocks, steps_left, tracker.row_steps[rows], tracker.total_steps[rows, blocks])
    device_rows, device_blocks, steps_left_on_device, row_steps, total_steps = copy_to_device(
        canvas.tokens.device, *host_counts
    )
    in_block = canvas.block[device_rows] == device_blocks[:, None]
    masked = canvas.masked[device_rows] & in_block
    if canvas.events is None:
        written, candidates, num_positions = None, masked, num_masked
    else:
        written = in_block & (canvas.unmask_step[device_rows] >= 0)
        candidates, num_positions = masked | written, tracker.sizes[rows, blocks]
    # The host passes the number of positions, so that it does not wait for the device to count them.
    flat_index = candidates.flatten().nonzero_static(size=int(num_positions.sum()))[:, 0]
    row_index = flat_index // masked.shape[1]
    offset = flat_index % masked.shape[1]
    canvas_row = device_rows[row_index]
    return StepPlan(
        rows=rows,
        blocks=blocks,
        num_masked=num_masked,
        steps_left=steps_left,
        num_positions=num_positions,
        steps_left_on_device=steps_left_on_device,
        total_steps=total_steps,
        masked=masked,
        written=written,
        row_index=row_index,
        offset=offset,
        canvas_row=canvas_row,
        column=canvas.columns[canvas_row, offset],
        seed=seeds[canvas_row],
        row_steps=row_steps[row_index],
    )
