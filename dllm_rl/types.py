"""Records that the stages of a training step (rollout, scoring, update) pass to each other.

Log-probs are fp32, in nats. Axes: B rows, one per completion; P groups of rows that share a prompt; S prompt positions,
T positions (prompt and completion), V vocabulary, D hidden size, N views of an estimator, K scored positions. The rows
of a group are adjacent, and groups may have different sizes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from types import FunctionType
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

MovableT = TypeVar("MovableT", bound="_Movable")
CopiedT = TypeVar("CopiedT", bound="Copied")
RecordT = TypeVar("RecordT", bound="BatchRecord")
Support = Literal["per_policy", "unfiltered", "rollout"]
SUPPORTS: tuple[Support, ...] = ("per_policy", "unfiltered", "rollout")


class Copied:
    """Base of the dataclasses of tensors that user code gets as copies (`given_copies`), because it may write into
    them.
    """

    def copied(self: CopiedT) -> CopiedT:
        """Return a copy with tensors of its own."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        copies = {field.name: copy_of(getattr(self, field.name)) for field in fields if field.init}
        return dataclasses.replace(self, **copies)  # type: ignore[type-var]


def copy_of(value: Any) -> Any:
    """Return a copy of a tensor, of a `Copied`, or of a tuple of them; any other value as it is."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Copied):
        return value.copied()
    return tuple(map(copy_of, value)) if type(value) is tuple else value


def given_copies(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method of a user's class to get copies (`copy_of`) of its arguments."""

    @wraps(method)
    def wrapped(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return method(self, *map(copy_of, arguments), **{name: copy_of(value) for name, value in keywords.items()})

    return wrapped


def decorate_own(kind: type, decorator: Callable[..., Any], *methods: str) -> None:
    """Decorate those of these methods that a class outside of the library defines, or a mixin of it. Call it in
    `__init_subclass__`.
    """
    for name in methods:
        method = getattr(kind, name, None)
        is_own = not getattr(method, "__module__", "dllm_rl.").startswith("dllm_rl.")
        if isinstance(method, FunctionType) and is_own and not hasattr(method, "is_decorated"):
            decorated = decorator(method)
            decorated.is_decorated = True
            setattr(kind, name, decorated)


@dataclass(frozen=True)
class _Movable(Copied):
    """Base of the records whose tensors move to a device together, and which are cut to some rows together.

    Attributes:
        ROW_AXIS: Axis of the rows in tensors of more than one axis. A vector has one entry per row.
    """

    ROW_AXIS: ClassVar[int] = 0

    def to(self: MovableT, device: torch.device | str) -> MovableT:
        return self.map(lambda x: x.to(device))

    def map(self: MovableT, f: Callable[[Tensor], Tensor]) -> MovableT:
        """Apply `f` to every tensor, including the tensors of nested records, in the order of the fields."""
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = f(value)
            elif isinstance(value, _Movable):
                changes[field.name] = value.map(f)
            elif isinstance(value, tuple):  # of records, such as the features of views
                changes[field.name] = tuple(x.map(f) if isinstance(x, _Movable) else x for x in value)
        return dataclasses.replace(self, **changes)

    def tensors(self) -> list[Tensor]:
        """Return all tensors in the order of `map`."""
        tensors: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        self.map(collect)
        return tensors

    def rows(self: MovableT, keep: Int[Tensor, " R"], columns: slice = slice(None)) -> MovableT:
        """Return the rows with the indices `keep`, in this order, cut to `columns`."""
        before: tuple[Any, ...] = (slice(None),) * self.ROW_AXIS
        return self.map(lambda x: x[keep] if x.dim() == 1 else x[(*before, keep)][(*before, slice(None), columns)])


@dataclass(frozen=True)
class BatchRecord(_Movable):
    """A record of per-row data: tensors (B, T) or (B, T, C), vectors (B,), and nested records of the same kind.

    Attributes:
        FILL: Padding value of each field where a row has no token. Fields that are not listed are padded with 0.
        IF_NONE: Value everywhere of a field (B, T) that is None.
        MAY_DIFFER: Fields without rows that may differ between records that are merged; the first one's is taken.
    """

    FILL: ClassVar[dict[str, Any]] = {}
    IF_NONE: ClassVar[dict[str, int | float]] = {}
    MAY_DIFFER: ClassVar[tuple[str, ...]] = ()

    def padded(self: RecordT, columns: int, *, pad_id: int = 0, right: bool = False) -> RecordT:
        """Pad with `columns` columns on the left or right: `tokens` with pad_id, other fields with FILL."""
        fills = {"tokens": pad_id} | self.FILL
        padded_fields: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, BatchRecord):
                padded_fields[field.name] = value.padded(columns, right=right)
            elif isinstance(value, Tensor) and value.dim() > 1:
                no_padding = (0, 0) * (value.dim() - 2)  # of the axes after T
                left_right = (0, columns) if right else (columns, 0)
                padded_fields[field.name] = F.pad(value, (*no_padding, *left_right), value=fills.get(field.name, 0))
        return dataclasses.replace(self, **padded_fields)

    def slots(self) -> list[int]:
        """Return the size C of every tensor (B, T, C), in the order of `map`."""
        return [x.shape[2] for x in self.tensors() if x.dim() == 3]

    def with_slots(self: RecordT, sizes: Iterator[int]) -> RecordT:
        """Pad the last axis of the tensors of `slots` to these sizes."""
        padded_fields: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, BatchRecord):
                padded_fields[field.name] = value.with_slots(sizes)
            elif isinstance(value, Tensor) and value.dim() == 3:
                padded_fields[field.name] = self._pad_last_axis(field.name, next(sizes))
        return dataclasses.replace(self, **padded_fields)

    def _pad_last_axis(self, name: str, size: int) -> Tensor:
        """Return a field (B, T, C) with its last axis padded to `size`."""
        value = getattr(self, name)
        return F.pad(value, (0, size - value.shape[2]), value=self.FILL.get(name, 0))

    @staticmethod
    def merge_records(records: "Sequence[RecordT]", merge_tensors: Callable[[list[Tensor]], Tensor]) -> "RecordT":
        """Merge records of equal width T, field by field; `merge_tensors` merges the tensors of a field.

        A field that is None in any record is None in the result, because a field must have every row. A field of
        IF_NONE has the value that None stands for.

        Raises:
            ValueError: A setting, which holds for all rows of a record, differs.
        """
        merged_fields: dict[str, Any] = {}
        for field in dataclasses.fields(records[0]):
            values = [getattr(record, field.name) for record in records]
            if not any(isinstance(value, Tensor | BatchRecord) for value in values):
                other = next((value for value in values if value != values[0]), values[0])
                if other != values[0] and field.name not in records[0].MAY_DIFFER:
                    raise ValueError(
                        f"{type(records[0]).__name__}.{field.name} is {values[0]} in some rows and {other} in others, "
                        "and holds for all rows of a batch: sample and score them apart"
                    )
                continue
            if field.name in records[0].IF_NONE:
                tensor = next(value for value in values if value is not None)
                default = tensor.new_tensor(records[0].IF_NONE[field.name])
                shapes = [record.tensors()[0].shape for record in records]
                values = [
                    default.repeat(shape) if value is None else value
                    for value, shape in zip(values, shapes, strict=True)
                ]
            if any(value is None for value in values):
                merged_fields[field.name] = None
            elif isinstance(values[0], BatchRecord):
                merged_fields[field.name] = BatchRecord.merge_records(values, merge_tensors)
            else:
                if values[0].dim() == 3:
                    size = max(value.shape[2] for value in values)
                    values = [record._pad_last_axis(field.name, size) for record in records]
                merged_fields[field.name] = merge_tensors(values)
        return dataclasses.replace(records[0], **merged_fields)


MIN_TEMPERATURE = 1e-30  # logits up to 1e8, divided by it, stay finite in float32
FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class SamplingParams:
    """Settings that turn raw logits into the sampling distribution.

    The sampler records them in the rollout, and the learner scores tokens with the same settings.

    Args:
        temperature: Divisor of the logits, 0 or at least 1e-30. 0 is greedy; its log-probs are reported at
            temperature 1.
        top_k: Sample only from the k most likely tokens. None (default): from all.
        top_p: Sample only from the smallest set of tokens with this total probability. None (default): from all.
        suppress: Token ids that are never sampled. A mask token is never sampled either.
        support: Tokens over which log-probs are normalized if top_k or top_p filter: "per_policy" (default),
            "unfiltered" or "rollout"; see `decoding.support`.

    Raises:
        ValueError: A setting is out of its range.
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
        if self.temperature and not MIN_TEMPERATURE <= self.temperature <= FLOAT32.max:
            raise ValueError(
                f"temperature={self.temperature} must be 0 (greedy), or lie in [{MIN_TEMPERATURE:g}, {FLOAT32.max:.2g}]"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None to keep every token")
        if self.top_p is not None and not FLOAT32.tiny <= self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} must lie in (0, 1] and be a number of float32, or None to keep every token"
            )

    @property
    def filters(self) -> bool:
        """Whether top_k or top_p excludes any token."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)


def equal_groups(num_groups: int, num_generations: int) -> Int[Tensor, " B"]:
    """Return the group of each row for groups of equal size: 0, 0, ..., 1, 1, ..."""
    return torch.arange(num_groups).repeat_interleave(num_generations)


def starts_group(group: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Return which rows are the first of their group."""
    return group.diff(prepend=group[:1] - 1) != 0


def group_numbers(group: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Return the number of each row's group, counted from 0 in the order of the rows."""
    return starts_group(group).long().cumsum(0) - 1


def group_sizes(group: Int[Tensor, " B"]) -> list[int]:
    """Return the number of rows of each group."""
    return group.unique_consecutive(return_counts=True)[1].tolist()


def any_in_group(flags: Bool[Tensor, " B"], group: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Return for each row whether a flag of any row of its group is set."""
    number = group_numbers(group)
    return torch.zeros_like(number).scatter_reduce(0, number, flags.long(), "amax").bool()[number]


@dataclass(frozen=True)
class Prompts(BatchRecord):
    """Left-padded prompts, one row for each completion that a sampler makes.

    Build them with `Prompts.from_ids`.

    Args:
        tokens: Token ids (B, S).
        attention_mask: False on padding.
        group: Group of each row. The rows of a group are adjacent, and the samplers of this library run a prompt that
            they share once.
        seeds: One seed per row for the row's random numbers. None (default): the sampler draws seeds from its
            generator.
        infill_mask: Positions inside the prompts that the policy fills in. They count as completion. None (default): no
            such positions.
        reads_order: Whether the log-prob of the order (`Order.logprobs`) is read. If not, samplers do not record it,
            which under `Confidence` takes a second product of the model's head in every step. Default: True.
    """

    tokens: Int[Tensor, "B S"]
    attention_mask: Bool[Tensor, "B S"]
    group: Int[Tensor, " B"]
    seeds: Int[Tensor, " B"] | None = None
    infill_mask: Bool[Tensor, "B S"] | None = None
    reads_order: bool = True

    @classmethod
    def from_ids(
        cls,
        ids: Sequence[Sequence[int]],
        *,
        pad_id: int,
        num_generations: int | Sequence[int] = 1,
        seeds: Sequence[int] | None = None,
        mask_id: int | None = None,
        open_positions: Sequence[Sequence[bool]] | None = None,
    ) -> "Prompts":
        """Left-pad lists of token ids into one batch.

        Args:
            ids: One list of token ids per prompt.
            pad_id: Token id of the padding.
            num_generations: Completions of every prompt, or of each. Default: 1.
            seeds: One seed per row. None (default): the sampler draws them.
            mask_id: Token id that marks positions to fill in. None (default): no such id.
            open_positions: One list of bools per prompt that marks positions to fill in, instead of `mask_id`.

        Returns:
            The prompts, each in as many adjacent rows as it has completions. `infill_mask` is None if no position is to
            be filled in.

        Raises:
            ValueError: `ids` is empty, a number of completions is below 1, or the lengths of `num_generations`, `seeds`
                or `open_positions` do not fit `ids`.
        """
        if not len(ids):
            raise ValueError("ids is empty: at least one prompt is needed")
        counts = [num_generations] * len(ids) if isinstance(num_generations, int) else list(num_generations)
        if len(counts) != len(ids) or min(counts) < 1:
            raise ValueError(f"num_generations={num_generations} must be at least 1, for each of {len(ids)} prompts")
        if seeds is not None and len(seeds) != sum(counts):
            raise ValueError(f"seeds has {len(seeds)} entries; {sum(counts)} rows of {len(ids)} prompts need one each")
        if mask_id is not None:
            if open_positions is not None:
                raise ValueError("mask_id and open_positions both mark positions to fill in; give one of them")
            open_positions = [[token == mask_id for token in row] for row in ids]
        lengths = torch.tensor(list(map(len, ids)))
        if open_positions is not None and list(map(len, open_positions)) != lengths.tolist():
            raise ValueError("open_positions must have one bool for each token id of each prompt")
        width = max(1, int(lengths.max()))  # a batch of empty prompts still has a column, which nothing attends to
        is_token = torch.arange(width) >= width - lengths[:, None]
        tokens = torch.full(is_token.shape, pad_id)
        tokens[is_token] = torch.tensor([token for row in ids for token in row], dtype=torch.long)
        infill_mask = None
        if open_positions is not None and any(map(any, open_positions)):  # without any, samplers do less work
            infill_mask = torch.zeros_like(is_token)
            infill_mask[is_token] = torch.tensor(
                [is_open for row in open_positions for is_open in row], dtype=torch.bool
            )
        prompts = cls(tokens, is_token, group=torch.arange(len(ids)), infill_mask=infill_mask)
        prompts = prompts.rows(prompts.group.repeat_interleave(torch.tensor(counts)))
        return dataclasses.replace(prompts, seeds=None if seeds is None else torch.tensor(seeds, dtype=torch.long))

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each row's prompt, without padding and without positions to fill in."""
        prompt_mask = self.attention_mask if self.infill_mask is None else self.attention_mask & ~self.infill_mask
        return prompt_mask.sum(-1).tolist()

    def shared_rows(self, rows: Int[Tensor, " R"]) -> tuple[Int[Tensor, " r"], Int[Tensor, " R"]]:
        """Return the rows that a forward of the bare prompts needs, and for each of `rows` the index of the one that it
        equals. Adjacent rows of a group with the same prompt need one.

        Args:
            rows: Rows of the forward, in ascending order, on the host.
        """
        differs = starts_group(self.group.cpu()[rows])
        for field in (self.tokens, self.attention_mask, self.infill_mask):
            if field is not None:
                values = field.cpu()[rows]
                differs[1:] |= (values[1:] != values[:-1]).any(-1)
        return rows[differs], differs.long().cumsum(0) - 1

    def split(self, rows: int) -> "list[Prompts]":
        """Split into batches of at most `rows` rows. A group is split only if it is larger.

        Raises:
            ValueError: The prompts have no seeds, so that a row would depend on the split.
        """
        if self.seeds is None:
            raise ValueError(f"rows={rows}: every row needs a seed, so that it does not depend on the split")
        return [self.rows(batch) for batch in pack_groups(torch.arange(len(self.tokens)), self.group, rows)]


def pack_groups(
    rows: Int[Tensor, " R"], group: Int[Tensor, " R"], size: int | None, *, one_row_each: bool = False
) -> list[Int[Tensor, " r"]]:
    """Split rows into batches of at most `size` rows, or return one batch for None. A group is split only if it is
    larger.

    Args:
        rows: Indices of rows, on the host.
        group: Group of each of these rows.
        size: Largest number of rows of a batch.
        one_row_each: Whether each group counts as one row, so that a batch has at most `size` groups. Default: False.
    """
    if size is None:
        return [rows] if len(rows) else []
    sizes = group_sizes(group)
    if one_row_each:
        return list(rows.split([sum(sizes[first : first + size]) for first in range(0, len(sizes), size)]))
    counts = [0]  # rows of each batch
    for count in sizes:
        if counts[-1] + count > size:
            counts.append(0)
        while count > size:
            counts[-1:] = [size, 0]
            count -= size
        counts[-1] += count
    return [batch for batch in rows.split(counts) if len(batch)]


@dataclass(frozen=True)
class FilterSupport(BatchRecord):
    """The support of a distribution that top_k or top_p filtered, per sampled token (`decoding.support`).

    Args:
        log_mass: Log of the total probability of the tokens that pass the filter, in nats; 0 where no token was drawn.
        ids: Ids of these tokens, at most `support.MAX_SUPPORT_IDS` per position, padded with -1. None if any position
            has more.
    """

    FILL: ClassVar[dict[str, Any]] = {"ids": -1}

    log_mass: Float[Tensor, "B T"]
    ids: Int[Tensor, "B T C"] | None


@dataclass(frozen=True)
class Order(BatchRecord):
    """The order in which a sampler wrote the positions, and its probability (`decoding.order`).

    Args:
        block_first_step: First step of the position's block; -1 outside the completion.
        rank_name: Name of the sampler's rank, the class of a rank of `samplers.rules`. None: another rank.
        logprobs: Log-probability, in nats, that the position stayed masked in the earlier steps of its block; under
            `PlackettLuce`, that its step drew the position; 0 elsewhere. None if the order is not random, its
            probability is unknown, or the prompts have reads_order=False.
        probability: Status of the order's probability, as `samplers.rules.order_probability` returns it.
        rank_function: Rank by whose scores the positions were drawn: the `PlackettLuce`, or `MaxProb` under
            `SoftThreshold`. None if the positions were not drawn, or if their scores depend on the tokens.
        draw_index: Number of the draw, from 0, that selected the position within its step; 0 in a step that wrote all
            remaining positions.
        soft_threshold_params: Tau and temperature of the commit rule `SoftThreshold`; `logprobs` then holds each
            written position's share of its step's log-prob. None under other rules.
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
    """All writes and remaskings of each position, in order, under a rewriting rule (`Remask`, `Edit`, `SoftEdit`).

    Args:
        step: Step of event w of the position; -1 after its last event.
        token: Token that was written; -1 where the position was masked again.
        logprobs: Log-prob of the token in that step, in nats; 0 where the position was masked again.
        depends_on_tokens: Whether rewrites depend on the drawn tokens. If so, the events do not determine the
            likelihood.
    """

    FILL: ClassVar[dict[str, Any]] = {"step": -1, "token": -1}

    step: Int[Tensor, "B T W"]
    token: Int[Tensor, "B T W"]
    logprobs: Float[Tensor, "B T W"]
    depends_on_tokens: bool = False


@dataclass(frozen=True)
class Renoised(BatchRecord):
    """What happened at each position in each step under `Renoise`: all data that its likelihood needs.

    W is the largest number of steps of a canvas.

    Args:
        block: Index of the position's canvas, from 0; -1 elsewhere.
        seen: Token on the canvas before step w; -1 after the last step whose draw counts.
        drawn: Accepted draw of step w; -1 where the draw was rejected or has no effect.
        logprobs: Log-prob of that draw, in nats; 0 where there is no draw.
        temperatures: Temperatures of a canvas's steps, at least W of them.
    """

    FILL: ClassVar[dict[str, Any]] = {"block": -1, "seen": -1, "drawn": -1}

    block: Int[Tensor, "B T"]
    seen: Int[Tensor, "B T W"]
    drawn: Int[Tensor, "B T W"]
    logprobs: Float[Tensor, "B T W"]
    temperatures: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rollout(BatchRecord):
    """The completions that a sampler produced, with the data that scoring them needs.

    A custom sampler fills the fields without a default, `weights_version` and `sampling_params`, and `events` if it
    rewrites tokens (recipes/examples/sampler_at_once.py).

    Args:
        tokens: Prompt and completion token ids.
        attention_mask: False on padding; always passed to the model.
        completion_mask: True where the policy chose the token.
        unmask_step: Step that committed the token (autoregressive: 0, 1, 2 ...); -1 elsewhere.
        logprobs: Log-prob of the token when it was committed, under the rollout policy's sampling distribution, in
            nats; 0 elsewhere.
        group: Group of each row; the rows of a group are adjacent. A completion's reward is compared with those of its
            group.
        weights_version: Version of the weights that sampled; the oldest, if rollouts were put together.
        sampling_params: Temperature and filters of the sampling distribution; the learner uses the same.
        forwards: Model calls that sampling the batch took.
        filter_support: Support of a filtered distribution. This field and the next ones are None if the sampler records
            nothing for them.
        order: Order of a sampler that unmasks.
        events: Events of a rule that rewrites; unmask_step and logprobs then describe a position's last write only.
        renoised: Steps of a sampler that replaces tokens by random ones; logprobs are then sums over a position's
            draws.
        batch_row: Index of each row in the global batch, on which its masks depend. None (default): rows are in order.
        loss_weights: Weight of each token in all terms of the loss. None (default): 1.
        first_step: Step from which the column is on the canvas, for tokens that a tool wrote between two turns and for
            positions of later turns; 0 for the first canvas. None (default): all columns are there from the start.
    """

    FILL: ClassVar[dict[str, Any]] = {"attention_mask": False, "completion_mask": False, "unmask_step": -1}
    IF_NONE: ClassVar[dict[str, int | float]] = {"loss_weights": 1, "first_step": 0}
    MAY_DIFFER: ClassVar[tuple[str, ...]] = ("weights_version", "forwards")

    tokens: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    completion_mask: Bool[Tensor, "B T"]
    unmask_step: Int[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"]
    group: Int[Tensor, " B"]
    weights_version: int = 0
    sampling_params: SamplingParams = SamplingParams()
    forwards: int = 0
    filter_support: FilterSupport | None = None
    order: Order | None = None
    events: Events | None = None
    renoised: Renoised | None = None
    batch_row: Int[Tensor, " B"] | None = None
    loss_weights: Float[Tensor, "B T"] | None = None
    first_step: Int[Tensor, "B T"] | None = None

    def replace_rows(self, rows: Int[Tensor, " R"], by: "Rollout", *, pad_id: int) -> "Rollout":
        """Replace `rows` by the rows of another rollout; they keep their groups. The narrower rollout is padded on the
        left.
        """
        width = max(self.tokens.shape[1], by.tokens.shape[1])
        padded = [rollout.padded(width - rollout.tokens.shape[1], pad_id=pad_id) for rollout in (self, by)]
        merged = BatchRecord.merge_records(padded, lambda pair: pair[0].index_copy(0, rows, pair[1]))
        return dataclasses.replace(merged, group=self.group, forwards=self.forwards + by.forwards)

    @classmethod
    def concatenate(cls, parts: "Sequence[Rollout]", *, pad_id: int) -> "Rollout":
        """Concatenate the rows of all parts, in order. Groups are numbered anew, and rows of different parts are in
        different groups.

        Narrower parts are padded on the right, like rows that end early.
        """
        width = max(part.tokens.shape[1] for part in parts)
        padded_parts = [part.padded(width - part.tokens.shape[1], right=True, pad_id=pad_id) for part in parts]
        starts = torch.cat([starts_group(part.group) for part in parts])
        return dataclasses.replace(
            BatchRecord.merge_records(padded_parts, torch.cat),
            group=starts.long().cumsum(0) - 1,
            weights_version=min(part.weights_version for part in parts),
            forwards=sum(part.forwards for part in parts),
        )


@dataclass(frozen=True)
class Logprobs(Copied):
    """Each position's contribution to the log-probs of one rollout, in nats; 0 where a position is not scored."""

    old_logprobs: Float[Tensor, "B T"]  # under the learner at the start of the update
    old_view_logprobs: Float[Tensor, "N B T"]  # the same per view
    rollout_logprobs: Float[Tensor, "B T"]  # under the policy that sampled
    reference_logprobs: Float[Tensor, "B T"] | None  # under the reference policy, or None without a KL term
    views: "Views"
    entropy: Float[Tensor, "B T"] | None = None  # entropy of the learner's distributions, if a corrector needs it
    token_advantages: Float[Tensor, "B T"] | None = None  # of a feature; None: those of rows
    is_scored: bool = True  # False: no policy scored these views, since no update reads the log-probs, which are 0


class RetainedGraphs:
    """Autograd graphs of the forwards that score a rollout, so that an update does not run these forwards again.

    `LikelihoodEstimator.view_logprobs` adds graphs while there is room, and `LikelihoodEstimator.backward` frees them.

    Args:
        rows: Rows whose graphs are retained: those that the update trains on.
        limit: Largest number of forwards whose graphs are retained. None (default): one, and more while all graphs
            together keep at most about `MAX_BYTES`.
    """

    MAX_BYTES = 2**28

    def __init__(self, rows: Bool[Tensor, " B"], limit: int | None = None) -> None:
        self.rows = rows
        self.limit = limit
        self.logprobs: dict[Any, Tensor] = {}
        self.bytes_of: dict[int, int] = {}  # bytes of each storage that the graphs keep
        self.largest = 0  # most bytes that one graph added

    def has_room(self, num_forwards: int = 1) -> bool:
        """Return whether the graph of a view of so many forwards may be retained."""
        if self.limit is not None:
            return (len(self.logprobs) + 1) * num_forwards <= self.limit
        # A view of several forwards (`Renoise`) has all their graphs: only a limit allows it.
        has_bytes = not self.logprobs or sum(self.bytes_of.values()) + self.largest <= self.MAX_BYTES
        return has_bytes and num_forwards == 1

    def add(self, key: Any, score: Callable[[], Tensor], module: Any) -> Tensor:
        """Retain the graph of the log-probs `score()`, and return them without it. `module` has the weights, whose
        bytes do not count.
        """
        if self.limit is None and not self.logprobs:
            self.bytes_of = {weight.untyped_storage().data_ptr(): 0 for weight in module.parameters()}
            self.largest = 0

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            self.bytes_of.setdefault(storage.data_ptr(), storage.nbytes())
            return tensor.detach()  # the tensor itself may hold the graph that holds it

        before = sum(self.bytes_of.values())
        counted = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with torch.enable_grad(), counted if self.limit is None else nullcontext():
            logprobs = score()
        self.largest = max(self.largest, sum(self.bytes_of.values()) - before)
        if logprobs.requires_grad:  # it does not if nothing is scored
            self.logprobs[key] = logprobs
        return logprobs.detach()


def single_process_sum(total: Tensor) -> Tensor:
    """Return `total` unchanged: with one process, it is the sum over all processes."""
    return total


@dataclass(frozen=True)
class Batch:
    """All data of one optimizer update. Rows belong to this process; counts cover all processes."""

    rollout: Rollout
    views: "Views"
    advantages: Float[Tensor, " B"] | Float[Tensor, "B T"]  # one per row, or one per token
    old_logprobs: Float[Tensor, "B T"]  # denominator of the ratios; the rollout's log-probs with old_logprobs="rollout"
    old_view_logprobs: Float[Tensor, "N B T"]  # the learner's, per view; the first inner step reuses them
    importance_weights: Float[Tensor, "B T"]  # the corrector's, detached
    loss_mask: Bool[Tensor, "B T"]  # positions that stay in the loss
    reference_logprobs: Float[Tensor, "B T"] | None  # log-probs under the reference policy, or None without a KL term
    num_tokens: int  # denominators of the loss, over the global batch
    num_sequences: int
    rollout_logprobs: Float[Tensor, "B T"] | None = None  # log-probs under the policy that sampled; None: unknown
    sum_over_processes: Callable[[Tensor], Tensor] = single_process_sum  # sums a tensor over all processes
    graphs: RetainedGraphs | None = None  # of the forwards that scored it, and of those of later updates
    is_scored: bool = True  # False: the log-probs before the update are 0, which the loss does not read
    inverse_chances: Float[Tensor, "B T"] | None = None  # see `Views`; None: every token of the loss counts once


@dataclass(frozen=True)
class ViewTensors(_Movable):
    """Tensors that an optional feature adds to the views of an estimate: (N, B, T, ...) or (B,).

    Subclass it for tensors that are only stored with the views. Subclass `likelihoods.views.ViewFeature` for a feature
    that changes how views are scored.
    """

    ROW_AXIS: ClassVar[int] = 1
    is_per_token: ClassVar[bool] = True  # whether each contribution is the log-prob of one token

    @property
    def num_forwards(self) -> int:
        """The number of model forwards per view whose graphs would be retained together."""
        return 1

    def sampler_logprobs(self, rollout: Rollout, logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Return the log-probs that the sampler recorded, in nats; without this feature they would be `logprobs`."""
        return logprobs


@dataclass(frozen=True)
class Views(_Movable):
    """The masked versions of a batch that a likelihood estimate scores, the same for every policy.

    An estimator draws them once, and they stay with the batch.

    Args:
        masked: Positions hidden from the model in view n.
        coefficients: Coefficient of the position's log-prob in view n, of either sign; 0 where the position is not
            scored.
        features: Tensors of optional features, in the order in which they change a view, and an estimator's additional
            tensors.
        inverse_chances: 1 / the chance with which the token's denoising step was drawn (`draw_steps`), by which the
            loss multiplies the token's gradient; 0 where the step was not drawn, and the token is not scored. None
            (default): nothing was drawn.
    """

    ROW_AXIS: ClassVar[int] = 1

    masked: Bool[Tensor, "N B T"]
    coefficients: Float[Tensor, "N B T"]
    features: tuple[ViewTensors, ...] = ()
    inverse_chances: Float[Tensor, "1 B T"] | None = None

    def restrict_to_rows(self, live: Bool[Tensor, " B"]) -> "Views":
        """Return views with the same masks that score only the rows in `live`."""
        return dataclasses.replace(self, coefficients=self.coefficients * live[:, None])

    def scored(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Return `mask` restricted to the rows that any view scores, and to the tokens of the steps that were drawn."""
        scored = mask & (self.coefficients != 0).any(0).any(-1, keepdim=True)
        return scored if self.inverse_chances is None else scored & (self.inverse_chances[0] > 0)
