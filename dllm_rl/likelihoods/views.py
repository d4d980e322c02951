"""A view of a batch: the positions hidden from the model, and the positions that are scored.

A view scores itself in one forward, and computes its backward for a given vector. The plain view hides masked
positions, runs the policy, and scores the rollout's tokens. An optional feature replaces one of a view's three
functions (`ViewFeature.apply_to`): what the model sees, its forward, or how states become log-probs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from dllm_rl.device import send
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.buckets import length_buckets
from dllm_rl.models.logprobs import backward_token_logprobs, token_logprobs
from dllm_rl.models.support import ids_at
from dllm_rl.types import Rollout, Views, ViewTensors


@dataclass(frozen=True)
class Chunk:
    """Rows that go through the model together."""

    rows: Int[Tensor, " R"]
    columns: slice  # from their first unpadded one

    def of(self, rollout: Rollout, views: Views) -> tuple[Rollout, Views]:
        return rollout.rows(self.rows, self.columns), views.rows(self.rows, self.columns)


def row_chunks(rollout: Rollout, views: Views, micro_batch_size: int | None) -> list[Chunk]:
    """Return the groups that any view scores, as chunks of complete groups of similar length.

    A chunk has at most micro_batch_size rows, or one group.
    """
    group = rollout.group_size
    scored = rearrange((views.coefficients != 0).any(0).any(-1), "(p g) -> p g", g=group).any(-1)
    first = rearrange(rollout.attention_mask.long().argmax(-1), "(p g) -> p g", g=group).amin(-1)
    chosen, starts = torch.stack([scored, first]).cpu()  # one wait for the device
    size = len(chosen) if micro_batch_size is None else max(1, micro_batch_size // group)
    width = rollout.tokens.shape[1]
    found = []
    # A row is scored at the width at which it was sampled: another width rounds differently.
    for bucket in length_buckets(starts.repeat_interleave(group), width, rollout.tokens.device):
        groups = bucket.rows[::group] // group
        for part in groups[chosen[groups] != 0].split(size):
            if len(part):  # a bucket may have nothing to score
                rows = rearrange(part[:, None] * group + torch.arange(group), "p g -> (p g)")
                (rows,) = send(rollout.tokens.device, rows)
                found.append(Chunk(rows, slice(bucket.start, width)))
    return found


class Plan(NamedTuple):
    """Which rows go through the model for a view, and where its K scored positions are."""

    rows: Int[Tensor, " R"]  # of the forward: one of each group if `together`, else `live`
    together: bool  # one forward serves each group: its completions look the same to the model
    live: Int[Tensor, " L"]  # rows with a scored position
    inside: Int[Tensor, " K"]  # where the positions are in the flattened states
    places: Int[Tensor, " K"]  # where they are in the flattened batch
    plain: Int[Tensor, " M"]  # which of the K are not marked; all in a plain view
    marked: Int[Tensor, " J"]  # which of the K are marked (`Scoring.marks`)


class ViewStates(NamedTuple):
    """The result of a view's forward: the states and the tokens at its K scored positions."""

    plan: Plan
    states: Float[Tensor, "K D"]
    tokens: Int[Tensor, " K"]
    kept: Int[Tensor, "K C"] | None  # ids over which log-probs are normalized (`models.support`); None: all


@runtime_checkable
class Scoring(Protocol):
    """Functions that turn the states of a view into the log-probs of its K positions."""

    @property
    def marks(self) -> Bool[Tensor, "B T"] | None:
        """Positions that are scored differently, listed in `Plan.marked`. None: no positions."""

    def needed(self, rollout: Rollout, at: Bool[Tensor, "B T"], scored: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Return the positions that a backward must score where the vector is not 0 `at` these."""

    def logprobs(self, policy: Policy, rollout: Rollout, seen: ViewStates) -> Float[Tensor, " K"]:
        """Return log-probs in nats, differentiable."""

    def backward(self, policy: Policy, rollout: Rollout, seen: ViewStates, vector: Float[Tensor, " K"]) -> None:
        """Compute `logprobs(...).backward(vector)`."""


class TokenScoring:
    """Scoring of each position separately, by the log-prob of the rollout's token."""

    marks: Bool[Tensor, "B T"] | None = None

    def needed(self, rollout: Rollout, at: Bool[Tensor, "B T"], scored: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        return at

    def logprobs(self, policy: Policy, rollout: Rollout, seen: ViewStates) -> Float[Tensor, " K"]:
        return token_logprobs(policy, seen.states, seen.tokens, rollout.sampling_params, seen.kept)

    def backward(self, policy: Policy, rollout: Rollout, seen: ViewStates, vector: Float[Tensor, " K"]) -> None:
        backward_token_logprobs(policy, seen.states, seen.tokens, rollout.sampling_params, vector, seen.kept)


def as_written(rollout: Rollout) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return the rollout's tokens twice: as the tokens before masking, and as the tokens that are scored."""
    return rollout.tokens, rollout.tokens


def forward(
    policy: Policy,
    plan: Plan,
    tokens: Int[Tensor, "R T"],
    attention_mask: Bool[Tensor, "R T"],
    clean: Int[Tensor, "R T"],
    read: Bool[Tensor, "R T"],
) -> Float[Tensor, "R T D"]:
    """Return the states of a view's tokens.

    Other forwards also use the plan, the rollout's tokens (`clean`), and the positions to `read`.
    """
    return policy.hidden(tokens, attention_mask)


@dataclass(frozen=True)
class View:
    """A view of some rows.

    Args:
        masked: Positions hidden from the model.
        scored: Positions to score.
        canvas: Function of the rollout. It returns the tokens before masking, and the tokens that are scored.
        forward: Function that computes the states of those tokens; see `forward`.
        scoring: Functions that turn states into log-probs.
        share: Whether completions of a prompt that look the same to the model share a forward.
    """

    masked: Bool[Tensor, "B T"]
    scored: Bool[Tensor, "B T"]
    canvas: Callable[[Rollout], tuple[Tensor, Tensor]] = as_written
    forward: Callable[..., Tensor] = forward
    scoring: Scoring = field(default_factory=TokenScoring)
    share: bool = True

    def logprobs(self, policy: Policy, rollout: Rollout) -> Float[Tensor, "B T"]:
        """Run one forward. Return the log-probs at `scored` in nats, 0 elsewhere."""
        out = torch.zeros(self.scored.numel(), device=self.scored.device)
        seen = self.run(policy, rollout, self.scored)
        if seen is not None:
            logps = self.scoring.logprobs(policy, rollout, seen)
            out = out.to(logps.dtype).index_copy(0, seen.plan.places, logps)
        return out.view(self.scored.shape)

    def backward(self, policy: Policy, rollout: Rollout, vector: Float[Tensor, "B T"]) -> None:
        """Compute `logprobs(...).backward(vector)` in one forward and backward.

        Only positions that affect the loss, where `vector` is not 0, are scored; if there are none, no forward runs.
        """
        seen = self.run(policy, rollout, self.scoring.needed(rollout, vector != 0, self.scored))
        if seen is not None:
            self.scoring.backward(policy, rollout, seen, vector.flatten()[seen.plan.places])

    def seen(self, policy: Policy, rollout: Rollout) -> Int[Tensor, "B T"]:
        """Return the tokens that the model sees."""
        return self._masked(policy, self.canvas(rollout)[0])

    def _masked(self, policy: Policy, tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        return tokens if policy.spec.mask_id is None else tokens.masked_fill(self.masked, policy.spec.mask_id)

    def run(self, policy: Policy, rollout: Rollout, at: Bool[Tensor, "B T"]) -> ViewStates | None:
        """Run one forward and return its states `at` these positions, or None, without a forward, if there are none."""
        before, wanted = self.canvas(rollout)
        tokens = self._masked(policy, before)
        plan = plan_view(rollout, tokens, at, self.scoring.marks, share=self.share)
        if plan is None:
            return None
        rows = plan.rows
        read = (self.masked | at)[rows]
        hidden = self.forward(policy, plan, tokens[rows], rollout.attention_mask[rows], rollout.tokens[rows], read)
        if plan.together:
            hidden = repeat(hidden, "p t d -> (p g) t d", g=rollout.group_size)
        states = hidden.flatten(0, 1)[plan.inside]
        return ViewStates(plan, states, wanted.flatten()[plan.places], ids_at(rollout, plan.places))


@dataclass(frozen=True)
class ViewFeature(ViewTensors, ABC):
    """A feature that changes how views are scored: `likelihoods.order`, `.events`, `.packed`, `.renoise`, `.replay`."""

    @abstractmethod
    def apply_to(self, view: View, number: int) -> View:
        """Apply this feature to view `number` and return the new view."""


def each_view(views: Views) -> Iterator[View]:
    """Yield the views one by one, with their features. Scoring and the update both use this function."""
    for number, masked in enumerate(views.masked):
        view = View(masked, views.coefficients[number] != 0)
        for part in views.features:
            if isinstance(part, ViewFeature):
                view = part.apply_to(view, number)
        yield view


def plan_view(
    rollout: Rollout,
    tokens: Int[Tensor, "B T"],
    scored: Bool[Tensor, "B T"],
    marks: Bool[Tensor, "B T"] | None,
    *,
    share: bool,
) -> Plan | None:
    """Make the plan of a view on the host, or None where nothing is scored.

    With `share`, a group may share a forward.
    """
    group = rollout.group_size
    alike = _equal_in_groups(tokens, group) & _equal_in_groups(rollout.attention_mask, group)
    apart = torch.zeros_like(scored) if marks is None else marks
    # The host waits for the device once: three answers return in one copy.
    answers = torch.cat([scored.flatten(), apart.flatten(), alike[None]]).cpu()
    where, mark, same = answers.split([scored.numel(), scored.numel(), 1])
    places = where.nonzero()[:, 0]
    if not len(places):
        return None
    where = where.view(scored.shape)
    live = where.any(-1).nonzero()[:, 0]
    together = share and group > 1 and bool(same)  # as in a first step, where all completions are masked
    inside = places if together else where[live].flatten().nonzero()[:, 0]
    plain = (~mark[places]).nonzero()[:, 0]
    parts = send(scored.device, live, inside, places, plain, mark[places].nonzero()[:, 0])
    rows = torch.arange(0, len(tokens), group, device=scored.device) if together else parts[0]
    return Plan(rows, together, *parts)


def _equal_in_groups(rows: Integer[Tensor, "B T"] | Bool[Tensor, "B T"], group: int) -> Bool[Tensor, ""]:
    groups = rearrange(rows, "(p g) t -> p g t", g=group)
    return (groups == groups[:, :1]).all()
