"""Whose turn it is: the rows of a step, each in its open block, and what the host knows of them without waiting."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.device import send
from dllm_rl.rng import uniforms
from dllm_rl.samplers.canvas import Canvas
from dllm_rl.samplers.rules import name_of, steps_per_block


@dataclass(frozen=True)
class Turn:
    """One step of R rows, each in its open block. The step may write K positions, listed row by row."""

    # On the host:
    rows: Int[Tensor, " R"]  # of the canvas
    blocks: Int[Tensor, " R"]  # the open block of each row
    num_masked: Int[Tensor, " R"]  # masked positions of those blocks
    steps_left: Int[Tensor, " R"]  # steps left for those blocks, this one included
    num_positions: Int[Tensor, " R"]  # how many of the K positions each row has
    # On the device:
    left: Int[Tensor, " R"]  # `steps_left`
    steps: Int[Tensor, " R"]  # the blocks' steps in all
    masked: Bool[Tensor, "R L"]  # masked positions of the open blocks
    written: Bool[Tensor, "R L"] | None  # written positions that the step may rewrite
    row: Int[Tensor, " K"]  # each position's row among the R
    place: Int[Tensor, " K"]  # its place in the completion
    canvas_row: Int[Tensor, " K"]  # its row of the canvas
    column: Int[Tensor, " K"]  # its column of the canvas
    seed: Int[Tensor, " K"]  # its row's seed
    clock: Int[Tensor, " K"]  # steps that its row has taken part in

    def uniforms(self, stream: int, among: Int[Tensor, " C"] | slice = slice(None)) -> Float[Tensor, " C"]:
        """A number in [0, 1) for each position, or for those `among` the K: of its seed, step and place alone."""
        return uniforms(self.seed[among], self.clock[among], self.place[among], stream=stream)

    def where(self, among: Int[Tensor, " C"]) -> tuple[Int[Tensor, " C"], Int[Tensor, " C"]]:
        """Rows of the canvas and places in the completion of those `among` the K positions."""
        return self.canvas_row[among], self.place[among]

    def spread(self, values: Float[Tensor, " K"]) -> Float[Tensor, "R L"]:
        """Values of the K positions at their rows and places; -inf elsewhere."""
        out = torch.full(self.masked.shape, -torch.inf, device=values.device)
        out[self.row, self.place] = values
        return out

    def among(self, chosen: Bool[Tensor, "R L"], count: int) -> Int[Tensor, " C"]:
        """Which of the K positions are among the `count` chosen ones."""
        return chosen[self.row, self.place].nonzero_static(size=count)[:, 0]


@dataclass(frozen=True)
class Decision:
    """What a commit rule does with a turn."""

    chosen: Bool[Tensor, "R L"]  # positions that are written, on the device
    num_chosen: Int[Tensor, " R"]  # their number, on the host: so nothing waits for the device
    committed: Int[Tensor, " R"]  # how many masked positions fewer each row has, on the host
    reopened: Int[Tensor, " M"] | None = None  # which of the K positions are masked again; None: the rule never does
    held: Bool[Tensor, " R"] | None = None  # rows that stay in their block with none masked, while it has steps left


class BlockQueue:
    """The host's bookkeeping per row and block: masked positions and steps left. It need not wait for the device."""

    def __init__(
        self,
        block: Int[Tensor, "B L"],
        num_steps: int | None,
        *,
        in_step: bool,  # rows wait for the slowest row at each block; otherwise each row moves on alone
        masked: Bool[Tensor, "B L"] | None = None,  # the places that begin masked; None: all of them
    ) -> None:
        block = block.cpu()
        self.in_step = in_step
        self.masked = torch.zeros(len(block), int(block.max()) + 1, dtype=torch.long).scatter_add(
            -1, block, torch.ones_like(block) if masked is None else masked.cpu().long()
        )
        self.steps = torch.zeros_like(self.masked)
        for row, sizes in enumerate(self.masked):
            self.steps[row, sizes > 0] = torch.tensor(steps_per_block(num_steps, sizes[sizes > 0].tolist()))
        self.sizes = self.masked.clone()
        self.shares = self.steps.clone()
        self.held = torch.zeros_like(self.masked, dtype=torch.bool)
        self.clock = torch.zeros(len(block), dtype=torch.long)  # steps that the row has taken part in

    def next_rows(self) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"]]:
        """The rows of the next step, and the block of each; empty when all is done."""
        open_blocks = (self.masked > 0) | self.held
        blocks = open_blocks.int().argmax(-1)
        taking_part = open_blocks.any(-1)
        if self.in_step and taking_part.any():
            taking_part &= blocks == blocks[taking_part].min()
        rows = taking_part.nonzero()[:, 0]
        return rows, blocks[rows]

    def record(self, turn: Turn, decision: Decision) -> Int[Tensor, " C"]:
        """Record a step; returns the rows whose block is now complete."""
        where = (turn.rows, turn.blocks)
        self.masked[where] -= decision.committed
        self.steps[where] -= 1
        self.clock[turn.rows] += 1
        if decision.held is not None:
            self.held[where] = decision.held & (self.steps[where] > 0)
        return turn.rows[(self.masked[where] == 0) & ~self.held[where]]

    def drop(self, rows: Int[Tensor, " C"]) -> None:
        """Rows that ended early take part no more."""
        self.masked[rows] = 0
        self.held[rows] = False


def next_turn(canvas: Canvas, queue: BlockQueue, seeds: Int[Tensor, " B"]) -> Turn | None:
    """The next step's rows and positions; None when every block is complete."""
    rows, blocks = queue.next_rows()
    if not len(rows):
        return None
    where = (rows, blocks)
    num_masked = queue.masked[where]
    steps_left = queue.steps[where].clamp(min=1)  # adaptive rules may take more steps than `num_steps`
    # All that a step needs of the host's bookkeeping, in one copy that nothing waits for.
    host = (rows, blocks, steps_left, queue.clock[rows], queue.shares[where])
    on_device, block, left, clock, steps = send(canvas.tokens.device, *host)
    inside = canvas.block[on_device] == block[:, None]
    masked = canvas.masked[on_device] & inside
    written = inside & (canvas.unmask_step[on_device] >= 0) if canvas.revised else None
    num_positions = num_masked if written is None else queue.sizes[where]
    offered = masked if written is None else masked | written
    flat = offered.flatten().nonzero_static(size=int(num_positions.sum()))[:, 0]  # the host knows how many: no wait
    row = flat // masked.shape[1]
    place = flat % masked.shape[1]
    canvas_row = on_device[row]
    column = canvas.columns[canvas_row, place]
    position = (row, place, canvas_row, column, seeds[canvas_row], clock[row])
    return Turn(rows, blocks, num_masked, steps_left, num_positions, left, steps, masked, written, *position)


def check_last_step(commit: Callable, turn: Turn, committed: Int[Tensor, " R"]) -> None:
    """Raise ValueError where a block's last step commits none of its masked positions."""
    if ((turn.steps_left == 1) & (turn.num_masked > 0) & (committed == 0)).any():
        raise ValueError(
            f"commit={name_of(commit)} chose nothing in the last step of a block; it must choose a position by then: "
            "are the rank's scores those that it wants?"
        )
