"""A view scores itself in one forward, and takes its own backward for a given vector."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from dllm_rl.device import send
from dllm_rl.models import order
from dllm_rl.models.base import Policy, block_causal_mask, block_ranks, position_ids
from dllm_rl.models.forward.buckets import length_buckets
from dllm_rl.models.forward.routing import Routes, routed
from dllm_rl.models.logprobs import backward_chunked, backward_token_logprobs, token_logprobs
from dllm_rl.types import Noise, Rollout


@dataclass(frozen=True)
class Chunk:
    """Rows that go through the model together."""

    rows: Int[Tensor, " R"]
    columns: slice  # from their first unpadded one

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


@dataclass(frozen=True)
class View:
    """A view of the rows at hand: what is hidden from the model, and what is scored.

    masked  positions hidden from the model
    scored  positions whose log-prob is wanted
    left    of `scored`, those scored by the log-prob of having been left masked (`models.order`); by 0 under
            `plackett_luce`, where the log-prob of its draw is added to each written position's
    step    of a revised rollout: the model sees the tokens before this step, and those that it wrote are scored
    routes  experts to take again, and where (`Noise.routes`)
    packed  every block sees the others without masks (`packed_hidden`)
    """

    masked: Bool[Tensor, "B T"]
    scored: Bool[Tensor, "B T"]
    left: Bool[Tensor, "B T"] | None = None
    step: Int[Tensor, "B T"] | None = None
    routes: Routes | None = None
    packed: bool = False

    def logprobs(
        self, policy: Policy, rollout: Rollout, note: Integer[Tensor, "B T M E"] | None = None
    ) -> Float[Tensor, "B T"]:
        """One forward: log p of the rollout's tokens at `scored`, in nats, 0 elsewhere. The chosen experts are written
        into `note`."""
        scored = self.scored
        out = torch.zeros(scored.numel(), device=scored.device)
        forward = self._forward(policy, rollout, scored, note)
        if forward is None:
            return out.view(scored.shape)
        plan, params = forward.plan, rollout.sampling_params
        if self.left is None:
            logps = token_logprobs(policy, forward.states, forward.tokens, params, forward.kept)
            return out.to(logps.dtype).index_copy(0, plan.places, logps).view(scored.shape)
        drawn = plan.committed
        states, tokens = forward.states[drawn], forward.tokens[drawn]
        if rollout.order_rank is not None and rollout.draw_in_step is not None:
            kept = forward.kept if forward.kept is None else forward.kept[drawn]
            logps = token_logprobs(policy, states, tokens, params, kept)
            scores = order.state_scores(policy, forward.states, params, rollout.order_rank)
            width = rollout.tokens.shape[1]
            nth = rollout.draw_in_step.flatten()[plan.places].index_fill(0, plan.left, width)  # left: drawn later
            logps = logps + order.drawn_logprobs(scores, _blocks(rollout, plan), nth, drawn, width)
            return out.to(logps.dtype).index_copy(0, plan.places[drawn], logps).view(scored.shape)
        logps, confidences = order.token_logprobs_and_confidences(policy, states, tokens, params)
        bounds = _bounds(rollout, plan, confidences)
        stayed = order.left_logprobs(policy, forward.states[plan.left], *bounds, params)
        out = out.to(logps.dtype).index_copy(0, plan.places[drawn], logps)
        return out.index_copy(0, plan.places[plan.left], stayed).view(scored.shape)

    def backward(self, policy: Policy, rollout: Rollout, vector: Float[Tensor, "B T"]) -> None:
        """`logprobs(...).backward(vector)` in one forward and backward. Only positions that move the loss, where
        `vector` is not 0, are scored again; where none does, no forward runs."""
        at = vector != 0
        if self.left is not None:
            live = self.scored & at.any(-1, keepdim=True)
            if rollout.order_rank is not None:  # a draw depends on all that its step offered
                logps = replace(self, scored=live).logprobs(policy, rollout)
                if logps.requires_grad:  # some row moves
                    logps.backward(vector)
                return
            at |= live & ~self.left  # the committed tokens determine the probability of what was left
        forward = self._forward(policy, rollout, at)
        if forward is None:
            return
        plan, states, tokens, params = forward.plan, forward.states, forward.tokens, rollout.sampling_params
        vector = vector.flatten()[plan.places]
        if self.left is None:
            backward_token_logprobs(policy, states, tokens, params, vector, forward.kept)
            return
        drawn, left = plan.committed, plan.left
        run = order.score_committed(policy, params)
        of_drawn, (confidences,) = backward_chunked(run, policy, vector[drawn], states[drawn], tokens[drawn])
        bounds = _bounds(rollout, plan, confidences)
        of_left, _ = backward_chunked(order.score_left(policy, params), policy, vector[left], states[left], *bounds)
        if states.requires_grad:  # the head alone may be trained
            gradient = torch.zeros_like(states).index_copy(0, drawn, of_drawn)  # one backward through the backbone
            states.backward(gradient.index_copy(0, left, of_left))

    def _forward(
        self,
        policy: Policy,
        rollout: Rollout,
        at: Bool[Tensor, "B T"],
        note: Integer[Tensor, "B T M E"] | None = None,
    ) -> "ViewStates | None":
        """One forward, and its states `at` these positions; None, and no forward, where there are none."""
        group = rollout.group_size
        tokens, drawn = rollout.canvas(self.step)
        if policy.spec.mask_id is not None:
            tokens = tokens.masked_fill(self.masked, policy.spec.mask_id)
        plan = plan_view(rollout, tokens, at, self.left, share=not self.packed and self.routes is None)
        if plan is None:
            return None
        rows = plan.rows
        noted = None if note is None else torch.zeros_like(note[rows])
        routes = None if self.routes is None else (self.routes[0][rows], self.routes[1][rows])
        with routed(policy, routes, noted):
            if self.packed:
                read = (self.masked | at)[rows]
                hidden = packed_hidden(policy, rollout.tokens[rows], tokens[rows], read, rollout.attention_mask[rows])
            else:
                hidden = policy.hidden(tokens[rows], rollout.attention_mask[rows])
        if plan.together:
            hidden = repeat(hidden, "p t d -> (p g) t d", g=group)
        if note is not None:
            assert noted is not None
            note[plan.live] = noted.repeat_interleave(group, 0)[plan.live] if plan.together else noted
        kept = rollout.kept_ids if rollout.sampling_params.support == "rollout" else None
        kept = kept if kept is None else kept.flatten(0, 1)[plan.places]
        return ViewStates(plan, hidden.flatten(0, 1)[plan.inside], drawn.flatten()[plan.places], kept)


def _bounds(
    rollout: Rollout, plan: "Plan", confidences: Float[Tensor, " C"]
) -> tuple[Float[Tensor, " J"], Bool[Tensor, " J"]]:
    """For each left position, the lowest confidence that its block committed, and whether the position follows it."""
    block = _blocks(rollout, plan)
    column = plan.places % rollout.tokens.shape[1]
    drawn = plan.committed
    lowest, last = order.last_committed(confidences, block[drawn], column[drawn], rollout.tokens.numel())
    mine = block[plan.left]
    return lowest[mine], column[plan.left] > last[mine]


def _blocks(rollout: Rollout, plan: "Plan") -> Int[Tensor, " K"]:
    """A number for each row and block, rising; the opening step distinguishes the blocks of a packed view."""
    assert rollout.open_step is not None, "an order has a law only where the sampler recorded the blocks"
    width = rollout.tokens.shape[1]
    return plan.places // width * width + rollout.open_step.flatten()[plan.places]


class Plan(NamedTuple):
    """Which rows go through the model for a view, and where its K scored positions are."""

    rows: Int[Tensor, " R"]  # of the forward: one of each group if `together`, else `live`
    together: bool  # one forward serves each group: its completions look the same to the model
    live: Int[Tensor, " L"]  # rows with a scored position
    inside: Int[Tensor, " K"]  # where the positions are in the flattened states
    places: Int[Tensor, " K"]  # where they are in the flattened batch
    committed: Int[Tensor, " M"]  # which of the K were committed; all without an order
    left: Int[Tensor, " J"]  # which were left


class ViewStates(NamedTuple):
    """What a forward of a view gives: the states at its K scored positions, and the tokens scored there."""

    plan: Plan
    states: Float[Tensor, "K D"]
    tokens: Int[Tensor, " K"]
    kept: Int[Tensor, "K C"] | None  # ids that the rollout kept there, if log-probs are normalised over them


def plan_view(
    rollout: Rollout,
    tokens: Int[Tensor, "B T"],
    scored: Bool[Tensor, "B T"],
    left: Bool[Tensor, "B T"] | None,
    *,
    share: bool,
) -> Plan | None:
    """The plan of a view, made on the host; None where nothing is scored. With `share` a group may share a forward."""
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


def _equal_in_groups(rows: Integer[Tensor, "B T"] | Bool[Tensor, "B T"], group: int) -> Bool[Tensor, ""]:
    groups = rearrange(rows, "(p g) t -> p g t", g=group)
    return (groups == groups[:, :1]).all()


def packed_mask(
    attention_mask: Bool[Tensor, "B T"], block: Int[Tensor, "B T"], start: int, *ranks: tuple[Tensor, Tensor]
) -> Bool[Tensor, "B 1 Q Q"]:
    """Which columns see which, among T clean columns and the noisy columns start..T-1, each with its `block_ranks`;
    Q = 2 T - start."""
    clean, noisy = (block_causal_mask(attention_mask, *one)[:, 0] for one in ranks)
    before = block_causal_mask(attention_mask, block, block - 1)[:, 0]
    real = attention_mask[:, :, None]
    upper = torch.cat([clean, torch.zeros_like(noisy[:, :, start:])], dim=-1)
    # Padding sees its own clean block, so that no row of the mask is empty, whose softmax is NaN.
    lower = torch.cat([before | (clean & ~real), (noisy & ~before & real)[:, :, start:]], dim=-1)[:, start:]
    return torch.cat([upper, lower], dim=1)[:, None]


def packed_hidden(
    policy: Policy,
    tokens: Int[Tensor, "B T"],
    noisy: Int[Tensor, "B T"],
    read: Bool[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T D"]:
    """Final states where each block sees `noisy` of itself and `tokens` of the others; zeros before the first block
    with a position to `read`.

    A clean and a noisy copy of the row go through one forward. Clean tokens see clean tokens of their own and earlier
    blocks, noisy tokens clean ones of earlier blocks and noisy ones of their own. Exact: each token sees what it would
    see in a forward of its block alone. Raises ValueError for a model that is not block-causal, or with a shift.
    """
    spec = policy.spec
    if spec.attention != "block_causal" or spec.shift or spec.block_size is None or spec.mask_id is None:
        raise ValueError(f"packed scoring is for block-causal models without a shift; the policy is {spec.name!r}")
    positions = position_ids(attention_mask)
    block = positions // spec.block_size
    first = torch.where(read, block, block.max() + 1).amin(-1, keepdim=True)
    start = int((attention_mask & (block >= first)).any(0).long().argmax())  # before it no noisy column is needed
    both = torch.cat([tokens, noisy[:, start:]], dim=1)
    ranks = (block_ranks(spec, some, positions) for some in (tokens, noisy))
    mask = packed_mask(attention_mask, block, start, *ranks)
    states = policy.encode(both, mask, torch.cat([positions, positions[:, start:]], dim=1))[:, tokens.shape[1] :]
    return torch.cat([states.new_zeros(len(states), start, states.shape[-1]), states], dim=1)
