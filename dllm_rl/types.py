"""The records of the loop. Log-probs are fp32 nats. Axes: P prompts, G completions each, B = P*G rows (row p*G+g),
S prompt positions, T positions (prompt and completion), V vocabulary, D hidden size, N masks or segments of an
estimator, K scored positions.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

Moved = TypeVar("Moved", bound="_Movable")
Laid = TypeVar("Laid", bound="BatchRecord")
Support = Literal["per_policy", "unfiltered", "rollout"]
SUPPORTS: tuple[Support, ...] = ("per_policy", "unfiltered", "rollout")


@dataclass(frozen=True)
class _Movable:
    """Records of tensors that move to a device as one."""

    def to(self: Moved, device: torch.device | str) -> Moved:
        return self.map(lambda x: x.to(device))

    def map(self: Moved, f: Callable[[Tensor], Tensor]) -> Moved:
        """The same record with `f` of every tensor, also of those that its parts hold, in the order of the fields."""

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return f(value)
            if isinstance(value, tuple):
                return tuple(map(changed, value))
            return value.map(f) if isinstance(value, _Movable) else value

        return dataclasses.replace(self, **{x.name: changed(getattr(self, x.name)) for x in dataclasses.fields(self)})

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of `map`."""
        found: list[Tensor] = []

        def see(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(see)
        return found


@dataclass(frozen=True)
class BatchRecord(_Movable):
    """A record of a batch's columns: tensors (B, T) or (B, T, C), vectors (B,), and parts that are such records.

    Args:
        FILL: What a field's columns hold where there is no token; 0 for other fields.
    """

    FILL: ClassVar[dict[str, Any]] = {}

    def rows(self: Laid, keep: Int[Tensor, " R"], columns: slice = slice(None)) -> Laid:
        """The given rows, in the given order, and their `columns`."""
        return self.map(lambda x: x[keep] if x.dim() == 1 else x[keep][:, columns])  # a vector is of rows

    def padded(self: Laid, columns: int, *, pad_id: int = 0, right: bool = False) -> Laid:
        """The same rows with `columns` more columns of padding on the left, or on the right; `tokens` get pad_id."""
        fills = {"tokens": pad_id} | self.FILL
        wider: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, BatchRecord):
                wider[each.name] = value.padded(columns, right=right)
            elif isinstance(value, Tensor) and value.dim() > 1:
                behind = (0, 0) * (value.dim() - 2)  # axes behind the columns stay as they are
                sides = (0, columns) if right else (columns, 0)
                wider[each.name] = F.pad(value, (*behind, *sides), value=fills.get(each.name, 0))
        return dataclasses.replace(self, **wider)

    def slots(self) -> list[int]:
        """The sizes C of all tensors (B, T, C), in the order of `map`."""
        return [x.shape[2] for x in self.tensors() if x.dim() == 3]

    def with_slots(self: Laid, sizes: Iterator[int]) -> Laid:
        """The same record with the tensors of `slots` filled up to these sizes."""
        wider: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, BatchRecord):
                wider[each.name] = value.with_slots(sizes)
            elif isinstance(value, Tensor) and value.dim() == 3:
                wider[each.name] = self._filled_up(each.name, next(sizes))
        return dataclasses.replace(self, **wider)

    def _filled_up(self, name: str, size: int) -> Tensor:
        """A tensor (B, T, C) with its last axis filled up to `size`."""
        value = getattr(self, name)
        return F.pad(value, (0, size - value.shape[2]), value=self.FILL.get(name, 0))

    @staticmethod
    def merge_records(records: "Sequence[Laid]", unite: Callable[[list[Tensor]], Tensor]) -> "Laid":
        """One record of several of like width, tensor by tensor. What some of them lack is left out: what is known of
        some rows alone is known of no batch.
        """
        changed: dict[str, Any] = {}
        for each in dataclasses.fields(records[0]):
            values = [getattr(record, each.name) for record in records]
            if not any(isinstance(value, Tensor | BatchRecord) for value in values):
                continue
            if any(value is None for value in values):
                changed[each.name] = None
            elif isinstance(values[0], BatchRecord):
                changed[each.name] = BatchRecord.merge_records(values, unite)
            else:
                if values[0].dim() == 3:
                    size = max(value.shape[2] for value in values)
                    values = [record._filled_up(each.name, size) for record in records]
                changed[each.name] = unite(values)
        return dataclasses.replace(records[0], **changed)


@dataclass(frozen=True)
class SamplingParams:
    """What turns raw logits into the sampling distribution; the learner uses the same.

    Args:
        temperature: Divides the logits; 0 is greedy, whose log-probs are reported at temperature 1.
        top_k: Keep the k likeliest tokens / the smallest set with probability >= p; None keeps all.
        top_p: Keep the k likeliest tokens / the smallest set with probability >= p; None keeps all.
        suppress: Token ids that are never sampled (a mask token always is).
        support: The tokens that a scorer normalises over where top_k or top_p filter; see `models.support`.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    suppress: tuple[int, ...] = ()
    support: Support = "per_policy"

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

    Args:
        seeds: One per row (B,), for the row's own random numbers; None: the sampler draws them from its generator.
        infill_mask: Positions inside the prompts to fill in (infilling), part of the completion; None: there are none.
    """

    tokens: Int[Tensor, "P S"]
    attention_mask: Bool[Tensor, "P S"]
    group_size: int = 1
    seeds: Int[Tensor, " B"] | None = None
    infill_mask: Bool[Tensor, "P S"] | None = None

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
        Raises ValueError on an empty batch or a group_size below 1.
        """
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
            infill_mask=_opened(ids, mask_id, open_positions),
        )

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0] * self.group_size

    @property
    def lengths(self) -> list[int]:
        """How many tokens each prompt gives; positions to fill in are none of them."""
        given = self.attention_mask if self.infill_mask is None else self.attention_mask & ~self.infill_mask
        return given.sum(-1).tolist()

    def split(self, rows: int) -> "list[Prompts]":
        """Batches of at most `rows` completions in whole groups; ValueError where a group is larger or has no seeds."""
        size = rows // self.group_size
        if not size or self.seeds is None:
            raise ValueError(f"rows={rows} must hold a group of {self.group_size}, and every row have its seed")
        return [self._part(start, start + size) for start in range(0, len(self.tokens), size)]

    def _part(self, first: int, last: int) -> "Prompts":
        seeds = slice(first * self.group_size, last * self.group_size)  # of rows; all else is of prompts
        return self.map(lambda x: x[first:last] if x.dim() > 1 else x[seeds])


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


@dataclass(frozen=True)
class FilterSupport(BatchRecord):
    """What top_k and top_p kept of the distribution that a token was drawn from (`models.support`).

    Args:
        log_mass: Log of its probability; nats, 0 where no token was drawn.
        ids: Ids of the kept tokens, at most `support.KEPT_IDS`, then -1. None where somewhere more were kept.
    """

    FILL: ClassVar[dict[str, Any]] = {"ids": -1}

    log_mass: Float[Tensor, "B T"]
    ids: Int[Tensor, "B T C"] | None


@dataclass(frozen=True)
class Order(BatchRecord):
    """In which order a sampler wrote, and with which probability (`models.order`, `likelihoods.order`).

    Args:
        block_first_step: The first step of the position's block; -1 elsewhere.
        rank_name: Name of the sampler's rank, one of `samplers.records.RANKS`; None: another.
        logprobs: Log-prob (nats, 0 elsewhere) that its block's earlier steps left the position, or, under
            `plackett_luce`, that its step drew it. None without chance, or if the probability is unknown.
        probability: What is known of it, as `samplers.records.order_probability` says.
        rank_function: The rank by whose scores the positions were drawn: the bound `plackett_luce`, or `max_prob` under
            `soft_threshold`; None if they were not drawn, or by the tokens.
        draw_index: Which draw of its step took the position, from 0; 0 in a step that wrote all that was left.
        soft_threshold_params: Tau and temperature of the commit rule `soft_threshold`; `logprobs` are then each written
            position's share of its step's. None under another rule.
    """

    FILL: ClassVar[dict[str, Any]] = {"block_first_step": -1}

    block_first_step: Int[Tensor, "B T"]
    rank_name: str | None = None
    logprobs: Float[Tensor, "B T"] | None = None
    rank_function: Callable | None = None
    draw_index: Int[Tensor, "B T"] | None = None
    soft_threshold_params: tuple[float, float] | None = None
    probability: str = "unknown"


@dataclass(frozen=True)
class Events(BatchRecord):
    """Every event of each position under a commit rule that rewrites (`remask`, `edit`, `soft_edit`), in order.

    Args:
        step: Of the event; -1 behind a position's last one.
        token: The token written; -1 where the position was masked again.
        logprobs: Of the token, as drawn in that step; nats, 0 where masked again.
        depends_on_tokens: Rewrites depend on the drawn tokens, so events alone do not give the likelihood.
    """

    FILL: ClassVar[dict[str, Any]] = {"step": -1, "token": -1}

    step: Int[Tensor, "B T W"]
    token: Int[Tensor, "B T W"]
    logprobs: Float[Tensor, "B T W"]
    depends_on_tokens: bool = False


@dataclass(frozen=True)
class Renoised(BatchRecord):
    """Every step of each position under `renoise`, W a canvas's most steps: all that its likelihood needs.

    Args:
        block: The canvas of each position, from 0; -1 elsewhere.
        seen: The token on the canvas that step w saw; -1 behind the last step of which a draw counts.
        drawn: The accepted draw of step w; -1 where the draw was not accepted, or decides nothing.
        logprobs: Of that draw; nats, 0 where there is none.
        temperatures: Of a canvas's steps, of which W or more are known.
    """

    FILL: ClassVar[dict[str, Any]] = {"block": -1, "seen": -1, "drawn": -1}

    block: Int[Tensor, "B T"]
    seen: Int[Tensor, "B T W"]
    drawn: Int[Tensor, "B T W"]
    logprobs: Float[Tensor, "B T W"]
    temperatures: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rollout(BatchRecord):
    """What a sampler did.

    Args:
        attention_mask: False on padding; always passed to the model.
        completion_mask: True where the policy chose the token.
        unmask_step: Step that committed the token (autoregressive: 0, 1, 2 ...); -1 elsewhere.
        logprobs: At commit, under the rollout policy, of the sampling distribution; nats; 0 elsewhere.
        sampling_params: That distribution's temperature and filters, which the learner uses too.

    Parts that only some samplers record; None where there is nothing to record:

    Args:
        filter_support: Of a filtered distribution.
        order: Of a sampler that unmasks.
        events: Of a rule that rewrites; unmask_step and logprobs are then of a position's last writing alone.
        experts: Expert ids in M mixtures, of the state that the token was drawn from; undefined without a token.
        renoised: Of a sampler that replaces tokens by random ones; logprobs are then sums over a position's draws.
        confidence_change: Summed change of the confidence of the masked positions near the token in the step after it
            was written, in [-1, 1] each; 0 elsewhere. `unmask(confidence_radius=...)` records it.
    """

    FILL: ClassVar[dict[str, Any]] = {"attention_mask": False, "completion_mask": False, "unmask_step": -1}

    tokens: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    completion_mask: Bool[Tensor, "B T"]
    unmask_step: Int[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"]
    group_size: int
    weights_version: int = 0
    sampling_params: SamplingParams = SamplingParams()
    forwards: int = 0  # model calls, counted per batch
    filter_support: FilterSupport | None = None
    order: Order | None = None
    events: Events | None = None
    experts: Integer[Tensor, "B T M E"] | None = None
    renoised: Renoised | None = None
    confidence_change: Float[Tensor, "B T"] | None = None
    batch_row: Int[Tensor, " B"] | None = None  # in the global batch, by which masks are drawn; None: rows are in order

    def replace_rows(self, rows: Int[Tensor, " R"], by: "Rollout", *, pad_id: int) -> "Rollout":
        """This rollout with `rows` replaced by another's; the narrower of the two is padded on the left."""
        width = max(self.tokens.shape[1], by.tokens.shape[1])
        both = [each.padded(width - each.tokens.shape[1], pad_id=pad_id) for each in (self, by)]
        found = BatchRecord.merge_records(both, lambda pair: pair[0].index_copy(0, rows, pair[1]))
        return dataclasses.replace(found, forwards=self.forwards + by.forwards)

    @classmethod
    def concatenate(cls, parts: "Sequence[Rollout]", *, pad_id: int) -> "Rollout":
        """The rows of all parts, in order; narrower parts are padded on the right, like rows that ended early."""
        width = max(part.tokens.shape[1] for part in parts)  # parts end where their longest row ends
        alike = [part.padded(width - part.tokens.shape[1], right=True, pad_id=pad_id) for part in parts]
        return dataclasses.replace(
            BatchRecord.merge_records(alike, torch.cat), forwards=sum(part.forwards for part in parts)
        )


@dataclass(frozen=True)
class Logprobs:
    """Log-prob contributions of one rollout under every policy of a step; nats, 0 where none is scored."""

    old_logprobs: Float[Tensor, "B T"]  # under the learner at the start of the update
    old_view_logprobs: Float[Tensor, "N B T"]  # the same per mask, with kept graphs if any
    rollout_logprobs: Float[Tensor, "B T"]  # under the policy that sampled
    reference_logprobs: Float[Tensor, "B T"] | None  # under the reference policy, or None without a KL term
    views: "Views"  # with the experts that the learner takes again, if any
    entropy: Float[Tensor, "B T"] | None = None  # of the learner's distributions, where a corrector asks for it


def alone(total: Tensor) -> Tensor:
    """The sum over all processes where there is one."""
    return total


@dataclass(frozen=True)
class Batch:
    """All that one optimiser update needs. Rows are of one process; counts are over all processes."""

    rollout: Rollout
    views: "Views"
    advantages: Float[Tensor, " B"]
    old_logprobs: Float[
        Tensor, "B T"
    ]  # log-probs that ratios are taken against; the rollout's with old_logprobs="rollout"
    old_view_logprobs: Float[Tensor, "N B T"]  # the learner's, per mask (saves the first inner step's forwards)
    importance_weights: Float[Tensor, "B T"]  # detached importance weights of the corrector
    loss_mask: Bool[Tensor, "B T"]  # positions that stay in the loss
    reference_logprobs: Float[Tensor, "B T"] | None  # log-probs under the reference policy, or None without a KL term
    num_tokens: int  # denominators of the loss, over the global batch
    num_sequences: int
    rollout_logprobs: Float[Tensor, "B T"] | None = None  # log-probs under the policy that sampled; None: not known
    sum_over_processes: Callable[[Tensor], Tensor] = alone  # over all processes, on the tensor's device


@dataclass(frozen=True)
class ViewTensors(_Movable):
    """What an optional feature adds to the views of an estimate: a record of tensors (N, B, T, ...) or (B,).

    One that changes how views are scored is a `likelihoods.views.ViewFeature`.
    """

    is_per_token: ClassVar[bool] = True  # whether a contribution is the log-prob of a single token

    @property
    def num_forwards(self) -> int:
        """Forwards of the model in a view, whose graphs would be kept together."""
        return 1

    def sampler_logprobs(self, rollout: Rollout, logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The sampler's recorded contributions, nats, given those of a plain view."""
        return logprobs


@dataclass(frozen=True)
class Views(_Movable):
    """The masks of a likelihood estimate: data that travels with the batch, the same for every policy.

    Args:
        masked: Positions hidden from the model in view n.
        coefficients: Coefficient of the position's log-prob in view n, of either sign; 0 where it is not scored.
        upper_bound_weight: Per row, in [0, 1]: `sandwich`'s; None: lower bound only.
        features: Of optional features, in the order in which they change a view; an estimator's own tensors too.
    """

    masked: Bool[Tensor, "N B T"]
    coefficients: Float[Tensor, "N B T"]
    upper_bound_weight: Float[Tensor, " B"] | None = None
    features: tuple[ViewTensors, ...] = ()

    def rows(self, keep: Int[Tensor, " R"], columns: slice = slice(None)) -> "Views":
        return self.map(lambda x: x[keep] if x.dim() == 1 else x[:, keep][:, :, columns])

    def restrict_to_rows(self, live: Bool[Tensor, " B"]) -> "Views":
        """The same masks, with the other rows not scored."""
        return dataclasses.replace(self, coefficients=self.coefficients * live[:, None])

    def scored(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """`mask` in the rows that any view scores."""
        return mask & (self.coefficients != 0).any(0).any(-1, keepdim=True)
