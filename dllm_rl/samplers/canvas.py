"""State of the unmasking loop: tokens on the device, counts of masks on the host, and the rows of each step."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dllm_rl.device import send
from dllm_rl.models.base import Policy
from dllm_rl.rng import uniforms
from dllm_rl.samplers.rules import steps_per_block
from dllm_rl.types import BatchRecord, Prompts, Rollout, SamplingParams

TOKENS = 0  # streams of random numbers: the draw of a token, and the numbers of ranks and commit rules
TIES = 1
RolloutField = BatchRecord | Tensor | None  # an optional field of a rollout


@dataclass
class Canvas:
    """The batch as the model sees it (B, T), and the records of the L positions of each completion (B, L)."""

    prompts: Prompts
    tokens: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    columns: Int[Tensor, "B L"]  # the column in T of each position
    block: Int[Tensor, "B L"]  # the block of each position
    bounds: list[tuple[int, int]]  # the columns of each block; caches read them
    starts: Int[Tensor, " B"]  # the first of the T columns that a row does not pad, on the host
    pad_id: int
    mask_id: int
    pads_ended: bool  # the masks of rows that stopped early become padding
    masked: Bool[Tensor, "B L"] = field(init=False)
    unmask_step: Int[Tensor, "B L"] = field(init=False)
    logprobs: Float[Tensor, "B L"] = field(init=False)
    noted: dict[str, Tensor] = field(init=False, default_factory=dict)  # (B, L, ...), of optional features; see `note`
    fills: dict[str, int] = field(init=False, default_factory=dict)
    ended: Bool[Tensor, " B"] = field(init=False)  # rows that stopped early
    forwards: int = 0
    events: list[tuple[Tensor, ...]] | None = None  # of a rule that rewrites (`revise.packed_events`)
    # Infilling only: the completion's columns in T, including those inside the prompt. Rows may then have fewer than L
    # positions: the remaining places are never masked, and their `columns` have no meaning.
    open: Bool[Tensor, "B T"] | None = None

    def __post_init__(self) -> None:
        self.masked = torch.ones_like(self.columns, dtype=torch.bool)
        if self.open is not None:
            places = torch.arange(self.columns.shape[1], device=self.columns.device)
            self.masked = places < self.open.sum(-1, keepdim=True)
        self.unmask_step = torch.full_like(self.columns, -1)
        self.logprobs = torch.zeros(self.columns.shape, device=self.columns.device)
        self.ended = torch.zeros(len(self.columns), dtype=torch.bool, device=self.columns.device)

    def write(self, rows: Tensor, places: Tensor, steps: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """Commit tokens at places (in the completion) of rows; all arguments are (K,)."""
        self.tokens[rows, self.columns[rows, places]] = tokens
        # A tensor of False: a Python False would be copied to the GPU, and the host would wait for it.
        self.masked[rows, places] = torch.zeros_like(rows, dtype=torch.bool)
        self.logprobs[rows, places] = logprobs
        self.unmask_step[rows, places] = steps
        if self.events is not None:
            self.events.append((rows, places, steps, tokens, logprobs))

    def take(self, turn: "Turn", choice: "Choice") -> None:
        """Write the tokens that a step chose, mask again the reopened positions, and store the turn's records."""
        if (again := choice.decision.reopened) is not None:
            self.reopen(*turn.where(again), turn.clock[again])
        drawn = choice.drawn
        self.write(*turn.where(choice.picked), turn.clock[choice.picked], drawn.tokens, drawn.logprobs)
        for name, (among, values, fill) in turn.notes.items():
            if among is None:  # recorded for all K before the choice
                among, values = choice.picked, values[choice.picked]
            self.note(name, *turn.where(among), values, fill)

    def note(self, name: str, rows: Tensor, places: Tensor, values: Shaped[Tensor, "K *C"], fill: int = 0) -> None:
        """Store an optional feature's values for these places. `fill` marks places without a value."""
        if name not in self.noted:
            self.noted[name] = values.new_full((*self.masked.shape, *values.shape[1:]), fill)
            self.fills[name] = fill
        self.noted[name][rows, places] = values

    def reopen(self, rows: Tensor, places: Tensor, steps: Tensor) -> None:
        """Mask places (in the completion) of rows again; all arguments are (K,)."""
        assert self.events is not None, "only a rule that rewrites masks again"
        nothing = torch.zeros_like(rows, dtype=self.logprobs.dtype)
        self.events.append((rows, places, steps, torch.full_like(rows, -1), nothing))
        self.tokens[rows, self.columns[rows, places]] = torch.full_like(rows, self.mask_id)
        self.masked[rows, places] = torch.ones_like(rows, dtype=torch.bool)
        self.logprobs[rows, places] = nothing
        self.unmask_step[rows, places] = torch.full_like(rows, -1)
        for name, values in self.noted.items():
            values[rows, places] = torch.full_like(values[rows, places], self.fills[name])

    def completions(self) -> Int[Tensor, "B L"]:
        return self.tokens.gather(-1, self.columns)

    def end(self, rows: Tensor, eos_ids: tuple[int, ...]) -> Tensor:
        """Mark the rows of `rows` that have written an end token, and return them, on the host."""
        eos, there = send(self.tokens.device, torch.tensor(eos_ids, dtype=torch.long), rows)
        written = (torch.isin(self.completions()[there], eos) & ~self.masked[there]).any(-1)
        self.ended[there] |= written
        return rows[written.cpu()]

    def rollout(self, sampling_params: SamplingParams, weights_version: int, **fields: RolloutField) -> Rollout:
        """Return the current record: the columns of the prompts, then the columns written after them.

        `fields` are the rollout's optional fields, for the completion's places.
        """
        if self.open is not None:
            tokens = self.tokens.clone()
            attention_mask = self.attention_mask.clone()
        else:
            both = (self.prompts.tokens, self.prompts.attention_mask)
            before, real = (repeat(x.to(self.tokens.device), "p s -> (p g) s", g=self.prompts.group_size) for x in both)
            beyond = self.masked & self.ended[:, None] & self.pads_ended
            tokens = torch.cat([before, self.completions().masked_fill(beyond, self.pad_id)], dim=1)
            attention_mask = torch.cat([real, ~beyond], dim=1)
        return Rollout(
            tokens=tokens,
            attention_mask=attention_mask,
            completion_mask=self._at_columns(~self.masked, False),
            unmask_step=self._at_columns(self.unmask_step, -1),
            logprobs=self._at_columns(self.logprobs, 0.0),
            group_size=self.prompts.group_size,
            weights_version=weights_version,
            sampling_params=sampling_params,
            forwards=self.forwards,
            **{name: self._field_at_columns(value) for name, value in fields.items()},
        )

    def _field_at_columns(self, record: RolloutField) -> Any:
        if not isinstance(record, BatchRecord):
            return None if record is None else self._at_columns(record, 0)
        tensors = {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}
        return replace(record, **{n: self._at_columns(value, record.FILL.get(n, 0)) for n, value in tensors.items()})

    def _at_columns(self, values: Shaped[Tensor, "B L *C"], elsewhere: bool | int | float) -> Shaped[Tensor, "B T *C"]:
        """Return values of the completion's places at their columns, and `elsewhere` in the others."""
        if self.open is None:
            width = self.prompts.tokens.shape[1]
            return F.pad(values, (*(0, 0) * (values.dim() - 2), width, 0), value=elsewhere)
        place = (self.open.long().cumsum(-1) - 1).clamp(min=0)
        wide = (..., *[None] * (values.dim() - 2))
        found = values.gather(1, place[wide].expand(*place.shape, *values.shape[2:]))
        return torch.where(self.open[wide], found, torch.full_like(found, elsewhere))


def make_canvas(policy: Policy, prompts: Prompts, length: int, block_size: int, *, block_aligned: bool) -> Canvas:
    """Return prompts, each repeated group_size times and followed by `length` masks.

    With `block_aligned`, all rows start in the same columns.
    """
    spec = policy.spec
    device = policy.device
    group = prompts.group_size
    assert spec.mask_id is not None, "a diffusion model has a mask token"
    mask = repeat(prompts.attention_mask.cpu(), "p s -> (p g) s", g=group)
    sizes = mask.sum(-1) if spec.attention == "block_causal" else torch.zeros(len(mask), dtype=torch.long)
    offsets = sizes % block_size  # a block-causal completion begins inside its prompt's last block
    full = sizes // block_size
    block = (offsets[:, None] + torch.arange(length)) // block_size
    if block_aligned:  # prompts are padded by complete blocks, so that all rows start in the same columns
        base = int(full.max()) * block_size
        columns = base + offsets[:, None] + torch.arange(length)
        starts = base - full * block_size
        tokens = torch.full((len(mask), int(columns.max()) + 1), policy.pad_id)
        attention_mask = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, prompt in enumerate(repeat(prompts.tokens.cpu(), "p s -> (p g) s", g=group)):
            place = slice(int(starts[row]), int(starts[row] + sizes[row]))
            tokens[row, place], attention_mask[row, place] = prompt[mask[row]], True
    else:
        base = prompts.tokens.shape[1]
        columns = (base + torch.arange(length)).expand(len(mask), -1)
        blank = torch.zeros(columns.shape, dtype=torch.long)
        tokens = torch.cat([repeat(prompts.tokens.cpu(), "p s -> (p g) s", g=group), blank], dim=1)
        attention_mask = torch.cat([mask, blank.bool()], dim=1)
    width = tokens.shape[1]
    tokens.scatter_(-1, columns, torch.full_like(columns, spec.mask_id))
    attention_mask.scatter_(-1, columns, torch.ones_like(columns, dtype=torch.bool))
    return Canvas(
        prompts=prompts,
        tokens=tokens.to(device),
        attention_mask=attention_mask.to(device),
        columns=columns.contiguous().to(device),
        block=block.to(device),
        bounds=[(start, min(start + block_size, width)) for start in range(base, width, block_size)],
        starts=attention_mask.long().argmax(-1),
        pad_id=policy.pad_id,
        mask_id=spec.mask_id,
        pads_ended=spec.attention == "block_causal",
    )


@dataclass(frozen=True)
class Turn:
    """One step of R rows, each in its open block. The step may write K positions, listed row by row."""

    # On the host:
    rows: Int[Tensor, " R"]  # of the canvas
    blocks: Int[Tensor, " R"]  # the open block of each row
    num_masked: Int[Tensor, " R"]  # masked positions of those blocks
    steps_left: Int[Tensor, " R"]  # remaining steps of those blocks, including this one
    num_positions: Int[Tensor, " R"]  # how many of the K positions each row has
    # On the device:
    left: Int[Tensor, " R"]  # `steps_left`
    steps: Int[Tensor, " R"]  # total steps of the blocks
    masked: Bool[Tensor, "R L"]  # masked positions of the open blocks
    written: Bool[Tensor, "R L"] | None  # written positions that the step may rewrite
    row: Int[Tensor, " K"]  # each position's row in the R
    place: Int[Tensor, " K"]  # its place in the completion
    canvas_row: Int[Tensor, " K"]  # its row of the canvas
    column: Int[Tensor, " K"]  # its column of the canvas
    seed: Int[Tensor, " K"]  # its row's seed
    clock: Int[Tensor, " K"]  # steps that its row has taken part in
    # Records of optional features: the indices in the K positions (None: all), their values, and a fill.
    notes: dict[str, tuple[Tensor | None, Tensor, int]] = field(default_factory=dict)

    def uniforms(self, stream: int, among: Int[Tensor, " C"] | slice = slice(None)) -> Float[Tensor, " C"]:
        """Return a number in [0, 1) for each position, or for the `among` of the K.

        It depends only on the row's seed, its step and the place.
        """
        return uniforms(self.seed[among], self.clock[among], self.place[among], stream=stream)

    def where(self, among: Int[Tensor, " C"]) -> tuple[Int[Tensor, " C"], Int[Tensor, " C"]]:
        """Return rows of the canvas and places in the completion of the positions with these indices in the K."""
        return self.canvas_row[among], self.place[among]

    def spread(self, values: Float[Tensor, " K"]) -> Float[Tensor, "R L"]:
        """Return values of the K positions at their rows and places; -inf elsewhere."""
        out = torch.full(self.masked.shape, -torch.inf, device=values.device)
        out[self.row, self.place] = values
        return out

    def among(self, chosen: Bool[Tensor, "R L"], count: int) -> Int[Tensor, " C"]:
        """Return the indices in the K positions of the `count` chosen ones."""
        return chosen[self.row, self.place].nonzero_static(size=count)[:, 0]


@dataclass(frozen=True)
class Decision:
    """The decision of a commit rule in one step."""

    chosen: Bool[Tensor, "R L"]  # positions that are written, on the device
    num_chosen: Int[Tensor, " R"]  # their number, on the host, so that nothing waits for the device
    committed: Int[Tensor, " R"]  # by how many each row's masked positions decrease, on the host
    reopened: Int[Tensor, " M"] | None = None  # indices of positions that are masked again; None: never
    held: Bool[Tensor, " R"] | None = None  # rows that stay in a block without masks, while steps remain


class Drawn(NamedTuple):
    """Tokens drawn at K positions."""

    tokens: Int[Tensor, " K"]
    logprobs: Float[Tensor, " K"]  # as drawn, nats
    normalizer: Float[Tensor, " K"]  # of the rank's logits, or of the logits drawn from
    log_mass: Float[Tensor, " K"] | None = None  # with top_k or top_p, from `kept_set`
    support: Int[Tensor, "K C"] | None = None

    def at(self, picked: Int[Tensor, " C"]) -> "Drawn":
        return Drawn(*(values[picked] for values in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(values for values in self if values is not None)


@dataclass(frozen=True)
class Choice:
    """The positions and tokens that a step writes; indices refer to the turn's K positions."""

    decision: Decision
    picked: Int[Tensor, " C"]  # positions that are written
    drawn: Drawn  # at those positions


class BlockQueue:
    """Counts per row and block on the host: masked positions and remaining steps. It need not wait for the device."""

    def __init__(
        self,
        block: Int[Tensor, "B L"],
        diffusion_steps: int | None,
        *,
        in_step: bool,  # rows wait for the slowest row at each block; otherwise each row advances separately
        masked: Bool[Tensor, "B L"] | None = None,  # the places that begin masked; None: all
    ) -> None:
        block = block.cpu()
        self.in_step = in_step
        self.masked = torch.zeros(len(block), int(block.max()) + 1, dtype=torch.long).scatter_add(
            -1, block, torch.ones_like(block) if masked is None else masked.cpu().long()
        )
        self.steps = torch.zeros_like(self.masked)
        for row, sizes in enumerate(self.masked):
            self.steps[row, sizes > 0] = torch.tensor(steps_per_block(diffusion_steps, sizes[sizes > 0].tolist()))
        self.sizes = self.masked.clone()
        self.shares = self.steps.clone()
        self.held = torch.zeros_like(self.masked, dtype=torch.bool)
        self.clock = torch.zeros(len(block), dtype=torch.long)  # steps that the row has taken part in

    def next_rows(self) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"]]:
        """Return the rows of the next step and the block of each; empty when all is done."""
        open_blocks = (self.masked > 0) | self.held
        blocks = open_blocks.int().argmax(-1)
        taking_part = open_blocks.any(-1)
        if self.in_step and taking_part.any():
            taking_part &= blocks == blocks[taking_part].min()
        rows = taking_part.nonzero()[:, 0]
        return rows, blocks[rows]

    def record(
        self, where: tuple[Tensor, Tensor], committed: Int[Tensor, " R"], held: Bool[Tensor, " R"] | None = None
    ) -> Int[Tensor, " C"]:
        """Record a step of rows and blocks as in `Decision`, and return the rows whose block is now complete."""
        self.masked[where] -= committed
        self.steps[where] -= 1
        self.clock[where[0]] += 1
        if held is not None:
            self.held[where] = held & (self.steps[where] > 0)
        return where[0][(self.masked[where] == 0) & ~self.held[where]]

    def drop(self, rows: Int[Tensor, " C"]) -> None:
        """Remove rows that ended early from all later steps."""
        self.masked[rows] = 0
        self.held[rows] = False


def next_turn(canvas: Canvas, queue: BlockQueue, seeds: Int[Tensor, " B"]) -> Turn | None:
    """Return the next step's rows and positions, or None when every block is complete."""
    rows, blocks = queue.next_rows()
    if not len(rows):
        return None
    where = (rows, blocks)
    num_masked = queue.masked[where]
    steps_left = queue.steps[where].clamp(min=1)  # adaptive rules may take more steps than `diffusion_steps`
    # All host counts that a step needs, in one copy that nothing waits for.
    host = (rows, blocks, steps_left, queue.clock[rows], queue.shares[where])
    on_device, block, left, clock, steps = send(canvas.tokens.device, *host)
    inside = canvas.block[on_device] == block[:, None]
    masked = canvas.masked[on_device] & inside
    written = inside & (canvas.unmask_step[on_device] >= 0) if canvas.events is not None else None
    num_positions = num_masked if written is None else queue.sizes[where]
    offered = masked if written is None else masked | written
    flat = offered.flatten().nonzero_static(size=int(num_positions.sum()))[:, 0]  # the host knows how many: no wait
    row = flat // masked.shape[1]
    place = flat % masked.shape[1]
    canvas_row = on_device[row]
    column = canvas.columns[canvas_row, place]
    position = (row, place, canvas_row, column, seeds[canvas_row], clock[row])
    return Turn(rows, blocks, num_masked, steps_left, num_positions, left, steps, masked, written, *position)
