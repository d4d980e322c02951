"""What the unmasking loop keeps: the tokens on the device, and on the host how many are masked where."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor

from dllm_rl.device import send
from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import fitting
from dllm_rl.samplers.rules import steps_per_block
from dllm_rl.types import Prompts, Rollout, SamplingParams


@dataclass
class Canvas:
    """The batch as the model sees it (B, T), and what is known of the L positions of each completion (B, L).

    columns  where in T a completion's positions lie.
    block    the block that each belongs to; bounds: the columns of each block.
    starts   the first of the T columns that a row does not pad, on the host.
    ended    rows that stopped early; what they left masked becomes padding where `pads_ended`.
    revised  whether the commit rule may come back to what it wrote.
    open     infilling only: which of the T columns are the completion's, those inside the prompt among them. Rows then
             may have fewer than L positions: places behind a row's last are never masked, their `columns` mean nothing.
    """

    prompts: Prompts
    tokens: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    columns: Int[Tensor, "B L"]
    block: Int[Tensor, "B L"]
    bounds: list[tuple[int, int]]
    starts: Int[Tensor, " B"]
    pad_id: int
    pads_ended: bool
    masked: Bool[Tensor, "B L"] = field(init=False)
    unmask_step: Int[Tensor, "B L"] = field(init=False)
    logprobs: Float[Tensor, "B L"] = field(init=False)
    log_kept_mass: Float[Tensor, "B L"] | None = field(init=False, default=None)
    kept_ids: Int[Tensor, "B L C"] | None = field(init=False, default=None)
    order_logprobs: Float[Tensor, "B L"] | None = field(init=False, default=None)
    experts: Integer[Tensor, "B L M E"] | None = field(init=False, default=None)
    rank: str | None = field(init=False, default=None)
    ended: Bool[Tensor, " B"] = field(init=False)
    forwards: int = 0
    revised: bool = False
    open: Bool[Tensor, "B T"] | None = None

    def __post_init__(self) -> None:
        self.masked = torch.ones_like(self.columns, dtype=torch.bool)
        if self.open is not None:
            places = torch.arange(self.columns.shape[1], device=self.columns.device)
            self.masked = places < self.open.sum(-1, keepdim=True)
        self.unmask_step = torch.full_like(self.columns, -1)
        self.logprobs = torch.zeros(self.columns.shape, device=self.columns.device)
        self.ended = torch.zeros(len(self.columns), dtype=torch.bool, device=self.columns.device)

    def write(
        self, rows: Tensor, places: Tensor, steps: Tensor, tokens: Tensor, logprobs: Tensor, *kept: Tensor
    ) -> None:
        """Commit tokens at places (within the completion) of rows; all are (K,). kept: what `kept_set` gave, if any."""
        self.tokens[rows, self.columns[rows, places]] = tokens
        self.masked[rows, places] = torch.zeros_like(rows, dtype=torch.bool)  # a number is copied, which is waited for
        self.logprobs[rows, places] = logprobs
        self.unmask_step[rows, places] = steps
        if kept:
            log_mass, ids = kept
            if self.log_kept_mass is None or self.kept_ids is None:
                self.log_kept_mass = torch.zeros_like(self.logprobs)
                self.kept_ids = ids.new_full((*self.logprobs.shape, ids.shape[-1]), -1)
            self.log_kept_mass[rows, places], self.kept_ids[rows, places] = log_mass, ids

    def route(self, rows: Tensor, places: Tensor, experts: Integer[Tensor, "K M E"]) -> None:
        """Note the experts of the states that places (within the completion) of rows were committed from."""
        if self.experts is None:
            self.experts = experts.new_zeros((*self.masked.shape, *experts.shape[1:]))
        self.experts[rows, places] = experts

    def leave(self, rows: Tensor, places: Tensor, logprobs: Float[Tensor, " K"]) -> None:
        """Note that a step left these places masked, which had this log-probability."""
        if self.order_logprobs is None:
            self.order_logprobs = torch.zeros_like(self.logprobs)
        self.order_logprobs[rows, places] += logprobs

    def open_step(self) -> Int[Tensor, "B L"]:
        """The first step of each place's block, -1 where the block has none yet."""
        step, far = self.unmask_step, torch.iinfo(self.unmask_step.dtype).max
        steps = torch.where(step < 0, far, step)
        first = torch.full_like(steps, far).scatter_reduce(1, self.block, steps, "amin").gather(1, self.block)
        return torch.where(first < far, first, -1)

    def reopen(self, rows: Tensor, places: Tensor, mask_id: int) -> None:
        """Mask places (within the completion) of rows again; both are (K,)."""
        self.tokens[rows, self.columns[rows, places]] = torch.full_like(rows, mask_id)
        self.masked[rows, places] = torch.ones_like(rows, dtype=torch.bool)
        self.logprobs[rows, places] = torch.zeros_like(rows, dtype=self.logprobs.dtype)
        self.unmask_step[rows, places] = torch.full_like(rows, -1)
        if self.log_kept_mass is not None and self.kept_ids is not None:
            self.log_kept_mass[rows, places] = torch.zeros_like(rows, dtype=self.log_kept_mass.dtype)
            self.kept_ids[rows, places] = torch.full_like(self.kept_ids[rows, places], -1)

    def completions(self) -> Int[Tensor, "B L"]:
        return self.tokens.gather(-1, self.columns)

    def end(self, rows: Tensor, eos_ids: tuple[int, ...]) -> Tensor:
        """Mark those of `rows` that have written an end token; returns them, on the host."""
        eos, there = send(self.tokens.device, torch.tensor(eos_ids, dtype=torch.long), rows)
        written = (torch.isin(self.completions()[there], eos) & ~self.masked[there]).any(-1)
        self.ended[there] |= written
        return rows[written.cpu()]

    def rollout(self, sampling_params: SamplingParams, weights_version: int) -> Rollout:
        """The record as it stands: columns are the prompts', then those of what is written behind them."""
        if self.open is not None:
            return self._infilled(sampling_params, weights_version)
        group, device = self.prompts.group_size, self.tokens.device
        tokens, mask = (
            repeat(x.to(device), "p s -> (p g) s", g=group) for x in (self.prompts.tokens, self.prompts.attention_mask)
        )
        nowhere = torch.zeros_like(mask)
        log_mass, kept_ids = self.log_kept_mass, None if self.kept_ids is None else fitting(self.kept_ids)
        order = self.order_logprobs
        beyond = self.masked & self.ended[:, None] if self.pads_ended else torch.zeros_like(self.masked)
        return Rollout(
            tokens=torch.cat([tokens, self.completions().masked_fill(beyond, self.pad_id)], dim=1),
            attention_mask=torch.cat([mask, ~beyond], dim=1),
            completion_mask=torch.cat([nowhere, ~self.masked], dim=1),
            unmask_step=torch.cat([nowhere.long() - 1, self.unmask_step], dim=1),
            logprobs=torch.cat([nowhere.float(), self.logprobs], dim=1),
            group_size=group,
            weights_version=weights_version,
            sampling_params=sampling_params,
            forwards=self.forwards,
            revised=self.revised,
            log_kept_mass=None if log_mass is None else torch.cat([nowhere.float(), log_mass], dim=1),
            kept_ids=None if kept_ids is None else F.pad(kept_ids, (0, 0, nowhere.shape[1], 0), value=-1),
            rank=self.rank,
            open_step=torch.cat([nowhere.long() - 1, self.open_step().masked_fill(self.masked, -1)], dim=1),
            order_logprobs=None if order is None else torch.cat([nowhere.float(), order], dim=1),
            experts=None if self.experts is None else F.pad(self.experts, (0, 0, 0, 0, nowhere.shape[1], 0)),
        )

    def _infilled(self, sampling_params: SamplingParams, weights_version: int) -> Rollout:
        log_mass, kept_ids = self.log_kept_mass, None if self.kept_ids is None else fitting(self.kept_ids)
        return Rollout(
            tokens=self.tokens.clone(),
            attention_mask=self.attention_mask.clone(),
            completion_mask=~self._at_columns(self.masked, True),
            unmask_step=self._at_columns(self.unmask_step, -1),
            logprobs=self._at_columns(self.logprobs, 0.0),
            group_size=self.prompts.group_size,
            weights_version=weights_version,
            sampling_params=sampling_params,
            forwards=self.forwards,
            revised=self.revised,
            log_kept_mass=None if log_mass is None else self._at_columns(log_mass, 0.0),
            kept_ids=None if kept_ids is None else self._at_columns(kept_ids, -1),
            rank=self.rank,
            open_step=self._at_columns(self.open_step().masked_fill(self.masked, -1), -1),
            order_logprobs=None if self.order_logprobs is None else self._at_columns(self.order_logprobs, 0.0),
            experts=None if self.experts is None else self._at_columns(self.experts, 0),
        )

    def _at_columns(self, values: Shaped[Tensor, "B L *C"], elsewhere: bool | int | float) -> Shaped[Tensor, "B T *C"]:
        """What is known of the completion's places, at the columns of those places; `elsewhere` in the others."""
        assert self.open is not None, "only an infilling canvas has columns that differ by row"
        place = (self.open.long().cumsum(-1) - 1).clamp(min=0)
        wide = (..., *[None] * (values.dim() - 2))
        found = values.gather(1, place[wide].expand(*place.shape, *values.shape[2:]))
        return torch.where(self.open[wide], found, torch.full_like(found, elsewhere))


def make_canvas(policy: Policy, prompts: Prompts, length: int, block_size: int, *, block_aligned: bool) -> Canvas:
    """Prompts, each repeated group_size times and followed by `length` masks.

    Blocks count from the completion's start, or for a block-causal policy from the prompt's. There `block_aligned`
    pads every prompt by whole blocks, so that all rows begin to write in the same columns. With open positions the
    completion is those and the masks behind, and blocks count them alone.
    """
    spec, device, group = policy.spec, policy.device, prompts.group_size
    assert spec.mask_id is not None, "a diffusion model has a mask token"
    if prompts.open is not None:
        return _infilling(policy, prompts, prompts.open.cpu(), length, block_size)
    mask = repeat(prompts.attention_mask.cpu(), "p s -> (p g) s", g=group)
    sizes = mask.sum(-1) if spec.attention == "block_causal" else torch.zeros(len(mask), dtype=torch.long)
    offsets, full = sizes % block_size, sizes // block_size
    block = (offsets[:, None] + torch.arange(length)) // block_size
    if block_aligned:
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
    tokens.scatter_(-1, columns, torch.full_like(columns, spec.mask_id))
    attention_mask.scatter_(-1, columns, torch.ones_like(columns, dtype=torch.bool))
    return Canvas(
        prompts=prompts,
        tokens=tokens.to(device),
        attention_mask=attention_mask.to(device),
        columns=columns.contiguous().to(device),
        block=block.to(device),
        bounds=[
            (start, min(start + block_size, tokens.shape[1])) for start in range(base, tokens.shape[1], block_size)
        ],
        starts=attention_mask.long().argmax(-1),
        pad_id=policy.pad_id,
        pads_ended=spec.attention == "block_causal",
    )


def _infilling(policy: Policy, prompts: Prompts, opened: Bool[Tensor, "P S"], length: int, block_size: int) -> Canvas:
    """The canvas of prompts with open positions: a row's completion is its open columns, from left to right."""
    assert policy.spec.mask_id is not None, "a diffusion model has a mask token"
    behind = torch.ones(len(opened), length, dtype=torch.bool)
    attended = prompts.attention_mask.cpu()
    opened, mask = torch.cat([opened & attended, behind], dim=1), torch.cat([attended, behind], dim=1)
    tokens = F.pad(prompts.tokens.cpu(), (0, length)).masked_fill(opened, policy.spec.mask_id)
    columns = (~opened).long().argsort(dim=-1, stable=True)[:, : int(opened.sum(-1).max())]
    block = (torch.arange(columns.shape[1]) // block_size).expand_as(columns)
    per_row = lambda x: repeat(x, "p t -> (p g) t", g=prompts.group_size).contiguous().to(policy.device)  # noqa: E731
    return Canvas(
        prompts=prompts,
        tokens=per_row(tokens),
        attention_mask=per_row(mask),
        columns=per_row(columns),
        block=per_row(block),
        bounds=[],  # only caches read them
        starts=repeat(mask.long().argmax(-1), "p -> (p g)", g=prompts.group_size),
        pad_id=policy.pad_id,
        pads_ended=False,
        open=per_row(opened),
    )


class BlockQueue:
    """Host-side bookkeeping: for each row and block, the masked positions and the steps left. Keeping it off the device
    avoids synchronisation.

    Rows move from block to block by themselves, or, in step, wait for the slowest.
    masked  the places that begin masked; None: all of them.
    Of each block: its size and its share of steps, what is masked and left of them, and whether a row stays in it.
    """

    def __init__(
        self,
        block: Int[Tensor, "B L"],
        num_steps: int | None,
        *,
        in_step: bool,
        masked: Bool[Tensor, "B L"] | None = None,
    ) -> None:
        block = block.cpu()
        self.in_step = in_step
        self.masked = torch.zeros(len(block), int(block.max()) + 1, dtype=torch.long).scatter_add(
            -1, block, torch.ones_like(block) if masked is None else masked.cpu().long()
        )
        self.steps = torch.zeros_like(self.masked)
        for row, sizes in enumerate(self.masked):
            self.steps[row, sizes > 0] = torch.tensor(steps_per_block(num_steps, sizes[sizes > 0].tolist()))
        self.sizes, self.shares = self.masked.clone(), self.steps.clone()
        self.held = torch.zeros_like(self.masked, dtype=torch.bool)
        self.clock = torch.zeros(len(block), dtype=torch.long)  # steps that the row has taken part in

    def turn(self) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"]]:
        """The rows that take part in the next step, and the block of each; none when all is done."""
        open_blocks = (self.masked > 0) | self.held
        blocks, taking_part = open_blocks.int().argmax(-1), open_blocks.any(-1)
        if self.in_step and taking_part.any():
            taking_part &= blocks == blocks[taking_part].min()
        rows = taking_part.nonzero()[:, 0]
        return rows, blocks[rows]

    def left(self, rows: Tensor, blocks: Tensor) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"]]:
        """Masked positions of those blocks, and steps left for them (at least 1)."""
        return self.masked[rows, blocks], self.steps[rows, blocks].clamp(min=1)

    def record(
        self, rows: Tensor, blocks: Tensor, committed: Int[Tensor, " R"], held: Bool[Tensor, " R"] | None = None
    ) -> Int[Tensor, " C"]:
        """Take note of a step; returns the rows whose block is now complete. held: rows that stay in their block while
        it has steps left, though nothing may be masked there."""
        self.masked[rows, blocks] -= committed
        self.steps[rows, blocks] -= 1
        self.clock[rows] += 1
        if held is not None:
            self.held[rows, blocks] = held & (self.steps[rows, blocks] > 0)
        return rows[(self.masked[rows, blocks] == 0) & ~self.held[rows, blocks]]

    def drop(self, rows: Tensor) -> None:
        self.masked[rows], self.held[rows] = 0, False
