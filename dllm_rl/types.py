"""The records of the loop. Log-probs are fp32 nats. Axes: P prompts, G completions each, B = P*G rows (row p*G+g),
S prompt positions, T positions (prompt and completion), V vocabulary, D hidden size, N masks or segments of an
estimator, K scored positions."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

Moved = TypeVar("Moved", bound="_Movable")
Support = Literal["own", "unfiltered", "rollout"]
SUPPORTS: tuple[Support, ...] = ("own", "unfiltered", "rollout")
KEPT_IDS = 64  # most tokens of a filtered distribution whose ids a rollout records


@dataclass(frozen=True)
class _Movable:
    """Records of tensors that move to a device as one."""

    def to(self: Moved, device: torch.device | str) -> Moved:
        return self._map(lambda x: x.to(device))

    def _map(self: Moved, f: Callable[[Tensor], Tensor]) -> Moved:
        return dataclasses.replace(self, **{name: f(tensor) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        held = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class SamplingParams:
    """What turns raw logits into the sampling distribution; the learner uses the same.

    temperature   divides the logits; 0 is greedy, whose log-probs are reported at temperature 1
    top_k, top_p  keep the k likeliest tokens / the smallest set with probability >= p; None keeps all
    suppress      token ids that are never sampled (a mask token always is)
    support       the tokens that a scorer normalises over where top_k or top_p filter; see `Rollout.with_support`
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    suppress: tuple[int, ...] = ()
    support: Support = "own"

    def __post_init__(self) -> None:
        if self.support not in SUPPORTS:
            raise ValueError(f"support={self.support!r} is not one of {', '.join(SUPPORTS)}")
        if not (isinstance(self.temperature, int | float) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature!r} must be a number >= 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1], or None to keep every token")

    @property
    def filters(self) -> bool:
        """Whether some tokens are left out by top_k or top_p."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)


@dataclass(frozen=True)
class Prompts(_Movable):
    """Left-padded prompts, each to be completed `group_size` times.

    seeds  one per row (B,), for the row's own random numbers; None: the sampler draws them from its generator
    open   positions inside the prompts to fill in (infilling), part of the completion; None: there are none
    """

    tokens: Int[Tensor, "P S"]
    attention_mask: Bool[Tensor, "P S"]
    group_size: int = 1
    seeds: Int[Tensor, " B"] | None = None
    open: Bool[Tensor, "P S"] | None = None

    @classmethod
    def from_ids(
        cls,
        ids: Sequence[Sequence[int]],
        *,
        pad_id: int,
        group_size: int = 1,
        seeds: Sequence[int] | None = None,
        mask_id: int | None = None,
        open_positions: Sequence[Sequence[bool]] | None = None,
    ) -> "Prompts":
        """Left-pad lists of token ids; `mask_id`, or a list of bools per row, says which positions are to be filled in.
        Raises ValueError on an empty batch or a group_size below 1."""
        if not len(ids):
            raise ValueError("ids is empty: at least one prompt is needed")
        if group_size < 1:
            raise ValueError(f"group_size={group_size} must be at least 1")
        if seeds is not None and len(seeds) != len(ids) * group_size:
            raise ValueError(f"seeds has {len(seeds)} entries; {len(ids)} prompts x {group_size} rows need one each")
        return cls(
            tokens=_left_padded(ids, pad_id, torch.long),
            attention_mask=_left_padded([[True] * len(row) for row in ids], False, torch.bool),
            group_size=group_size,
            seeds=None if seeds is None else torch.tensor(seeds, dtype=torch.long),
            open=_opened(ids, mask_id, open_positions),
        )

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0] * self.group_size

    def split(self, rows: int) -> "list[Prompts]":
        """Batches of at most `rows` completions in whole groups; ValueError where a group is larger or has no seeds."""
        size = rows // self.group_size
        if not size or self.seeds is None:
            raise ValueError(f"rows={rows} must hold a group of {self.group_size}, and every row have its seed")
        return [self._part(start, start + size) for start in range(0, len(self.tokens), size)]

    def _part(self, first: int, last: int) -> "Prompts":
        seeds = slice(first * self.group_size, last * self.group_size)  # of rows; all else is of prompts
        return self._map(lambda x: x[first:last] if x.dim() > 1 else x[seeds])


def _left_padded(rows: Sequence[Sequence[int]], fill: int, dtype: torch.dtype) -> Tensor:
    width = max(1, *map(len, rows))  # a batch of empty prompts still has a column, which nothing attends to
    return torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows], dtype=dtype)


def _opened(
    ids: Sequence[Sequence[int]], mask_id: int | None, positions: Sequence[Sequence[bool]] | None
) -> Bool[Tensor, "P S"] | None:
    if mask_id is not None:
        if positions is not None:
            raise ValueError("mask_id and open_positions both say what is open; give one of them")
        positions = [[token == mask_id for token in row] for row in ids]
    if positions is None:
        return None
    if list(map(len, positions)) != list(map(len, ids)):
        raise ValueError("open_positions must have one bool for each of the ids, row by row")
    found = _left_padded(positions, False, torch.bool)
    return found if found.any() else None  # samplers take shorter paths without any


# What a rollout's columns hold where there is no token; other numbers are 0.
FILLS = {"attention_mask": False, "completion_mask": False, "unmask_step": -1, "open_step": -1, "kept_ids": -1}
FILLS |= {"event_step": -1, "event_token": -1}
EVENTS = ("event_step", "event_token", "event_logprobs")


@dataclass(frozen=True)
class Rollout(_Movable):
    """What a sampler did.

    attention_mask   False on padding; always passed to the model
    completion_mask  True where the policy chose the token
    unmask_step      step that committed the token (autoregressive: 0, 1, 2 ...); -1 elsewhere
    logprobs         at commit, under the rollout policy, of the sampling distribution; nats; 0 elsewhere
    sampling_params  that distribution's temperature and filters, which the learner uses too
    log_kept_mass    log of the probability that top_k and top_p kept, at commit; nats, 0 elsewhere. None: no filter
    kept_ids         ids of the kept tokens, at most KEPT_IDS, then -1. None where nothing filters, or more were kept
    order_logprobs   log-prob (nats, 0 elsewhere) that its block's earlier steps left the position (`models.order`), or
                     that its step drew it (`plackett_luce`). None without chance, or if the probability is unknown
    draw_in_step     which draw of its step took the position, from 0, under `order_rank`, a bound `plackett_luce`;
                     0 in a step that wrote all that was left
    experts          expert ids in M mixtures, of the state that the token was drawn from; undefined without a token

    A sampler that revises (`remask`, `edit`, `soft_edit`) also records every event of each position, in order. Its
    unmask_step and logprobs are of the last writing alone.
    event_step       step of the event; -1 behind a position's last one
    event_token      the token written; -1 where the position was masked again
    event_logprobs   of the token, as drawn in that step; nats, 0 where masked again
    """

    tokens: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    completion_mask: Bool[Tensor, "B T"]
    unmask_step: Int[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"]
    group_size: int
    weights_version: int = 0
    sampling_params: SamplingParams = SamplingParams()
    forwards: int = 0  # model calls, counted per batch
    log_kept_mass: Float[Tensor, "B T"] | None = None
    kept_ids: Int[Tensor, "B T C"] | None = None
    rank: str | None = None  # name of the sampler's rank, one of `samplers.rules.RANKS`; None: another
    open_step: Int[Tensor, "B T"] | None = None  # the first step of the position's block; -1 elsewhere
    order_logprobs: Float[Tensor, "B T"] | None = None
    order_rank: Callable | None = None
    draw_in_step: Int[Tensor, "B T"] | None = None
    experts: Integer[Tensor, "B T M E"] | None = None  # None: not recorded (`records_experts`)
    revised: bool = False  # the commit rule may rewrite what it wrote
    event_step: Int[Tensor, "B T W"] | None = None  # None: a position is written once
    event_token: Int[Tensor, "B T W"] | None = None
    event_logprobs: Float[Tensor, "B T W"] | None = None
    by_draws: bool = False  # rewrites depend on the drawn tokens, so events alone do not give the likelihood
    batch_row: Int[Tensor, " B"] | None = None  # in the global batch, by which noise is drawn; None: rows are in order

    def with_support(self, support: Support) -> "Rollout":
        """The rollout as it is to be scored where top_k or top_p filter; itself where neither does. ValueError when it
        lacks what the convention needs. p is the rollout's distribution, S its kept set, q is the learner's:

        own         each policy normalises over its own kept set and the sampled token. The ratio's mean is not 1
        unfiltered  over the whole vocabulary on both sides. The ratio's mean is q(S)/p(S)
        rollout     over S for every policy (DeepSeek-V3.2's "keep sampling mask", arXiv 2512.02556 [digest]). The
                    ratio's mean is 1: weights are unbiased for the learner in S
        """
        params = self.sampling_params
        if support == params.support or not params.filters:
            return self
        if params.support != "own":
            raise ValueError(f"support={support!r}: the rollout has {params.support!r} already; take the sampler's own")
        if (self.log_kept_mass if support == "unfiltered" else self.kept_ids) is None:
            advice = "sample with this library's samplers, or use 'own'"
            if support == "rollout":
                advice = f"ids are recorded for at most {KEPT_IDS} tokens; lower top_k or top_p, or use 'unfiltered'"
            raise ValueError(f"support={support!r} needs what the sampler kept, which is not recorded: {advice}")
        changed = dataclasses.replace(self, sampling_params=dataclasses.replace(params, support=support))
        if support == "unfiltered" and self.log_kept_mass is not None:
            return dataclasses.replace(changed, logprobs=self.logprobs + self.log_kept_mass)
        return changed

    def rows(self, keep: Int[Tensor, " R"], columns: slice = slice(None)) -> "Rollout":
        """The given rows, in the given order, and their `columns`. group_size must divide the number of rows."""
        return self._map(lambda x: x[keep] if x.dim() == 1 else x[keep][:, columns])  # a vector is of rows

    def replaced(self, rows: Int[Tensor, " R"], by: "Rollout", *, pad_id: int) -> "Rollout":
        """This rollout with `rows` replaced by another's; the narrower of the two is padded on the left."""
        width = max(self.tokens.shape[1], by.tokens.shape[1])
        old = self.padded(width - self.tokens.shape[1], pad_id=pad_id)
        new = by.padded(width - by.tokens.shape[1], pad_id=pad_id)
        counts = list(map(max, old.slots(), new.slots()))
        old = old.with_slots(*counts)
        new = new.with_slots(*counts)
        changed: dict[str, Any] = {"forwards": self.forwards + by.forwards}
        for name, column in old._tensors().items():
            other = getattr(new, name)  # None: what is known of some rows alone is known of no rollout
            changed[name] = None if other is None else column.index_copy(0, rows, other)
        return dataclasses.replace(self, **changed)

    def slots(self) -> tuple[int, int]:
        """The most kept ids of a token, and the most events of a position; 0 where there are none."""
        ids = 0 if self.kept_ids is None else self.kept_ids.shape[-1]
        events = 0 if self.event_step is None else self.event_step.shape[-1]
        return ids, events

    def with_slots(self, ids: int, events: int) -> "Rollout":
        """`kept_ids` padded to `ids` per token, and events to `events` per position."""
        wider: dict[str, Any] = {}
        for name, column in self._tensors().items():
            if name == "kept_ids" or name in EVENTS:
                missing = (ids if name == "kept_ids" else events) - column.shape[-1]
                wider[name] = F.pad(column, (0, missing), value=FILLS.get(name, 0))
        return dataclasses.replace(self, **wider)

    def canvas(self, step: Int[Tensor, "B T"] | None) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """The tokens before the given step of each position, and those that it wrote; -1 if masked, or not written.
        None: the rollout's tokens, which are both where a position is written once."""
        if step is None:
            return self.tokens, self.tokens
        if self.event_step is None or self.event_token is None:
            raise ValueError("the rollout has no events: only a sampler that revises records them")
        known = self.event_step >= 0
        count = (known & (self.event_step < step[..., None])).sum(-1, keepdim=True)
        latest = self.event_token.gather(-1, (count - 1).clamp(min=0))
        first = torch.where(known[..., :1], -1, self.tokens[..., None])  # a position without events never changed
        before = torch.where(count > 0, latest, first)[..., 0]
        return before, torch.where(self.event_step == step[..., None], self.event_token, -1).amax(-1).long()

    @classmethod
    def joined(cls, parts: "Sequence[Rollout]", *, pad_id: int) -> "Rollout":
        """The rows of all parts, in order; narrower parts are padded on the right, like rows that ended early."""
        width = max(part.tokens.shape[1] for part in parts)  # parts end where their longest row ends
        parts = [part.padded(width - part.tokens.shape[1], pad_id=pad_id, right=True) for part in parts]
        counts = [max(column) for column in zip(*(part.slots() for part in parts), strict=True)]
        if any(part.kept_ids is None for part in parts):
            # A part in which more was kept than is recorded: no scorer could use the others' ids.
            parts = [dataclasses.replace(part, kept_ids=None) for part in parts]
        parts = [part.with_slots(*counts) for part in parts]
        changed: dict[str, Any] = {"forwards": sum(part.forwards for part in parts)}
        for name in parts[0]._tensors():
            changed[name] = torch.cat([getattr(part, name) for part in parts])
        return dataclasses.replace(parts[0], **changed)

    def padded(self, columns: int, *, pad_id: int, right: bool = False) -> "Rollout":
        """The same rows with `columns` more columns of padding on the left, or on the right."""
        sides = (0, columns) if right else (columns, 0)
        fills = FILLS | {"tokens": pad_id}  # padding is of the model, the rest is of the record
        wider: dict[str, Any] = {}
        for name, column in self._tensors().items():
            if column.dim() > 1:  # all but batch_row
                behind = (0, 0) * (column.dim() - 2)  # the axes of kept ids and of experts stay as they are
                wider[name] = F.pad(column, (*behind, *sides), value=fills.get(name, 0))
        return dataclasses.replace(self, **wider)


@dataclass(frozen=True)
class Logprobs:
    """Log-prob contributions of one rollout under every policy of a step; nats, 0 where none is scored."""

    old: Float[Tensor, "B T"]  # under the learner at the start of the update
    old_scores: Float[Tensor, "N B T"]  # the same per mask, with kept graphs if any
    rollout: Float[Tensor, "B T"]  # under the policy that sampled
    reference: Float[Tensor, "B T"] | None  # under the reference policy, or None without a KL term
    noise: "Noise"  # with the experts that the learner takes again, if any


def alone(total: Tensor) -> Tensor:
    """The sum over all processes where there is one."""
    return total


@dataclass(frozen=True)
class Batch:
    """All that one optimiser update needs. Rows are of one process; counts are over all processes."""

    rollout: Rollout
    noise: "Noise"
    advantages: Float[Tensor, " B"]
    old: Float[Tensor, "B T"]  # log-probs that ratios are taken against; the rollout's with old_logprobs="rollout"
    old_scores: Float[Tensor, "N B T"]  # the learner's, per mask (saves the first inner step's forwards)
    weights: Float[Tensor, "B T"]  # detached importance weights of the corrector
    keep: Bool[Tensor, "B T"]  # positions that stay in the loss
    reference: Float[Tensor, "B T"] | None  # log-probs under the reference policy, or None without a KL term
    num_tokens: int  # denominators of the loss, over the global batch
    num_sequences: int
    behaviour: Float[Tensor, "B T"] | None = None  # log-probs under the policy that sampled; None: not known
    sum_over: Callable[[Tensor], Tensor] = alone  # over all processes, on the tensor's device


@dataclass(frozen=True)
class Noise(_Movable):
    """The masks of a likelihood estimate: data that travels with the batch, the same for every policy."""

    masked: Bool[Tensor, "N B T"]  # positions hidden from the model in view n
    weight: Float[Tensor, "N B T"]  # coefficient of the position's log-prob in view n; 0 where it is not scored
    upper_bound_weight: Float[Tensor, " B"] | None = None  # per row, in [0, 1]; None: lower bound only
    left: Bool[Tensor, "N B T"] | None = None  # scored by the probability of having been left masked (`models.order`)
    learned: Bool[Tensor, " B"] | None = None  # rows whose graphs scoring may keep; None: all
    experts: Integer[Tensor, "n B T M E"] | None = None  # taken again where `routed`; n=1: for all views
    routed: Bool[Tensor, "N B T"] | None = None  # None: routers choose
    step: Int[Tensor, "N B T"] | None = None  # revised rollouts: view n sees and scores this step (`Rollout.canvas`)

    def rows(self, keep: Int[Tensor, " R"], columns: slice = slice(None)) -> "Noise":
        return self._map(lambda x: x[keep] if x.dim() == 1 else x[:, keep][:, :, columns])

    def routes(self, view: int) -> "tuple[Tensor, Tensor] | None":
        """The expert ids to take again in a view (B, T, M, E), and where (B, T); None: routers choose."""
        if self.experts is None or self.routed is None:
            return None
        return self.experts[view if len(self.experts) > 1 else 0], self.routed[view]

    def seen(self, rollout: Rollout, view: int, mask_id: int | None) -> Int[Tensor, "B T"]:
        before, _ = rollout.canvas(None if self.step is None else self.step[view])
        return before if mask_id is None else before.masked_fill(self.masked[view], mask_id)

    def only(self, live: Bool[Tensor, " B"]) -> "Noise":
        """The same masks, with the other rows not scored."""
        return dataclasses.replace(self, weight=self.weight * live[:, None])

    def scored(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """`mask` in the rows that any view scores."""
        return mask & (self.weight != 0).any(0).any(-1, keepdim=True)
