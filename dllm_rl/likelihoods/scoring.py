"""One forward of one view: its log-probs, and its backward for a given vector."""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from dllm_rl.device import send
from dllm_rl.likelihoods.packed import packed_hidden
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.buckets import length_buckets
from dllm_rl.models.forward.routing import Routes, routed
from dllm_rl.models.logprobs import backward_token_logprobs, token_logprobs
from dllm_rl.models.order import (
    backward_committed,
    backward_left,
    last_committed,
    left_logprobs,
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
    one group). Each row is scored at the width at which it was sampled (`length_buckets`)."""
    group = rollout.group_size
    scored = rearrange((noise.weight != 0).any(0).any(-1), "(p g) -> p g", g=group).any(-1)
    first = rearrange(rollout.attention_mask.long().argmax(-1), "(p g) -> p g", g=group).amin(-1)
    chosen, starts = torch.stack([scored, first]).cpu()
    size = len(chosen) if micro_batch_size is None else max(1, micro_batch_size // group)
    found, width = [], rollout.tokens.shape[1]
    for bucket in length_buckets(starts.repeat_interleave(group), width, rollout.tokens.device):
        groups = bucket.rows[::group] // group
        for part in groups[chosen[groups] != 0].split(size):
            if len(part):
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
    view = run_view(policy, rollout, masked, scored, packed, left, routes=routes, note=note)
    if view is not None and left is None:
        logp = token_logprobs(policy, view.states, view.tokens, rollout.sampling_params, view.kept)
        out = out.to(logp.dtype).index_copy(0, view.places, logp)
    elif view is not None:
        c, j, params = view.committed, view.left, rollout.sampling_params
        logp, confidences = token_logprobs_and_confidences(policy, view.states[c], view.tokens[c], params)
        out = out.to(logp.dtype).index_copy(0, view.places[c], logp)
        bound = _bounds(rollout, view.places[c], confidences, view.places[j])
        out = out.index_copy(0, view.places[j], left_logprobs(policy, view.states[j], *bound, params))
    return out.view(scored.shape)


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
    if left is not None and scored is not None:
        moved = vector != 0
        wanted = moved | (scored & ~left & moved.any(-1, keepdim=True))
        view = run_view(policy, rollout, masked, wanted, packed, left, routes=routes)
        if view is not None:
            _backward_order(policy, rollout, view, vector.flatten()[view.places])
        return
    view = run_view(policy, rollout, masked, vector != 0, packed, routes=routes)
    if view is not None:
        at = vector.flatten()[view.places]
        backward_token_logprobs(policy, view.states, view.tokens, rollout.sampling_params, at, view.kept)


def _backward_order(policy: Policy, rollout: Rollout, view: "View", vector: Float[Tensor, " K"]) -> None:
    c, j, params = view.committed, view.left, rollout.sampling_params
    first, confidences = backward_committed(policy, view.states[c], view.tokens[c], params, vector[c])
    bound = _bounds(rollout, view.places[c], confidences, view.places[j])
    second = backward_left(policy, view.states[j], *bound, params, vector[j])
    if view.states.requires_grad:
        view.states.backward(torch.zeros_like(view.states).index_copy(0, c, first).index_copy(0, j, second))


def _bounds(
    rollout: Rollout, committed: Int[Tensor, " C"], confidences: Float[Tensor, " C"], left: Int[Tensor, " J"]
) -> tuple[Float[Tensor, " J"], Bool[Tensor, " J"]]:
    """For each left position, the lowest confidence that its block committed, and whether the position follows it. The
    opening step distinguishes the blocks of a packed view."""
    assert rollout.open_step is not None, "an order has a law only where the sampler recorded the blocks"
    width = rollout.tokens.shape[1]
    block = lambda places: places // width * width + rollout.open_step.flatten()[places]  # noqa: E731
    lowest, last = last_committed(confidences, block(committed), committed % width, rollout.tokens.numel())
    mine = block(left)
    return lowest[mine], left % width > last[mine]


@dataclass(frozen=True)
class View:
    """The scored positions of a view, row by row: places in the flattened batch, hidden states, tokens, and the ids
    that the rollout kept there, if log-probs are normalised over them.

    committed, left  which of the K were committed, and which were left; without an order all are committed
    """

    places: Int[Tensor, " K"]
    states: Float[Tensor, "K D"]
    tokens: Int[Tensor, " K"]
    kept: Int[Tensor, "K C"] | None
    committed: Int[Tensor, " M"]
    left: Int[Tensor, " J"]


def run_view(
    policy: Policy,
    rollout: Rollout,
    masked: Bool[Tensor, "B T"],
    scored: Bool[Tensor, "B T"],
    packed: bool,
    left: Bool[Tensor, "B T"] | None = None,
    *,
    routes: Routes | None = None,
    note: Integer[Tensor, "B T M E"] | None = None,
) -> View | None:
    """One forward with `masked` positions hidden from the model; None, and no forward, where nothing is scored.

    One forward serves the group where its completions look the same to the model. The device is asked once which rows
    these are; the results return in one copy.
    """
    mask_id, group, attention_mask = policy.spec.mask_id, rollout.group_size, rollout.attention_mask
    tokens = rollout.tokens if mask_id is None else rollout.tokens.masked_fill(masked, mask_id)
    first = lambda x: repeat(x[::group], "p t -> (p g) t", g=group)  # noqa: E731
    alike = (tokens == first(tokens)).all() & (attention_mask == first(attention_mask)).all()
    stayed = torch.zeros_like(scored) if left is None else left
    both = torch.cat([scored.flatten(), stayed.flatten(), alike[None]]).cpu()
    flat, stay, same = both.split([scored.numel(), scored.numel(), 1])
    where = flat.view(scored.shape)
    live, places = where.any(-1).nonzero()[:, 0], where.flatten().nonzero()[:, 0]
    if not len(places):
        return None
    together = group > 1 and bool(same) and not packed and routes is None
    inside = places if together else where[live].flatten().nonzero()[:, 0]
    apart = ((~stay[places]).nonzero()[:, 0], stay[places].nonzero()[:, 0])
    live, places, inside, committed, stayed = send(scored.device, live, places, inside, *apart)
    rows = torch.arange(0, len(tokens), group, device=live.device) if together else live
    noted = None if note is None else torch.zeros_like(note[rows])
    with routed(policy, None if routes is None else (routes[0][rows], routes[1][rows]), noted):
        if packed:
            hidden = packed_hidden(policy, rollout.tokens[live], masked[live], attention_mask[live])
        else:
            hidden = policy.hidden(tokens[rows], attention_mask[rows])
    if note is not None and noted is not None:
        note[live] = noted.repeat_interleave(group, 0)[live] if together else noted
    if together:
        hidden = repeat(hidden, "p t d -> (p g) t d", g=group)
    kept = rollout.kept_ids if rollout.sampling_params.support == "rollout" else None
    return View(
        places=places,
        states=hidden.flatten(0, 1)[inside],
        tokens=rollout.tokens.flatten()[places],
        kept=None if kept is None else kept.flatten(0, 1)[places],
        committed=committed,
        left=stayed,
    )
