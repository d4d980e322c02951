"""One forward of one view: its log-probs, and its backward for a given vector."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from dllm_rl.device import send
from dllm_rl.likelihoods.packed import packed_hidden
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.buckets import length_buckets
from dllm_rl.models.forward.routing import Routes, routed
from dllm_rl.models.logprobs import backward_chunked, backward_token_logprobs, token_logprobs
from dllm_rl.models.order import (
    last_committed,
    left_logprobs,
    score_committed,
    score_left,
    token_logprobs_and_confidences,
)
from dllm_rl.types import Noise, Rollout


@dataclass(frozen=True)
class Chunk:
    """Rows that go through the model together, and the columns from their first unpadded one."""

    rows: Int[Tensor, " R"]
    columns: slice

    def of(self, rollout: Rollout, noise: Noise) -> tuple[Rollout, Noise]:
        return rollout.rows(self.rows, self.columns), noise.rows(self.rows, self.columns)


def row_chunks(rollout: Rollout, noise: Noise, micro_batch_size: int | None) -> list[Chunk]:
    """The groups that any view scores, as chunks of whole groups of like length, of at most micro_batch_size rows (or
    one group)."""
    group = rollout.group_size
    scored = rearrange((noise.weight != 0).any(0).any(-1), "(p g) -> p g", g=group).any(-1)
    first = rearrange(rollout.attention_mask.long().argmax(-1), "(p g) -> p g", g=group).amin(-1)
    chosen, starts = torch.stack([scored, first]).cpu()  # one wait for the device
    size = len(chosen) if micro_batch_size is None else max(1, micro_batch_size // group)
    width = rollout.tokens.shape[1]
    found = []
    # A row is scored at the width at which it was sampled: another width rounds otherwise.
    for bucket in length_buckets(starts.repeat_interleave(group), width, rollout.tokens.device):
        groups = bucket.rows[::group] // group
        for part in groups[chosen[groups] != 0].split(size):
            if len(part):  # a bucket may have nothing to score
                rows = rearrange(part[:, None] * group + torch.arange(group), "p g -> (p g)")
                (rows,) = send(rollout.tokens.device, rows)
                found.append(Chunk(rows, slice(bucket.start, width)))
    return found


def score_view(
    policy: Policy,
    rollout: Rollout,
    masked: Bool[Tensor, "B T"],
    scored: Bool[Tensor, "B T"],
    *,
    left: Bool[Tensor, "B T"] | None = None,
    packed: bool = False,
    routes: Routes | None = None,
    note: Integer[Tensor, "B T M E"] | None = None,
) -> Float[Tensor, "B T"]:
    """One forward: log p of the rollout's tokens at `scored`, with `masked` positions hidden; nats, 0 elsewhere.

    left          positions of `scored` scored by the log-prob of having been left masked (`models.order`)
    packed        every block sees the others without masks (`packed_hidden`)
    routes, note  experts to take again and where (`Noise.routes`); where the chosen experts are written
    """
    out = torch.zeros(scored.numel(), device=scored.device)
    view = run_view(policy, rollout, masked, scored, left=left, packed=packed, routes=routes, note=note)
    if view is None:
        return out.view(scored.shape)
    params = rollout.sampling_params
    if left is None:
        logps = token_logprobs(policy, view.states, view.tokens, params, view.kept)
        return out.to(logps.dtype).index_copy(0, view.plan.places, logps).view(scored.shape)
    drawn = view.plan.committed
    logps, confidences = token_logprobs_and_confidences(policy, view.states[drawn], view.tokens[drawn], params)
    stayed = left_logprobs(policy, view.states[view.plan.left], *_bounds(rollout, view, confidences), params)
    out = out.to(logps.dtype).index_copy(0, view.plan.places[drawn], logps)
    return out.index_copy(0, view.plan.places[view.plan.left], stayed).view(scored.shape)


def backward_view(
    policy: Policy,
    rollout: Rollout,
    masked: Bool[Tensor, "B T"],
    vector: Float[Tensor, "B T"],
    *,
    scored: Bool[Tensor, "B T"] | None = None,
    left: Bool[Tensor, "B T"] | None = None,
    packed: bool = False,
    routes: Routes | None = None,
) -> None:
    """score_view(...).backward(vector) in one forward and backward; positions where `vector` is 0 are left out.

    scored  as in `score_view`, required with `left`: the committed tokens determine the probability of what was left
    """
    moved = vector != 0
    if left is not None and scored is not None:
        moved |= scored & ~left & moved.any(-1, keepdim=True)
    view = run_view(policy, rollout, masked, moved, left=left, packed=packed, routes=routes)
    if view is None:
        return
    at = vector.flatten()[view.plan.places]
    if left is None:
        backward_token_logprobs(policy, view.states, view.tokens, rollout.sampling_params, at, view.kept)
    else:
        _backward_order(policy, rollout, view, at)


def _backward_order(policy: Policy, rollout: Rollout, view: "View", vector: Float[Tensor, " K"]) -> None:
    params = rollout.sampling_params
    drawn = view.plan.committed
    left = view.plan.left
    run = score_committed(policy, params)
    of_drawn, (confidences,) = backward_chunked(run, policy, vector[drawn], view.states[drawn], view.tokens[drawn])
    bounds = _bounds(rollout, view, confidences)
    of_left, _ = backward_chunked(score_left(policy, params), policy, vector[left], view.states[left], *bounds)
    if view.states.requires_grad:  # the head alone may be trained
        gradient = torch.zeros_like(view.states).index_copy(0, drawn, of_drawn)  # one backward through the backbone
        view.states.backward(gradient.index_copy(0, left, of_left))


def _bounds(
    rollout: Rollout, view: "View", confidences: Float[Tensor, " C"]
) -> tuple[Float[Tensor, " J"], Bool[Tensor, " J"]]:
    """For each left position, the lowest confidence that its block committed, and whether the position follows it."""
    assert rollout.open_step is not None, "an order has a law only where the sampler recorded the blocks"
    width = rollout.tokens.shape[1]
    # The opening step distinguishes the blocks of a packed view.
    block = view.plan.places // width * width + rollout.open_step.flatten()[view.plan.places]
    column = view.plan.places % width
    lowest, last = last_committed(
        confidences, block[view.plan.committed], column[view.plan.committed], rollout.tokens.numel()
    )
    mine = block[view.plan.left]
    return lowest[mine], column[view.plan.left] > last[mine]


class Plan(NamedTuple):
    """Which rows go through the model for a view, and where its K scored positions are.

    rows      of the forward: one of each group if `together`, else `live`
    together  one forward serves each group: its completions look the same to the model
    live      rows with a scored position
    inside, places   where the positions are in the flattened states, and in the flattened batch
    committed, left  which of the K were committed, and which were left; without an order all are committed
    """

    rows: Int[Tensor, " R"]
    together: bool
    live: Int[Tensor, " L"]
    inside: Int[Tensor, " K"]
    places: Int[Tensor, " K"]
    committed: Int[Tensor, " M"]
    left: Int[Tensor, " J"]


class View(NamedTuple):
    """A plan's states and tokens, and the ids that the rollout kept there, if log-probs are normalised over them."""

    plan: Plan
    states: Float[Tensor, "K D"]
    tokens: Int[Tensor, " K"]
    kept: Int[Tensor, "K C"] | None


def run_view(
    policy: Policy,
    rollout: Rollout,
    masked: Bool[Tensor, "B T"],
    scored: Bool[Tensor, "B T"],
    *,
    left: Bool[Tensor, "B T"] | None = None,
    packed: bool = False,
    routes: Routes | None = None,
    note: Integer[Tensor, "B T M E"] | None = None,
) -> View | None:
    """One forward with `masked` positions hidden from the model; None, and no forward, where nothing is scored."""
    group = rollout.group_size
    tokens = rollout.tokens
    if policy.spec.mask_id is not None:
        tokens = tokens.masked_fill(masked, policy.spec.mask_id)
    plan = plan_view(rollout, tokens, scored, left, share=not packed and routes is None)
    if plan is None:
        return None
    rows = plan.rows
    noted = None if note is None else torch.zeros_like(note[rows])
    with routed(policy, None if routes is None else (routes[0][rows], routes[1][rows]), noted):
        if packed:
            hidden = packed_hidden(policy, rollout.tokens[rows], masked[rows], rollout.attention_mask[rows])
        else:
            hidden = policy.hidden(tokens[rows], rollout.attention_mask[rows])
    if plan.together:
        hidden = repeat(hidden, "p t d -> (p g) t d", g=group)
    if note is not None:
        assert noted is not None
        note[plan.live] = noted.repeat_interleave(group, 0)[plan.live] if plan.together else noted
    kept = rollout.kept_ids if rollout.sampling_params.support == "rollout" else None
    kept = kept if kept is None else kept.flatten(0, 1)[plan.places]
    return View(plan, hidden.flatten(0, 1)[plan.inside], rollout.tokens.flatten()[plan.places], kept)


def plan_view(
    rollout: Rollout,
    tokens: Int[Tensor, "B T"],
    scored: Bool[Tensor, "B T"],
    left: Bool[Tensor, "B T"] | None,
    *,
    share: bool,
) -> Plan | None:
    """The plan of a view with `tokens` as the model sees them, made on the host; None where nothing is scored.

    share  whether a group may share a forward
    """
    group = rollout.group_size
    alike = _equal_in_groups(tokens, group) & _equal_in_groups(rollout.attention_mask, group)
    stayed = torch.zeros_like(scored) if left is None else left
    # The host waits for the device once: three answers return in one copy.
    answers = torch.cat([scored.flatten(), stayed.flatten(), alike[None]]).cpu()
    where, stay, same = answers.split([scored.numel(), scored.numel(), 1])
    places = where.nonzero()[:, 0]
    if not len(places):
        return None
    where = where.view(scored.shape)
    live = where.any(-1).nonzero()[:, 0]
    together = share and group > 1 and bool(same)  # as in a first step, where all completions are masked
    inside = places if together else where[live].flatten().nonzero()[:, 0]
    committed = (~stay[places]).nonzero()[:, 0]
    parts = send(scored.device, live, inside, places, committed, stay[places].nonzero()[:, 0])
    rows = torch.arange(0, len(tokens), group, device=scored.device) if together else parts[0]
    return Plan(rows, together, *parts)


def _equal_in_groups(rows: Tensor, group: int) -> Bool[Tensor, ""]:
    """Whether every row (B, T) equals the first of its group."""
    groups = rearrange(rows, "(p g) t -> p g t", g=group)
    return (groups == groups[:, :1]).all()
