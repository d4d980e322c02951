"""State of the unmasking loop: the canvas on the device, the counts of masks on the host, and the plan of a step.

L is the number of positions of a completion. An offset is the index of a position in its completion, from 0.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dllm_rl.device import copy_to_device
from dllm_rl.models.base import Policy
from dllm_rl.samplers.rules import steps_per_block
from dllm_rl.types.rollouts import Prompts, Rollout, SamplingParams

# Streams of random numbers (`rng.uniforms`): one draws tokens, the other is for ranks and commit rules.
TOKEN_STREAM = 0
RANK_STREAM = 1


class Written(NamedTuple):
    """The tensors that a step changes. The optional ones are None if the sampler does not record them.

    Attributes:
        tokens: Prompts, written tokens and masks.
        masked: Positions that are masked.
        unmask_step: Step that wrote each position; -1 if masked.
        logprobs: Log-prob of each written token, in nats.
        has_nan_scores: Whether the rank has returned NaN. It is on the device, so that a step does not wait for it.
        contradicts: Whether the commit rule has chosen other positions than it declares. It is on the device too.
        log_mass: First result of `filter_support` for each written token.
        support_ids: Its second result; -1 at masked positions.
        order_logprobs: `Order.logprobs`.
        draw_index: `Order.draw_index`.
    """

    tokens: Int[Tensor, "B T"]
    masked: Bool[Tensor, "B L"]
    unmask_step: Int[Tensor, "B L"]
    logprobs: Float[Tensor, "B L"]
    has_nan_scores: Bool[Tensor, ""]
    contradicts: Bool[Tensor, ""]
    log_mass: Float[Tensor, "B L"] | None = None
    support_ids: Int[Tensor, "B L C"] | None = None
    order_logprobs: Float[Tensor, "B L"] | None = None
    draw_index: Int[Tensor, "B L"] | None = None

    def copy(self) -> "Written":
        return Written(*(None if values is None else values.clone() for values in self))  # type: ignore[arg-type]


@dataclass
class Canvas:
    """The batch as the model sees it (B, T), and the records of the completions' positions (B, L).

    Args:
        prompts: Prompts of the batch.
        written: Tokens, and what is recorded of them.
        attention_mask: False on padding.
        columns: Column in T of each position.
        block: Block of each position.
        bounds: First column and end of each block. Only caches read them.
        starts: Column of each row's first non-padding token, on the host.
        seeds: Seed of each row.
        finished: Rows that stopped early.
        pad_id: Token id of padding.
        mask_id: Token id of the mask.
        pad_finished: Whether the masks of rows that stopped early become padding in the rollout.
        infill_mask: For infilling, the columns of the completion, including those inside the prompt. Rows may then have
            fewer than L positions: the remaining offsets are never masked, and their `columns` have no meaning. None:
            no infilling.
        forwards: Number of model calls.
        events: Every write and remasking, if the commit rule rewrites tokens; `revise.packed_events` explains the
            entries. None: the rule does not rewrite.
    """

    prompts: Prompts
    written: Written
    attention_mask: Bool[Tensor, "B T"]
    columns: Int[Tensor, "B L"]
    block: Int[Tensor, "B L"]
    bounds: list[tuple[int, int]]
    starts: Int[Tensor, " B"]
    seeds: Int[Tensor, " B"]
    finished: Bool[Tensor, " B"]
    pad_id: int
    mask_id: int
    pad_finished: bool
    infill_mask: Bool[Tensor, "B T"] | None = None
    forwards: int = 0
    events: list[tuple[Tensor, ...]] | None = None

    def remask(self, rows: Int[Tensor, " C"], offsets: Int[Tensor, " C"], steps: Int[Tensor, " C"]) -> None:
        """Mask written positions again; all arguments have one entry per position."""
        assert self.events is not None, "remasking needs a rule that rewrites"
        written = self.written
        zeros = torch.zeros_like(rows, dtype=written.logprobs.dtype)
        self.events.append((rows, offsets, steps, torch.full_like(rows, -1), zeros))
        put(written.tokens, rows, self.columns[rows, offsets], torch.full_like(rows, self.mask_id))
        put(written.masked, rows, offsets, torch.ones_like(rows))
        no_record = ((written.unmask_step, -1), (written.logprobs, 0), (written.log_mass, 0), (written.support_ids, -1))
        for record, fill in no_record:
            if record is not None:
                put(record, rows, offsets, record.new_full((), fill))

    def mark_finished(self, rows: Int[Tensor, " R"], eos_ids: tuple[int, ...]) -> Int[Tensor, " F"]:
        """Mark as finished those of `rows` (on the host) that have written an end token. Return them, on the host."""
        tokens, masked = self.written.tokens, self.written.masked
        eos, device_rows = copy_to_device(tokens.device, torch.tensor(eos_ids, dtype=torch.long), rows)
        completions = tokens[device_rows].gather(-1, self.columns[device_rows])
        has_eos = (torch.isin(completions, eos) & ~masked[device_rows]).any(-1)
        self.finished[device_rows] |= has_eos
        return rows[has_eos.cpu()]

    def rollout(self, sampling_params: SamplingParams, weights_version: int, **fields: Any) -> Rollout:
        """Return the rollout so far. Its columns are those of the prompts, followed by those of the completions.

        With infilling, its columns are those of the canvas, because prompts contain written positions too. `fields` are
        optional fields of the rollout, for the completions' positions (B, L).
        """
        written, prompts = self.written, self.prompts
        is_padding = written.masked & self.finished[:, None] & self.pad_finished
        rollout = Rollout(
            tokens=written.tokens.gather(-1, self.columns).masked_fill(is_padding, self.pad_id),
            attention_mask=~is_padding,
            completion_mask=~written.masked,
            unmask_step=written.unmask_step,
            logprobs=written.logprobs,
            group=prompts.group.to(is_padding.device),
            weights_version=weights_version,
            sampling_params=sampling_params,
            forwards=self.forwards,
            **fields,
        )
        if self.infill_mask is None:
            prompt_tokens, prompt_mask = (x.to(is_padding.device) for x in (prompts.tokens, prompts.attention_mask))
            return replace(
                rollout.padded(prompt_tokens.shape[1]),
                tokens=torch.cat([prompt_tokens, rollout.tokens], dim=1),
                attention_mask=torch.cat([prompt_mask, rollout.attention_mask], dim=1),
            )
        # The columns that are not filled in take the values of a column of padding, whose index is 0.
        offset = self.infill_mask.cumsum(-1) * self.infill_mask
        row = torch.arange(len(offset), device=offset.device)[:, None]
        rollout = rollout.padded(1).map(lambda x: x if x.dim() == 1 else x[row, offset])
        return replace(rollout, tokens=written.tokens.clone(), attention_mask=self.attention_mask.clone())


def put(
    target: Shaped[Tensor, "B W *C"],
    rows: Int[Tensor, " C"],
    columns: Int[Tensor, " C"],
    values: Shaped[Tensor, "..."],
    keep: Bool[Tensor, " C"] | None = None,
) -> None:
    """Write values into `target` at these rows and columns. `keep` marks those that are written; None: all."""
    values = values.to(target.dtype)
    if keep is not None:
        keep = keep.view(-1, *[1] * (target.dim() - 2))
        values = torch.where(keep, values, target[rows, columns])
    target[rows, columns] = values


def block_first_step(unmask_step: Int[Tensor, "B L"], block: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Return the first step of each written position's block; -1 at positions that are masked."""
    last_possible = torch.iinfo(unmask_step.dtype).max
    steps = torch.where(unmask_step < 0, last_possible, unmask_step)
    first = torch.full_like(steps, last_possible).scatter_reduce(1, block, steps, "amin").gather(1, block)
    return torch.where(unmask_step < 0, -1, first)


def make_canvas(
    policy: Policy, prompts: Prompts, length: int, block_size: int, *, block_aligned: bool = False
) -> Canvas:
    """Return a canvas of prompts that have seeds, each followed by `length` masks. Positions to fill in are masked too.

    With `block_aligned` (a block-causal policy with a cache), each block has the same columns in all rows.
    """
    spec = policy.spec
    assert spec.mask_id is not None and prompts.seeds is not None, "a diffusion model has a mask, and rows have seeds"
    prompt_tokens, prompt_mask = prompts.tokens.cpu(), prompts.attention_mask.cpu()
    num_rows = len(prompt_mask)
    # Only block-causal blocks count from the prompt's first token.
    prompt_sizes = prompt_mask.sum(-1) if spec.attention == "block_causal" else torch.zeros(num_rows, dtype=torch.long)
    block_offsets = prompt_sizes % block_size  # a block-causal completion begins inside its prompt's last block
    full_blocks = prompt_sizes // block_size
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
        is_open = torch.zeros_like(attention_mask).scatter(-1, columns, torch.ones_like(columns, dtype=torch.bool))
    else:
        blocks_start = prompt_tokens.shape[1]
        tokens, attention_mask = F.pad(prompt_tokens, (0, length)), F.pad(prompt_mask, (0, length))
        is_open = torch.zeros_like(prompt_mask) if prompts.infill_mask is None else prompts.infill_mask.cpu()
        is_open = F.pad(is_open & prompt_mask, (0, length), value=True)
        # A stable sort lists the columns to fill in first, from left to right.
        columns = (~is_open).long().argsort(dim=-1, stable=True)[:, : int(is_open.sum(-1).max())]
    width = tokens.shape[1]
    attention_mask |= is_open
    columns = columns.contiguous().to(policy.device)
    masked, infill_mask = torch.ones_like(columns, dtype=torch.bool), None
    if prompts.infill_mask is not None:
        infill_mask = is_open.to(policy.device)
        masked = torch.arange(columns.shape[1], device=policy.device) < infill_mask.sum(-1, keepdim=True)
    return Canvas(
        prompts=prompts,
        written=Written(
            tokens=tokens.masked_fill(is_open, spec.mask_id).to(policy.device),
            masked=masked,
            unmask_step=torch.full_like(columns, -1),
            logprobs=torch.zeros(columns.shape, device=policy.device),
            has_nan_scores=masked.new_zeros(()),
            contradicts=masked.new_zeros(()),
        ),
        attention_mask=attention_mask.to(policy.device),
        columns=columns,
        block=((block_offsets[:, None] + torch.arange(columns.shape[1])) // block_size).to(policy.device),
        bounds=[(start, min(start + block_size, width)) for start in range(blocks_start, width, block_size)],
        starts=attention_mask.long().argmax(-1),
        seeds=prompts.seeds.to(policy.device),
        finished=torch.zeros(num_rows, dtype=torch.bool, device=policy.device),
        pad_id=policy.pad_id,
        mask_id=spec.mask_id,
        pad_finished=spec.attention == "block_causal",
        infill_mask=infill_mask,
    )


class StepRows(NamedTuple):
    """The R rows of a step, each in its current block. All tensors are on the host.

    Attributes:
        rows: Rows of the canvas.
        blocks: Current block of each row.
        num_masked: Number of masked positions in each block.
        num_positions: Number of the K positions of the step that each row has.
        steps_left: Remaining steps of each block, including this one.
        total_steps: Total steps of each block.
        row_steps: Number of steps in which each row has taken part.
    """

    rows: Int[Tensor, " R"]
    blocks: Int[Tensor, " R"]
    num_masked: Int[Tensor, " R"]
    num_positions: Int[Tensor, " R"]
    steps_left: Int[Tensor, " R"]
    total_steps: Int[Tensor, " R"]
    row_steps: Int[Tensor, " R"]


class StepPositions(NamedTuple):
    """The K positions that a step of R rows may write, listed row by row. All tensors are on the device.

    Attributes:
        masked: Masked positions of the rows' blocks.
        rewritable: Written positions that the step may rewrite. None: the rule does not rewrite.
        steps_left: Remaining steps of each row's block, including this one.
        total_steps: Total steps of each row's block.
        row_index: Index of each position's row among the R.
        offset: Offset of each position in its completion.
        canvas_row: Row of each position in the canvas.
        column: Column of each position in the canvas.
        seed: Seed of each position's row. A position's random numbers depend on it, on row_steps and on offset alone.
        row_steps: Number of steps in which each position's row has taken part.
    """

    masked: Bool[Tensor, "R L"]
    rewritable: Bool[Tensor, "R L"] | None
    steps_left: Int[Tensor, " R"]
    total_steps: Int[Tensor, " R"]
    row_index: Int[Tensor, " K"]
    offset: Int[Tensor, " K"]
    canvas_row: Int[Tensor, " K"]
    column: Int[Tensor, " K"]
    seed: Int[Tensor, " K"]
    row_steps: Int[Tensor, " K"]

    def to_grid(self, values: Float[Tensor, " K"]) -> Float[Tensor, "R L"]:
        """Return values of the K positions at their rows and offsets, and -inf at the other positions."""
        out = torch.full(self.masked.shape, -torch.inf, device=values.device)
        out[self.row_index, self.offset] = values
        return out

    def indices_of(self, marked: Bool[Tensor, "R L"], count: int) -> Int[Tensor, " C"]:
        """Return the indices, among the K, of the positions that `marked` marks. `count` is their number.

        Because the host passes `count`, it does not wait for the device to count them.
        """
        return marked[self.row_index, self.offset].nonzero_static(size=count)[:, 0]


class Decision(NamedTuple):
    """The decision of a commit rule in one step.

    Attributes:
        chosen: Positions that are written.
        places: Their indices among the K. In a compiled step, whose shapes are fixed: the indices of all K.
        net_unmasked: By how much the number of masked positions of each row decreases, on the host; in a compiled step
            on the device.
        keep: In a compiled step, which of the K are written. None: all of `places` are.
        remasked: Indices, among the K, of positions that are masked again. None: the rule never masks again.
        stays_open: Rows that stay in their block although nothing is masked, until its steps are used up. None: the
            rule does not rewrite.
    """

    chosen: Bool[Tensor, "R L"]
    places: Int[Tensor, " C"]
    net_unmasked: Int[Tensor, " R"]
    keep: Bool[Tensor, " K"] | None = None
    remasked: Int[Tensor, " M"] | None = None
    stays_open: Bool[Tensor, " R"] | None = None


class BlockTracker:
    """The number of masked positions and of remaining steps of each row and block.

    The counts are on the host, so that planning a step does not wait for the device.
    """

    def __init__(self, canvas: Canvas, diffusion_steps: int | None, *, wait_for_all_rows: bool) -> None:
        """Start with no step taken.

        Args:
            canvas: Canvas before the first step.
            diffusion_steps: Number of steps per completion. None: one per position.
            wait_for_all_rows: Whether a row enters a block only when all rows have completed the block before.
        """
        block = canvas.block.cpu()
        self.wait_for_all_rows = wait_for_all_rows
        self.rewrites = canvas.events is not None
        # The tensors below have one entry per row and block.
        no_masks = torch.zeros(len(block), int(block.max()) + 1, dtype=torch.long)
        self.num_masked = no_masks.scatter_add(-1, block, canvas.written.masked.cpu().long())
        unique_rows, index = self.num_masked.unique(dim=0, return_inverse=True)  # most rows have the same block sizes
        steps = torch.zeros_like(unique_rows)
        for row, sizes in enumerate(unique_rows):
            steps[row, sizes > 0] = torch.tensor(steps_per_block(diffusion_steps, sizes[sizes > 0].tolist()))
        self.steps_left = steps[index]
        self.sizes = self.num_masked.clone()
        self.total_steps = self.steps_left.clone()
        self.stays_open = torch.zeros_like(self.num_masked, dtype=torch.bool)
        self.row_steps = torch.zeros(len(block), dtype=torch.long)  # steps in which the row has taken part

    def next_rows(self) -> StepRows | None:
        """Return the rows of the next step. None: all blocks are complete."""
        is_open = (self.num_masked > 0) | self.stays_open
        blocks = is_open.int().argmax(-1)
        takes_part = is_open.any(-1)
        if self.wait_for_all_rows and takes_part.any():
            takes_part &= blocks == blocks[takes_part].min()
        rows = takes_part.nonzero()[:, 0]
        if not len(rows):
            return None
        at = (rows, blocks[rows])
        num_masked = self.num_masked[at]
        return StepRows(
            *at,
            num_masked=num_masked,
            num_positions=self.sizes[at] if self.rewrites else num_masked,
            steps_left=self.steps_left[at].clamp(min=1),  # adaptive rules may take more steps than `diffusion_steps`
            total_steps=self.total_steps[at],
            row_steps=self.row_steps[rows],
        )

    def record(
        self, step: StepRows, net_unmasked: Int[Tensor, " R"], stays_open: Bool[Tensor, " R"] | None = None
    ) -> Int[Tensor, " C"]:
        """Record a step, and return the rows whose block is now complete. `Decision` explains the arguments."""
        at = (step.rows, step.blocks)
        num_masked = step.num_masked - net_unmasked
        self.num_masked[at] = num_masked
        self.steps_left[at] -= 1
        self.row_steps[step.rows] += 1
        if stays_open is not None:
            stays_open = stays_open & (self.steps_left[at] > 0)
            self.stays_open[at] = stays_open
        is_complete = num_masked == 0 if stays_open is None else (num_masked == 0) & ~stays_open
        return step.rows[is_complete]

    def finish_rows(self, rows: Int[Tensor, " C"]) -> None:
        """Remove rows that have completed a block, and ended early in it, from all later steps."""
        self.num_masked[rows] = 0


def positions_of(canvas: Canvas, step: StepRows) -> StepPositions:
    """Return the positions that a step of these rows may write."""
    # All counts go to the device in one copy, for which the host does not wait.
    host_counts = (step.rows, step.blocks, step.steps_left, step.row_steps, step.total_steps)
    rows, blocks, steps_left, row_steps, total_steps = copy_to_device(canvas.columns.device, *host_counts)
    in_block = canvas.block[rows] == blocks[:, None]
    masked = canvas.written.masked[rows] & in_block
    rewritable = None if canvas.events is None else in_block & (canvas.written.unmask_step[rows] >= 0)
    candidates = masked if rewritable is None else masked | rewritable
    # The host passes the number of positions, so that it does not wait for the device to count them.
    flat_index = candidates.flatten().nonzero_static(size=int(step.num_positions.sum()))[:, 0]
    row_index = flat_index // masked.shape[1]
    offset = flat_index % masked.shape[1]
    canvas_row = rows[row_index]
    return StepPositions(
        masked=masked,
        rewritable=rewritable,
        steps_left=steps_left,
        total_steps=total_steps,
        row_index=row_index,
        offset=offset,
        canvas_row=canvas_row,
        column=canvas.columns[canvas_row, offset],
        seed=canvas.seeds[canvas_row],
        row_steps=row_steps[row_index],
    )
