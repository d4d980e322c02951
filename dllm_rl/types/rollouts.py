"""What a sampler takes and returns: prompts, sampling parameters, rollouts with their order and events.

Log-probs are fp32, in nats. Axes: B rows, one per completion; P groups of rows that share a prompt; S prompt positions,
T positions (prompt and completion), V vocabulary. The rows of a group are adjacent, and groups may have different
sizes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.types.batch_record import BatchRecord
from dllm_rl.types.groups import group_sizes, starts_group

Support = Literal["per_policy", "unfiltered", "rollout"]
SUPPORTS: tuple[Support, ...] = ("per_policy", "unfiltered", "rollout")


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
        """Concatenate the rows of all parts, in order. Groups are renumbered, and rows of different parts are in
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
