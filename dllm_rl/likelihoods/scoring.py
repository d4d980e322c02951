"""One forward of one view: its log-probs, and its backward for a given vector."""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.likelihoods.packed import packed_hidden
from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import backward_token_logprobs, token_logprobs
from dllm_rl.models.transfer import send
from dllm_rl.types import Noise, Rollout

SPREAD = 0.75  # of the longest row of a forward: padding is at most a quarter of it


@dataclass(frozen=True)
class Chunk:
    """Rows that go through the model together, and the columns that any of them has tokens in."""

    rows: Int[Tensor, " R"]
    columns: slice

    def of(self, rollout: Rollout, noise: Noise) -> tuple[Rollout, Noise]:
        return rollout.rows(self.rows, self.columns), noise.rows(self.rows, self.columns)


def row_chunks(rollout: Rollout, noise: Noise, micro_batch_size: int | None) -> list[Chunk]:
    """The groups that any view scores, in chunks of like lengths (`buckets`) of whole groups, of at most
    micro_batch_size rows (or one group), each without the columns that are padding in all of its rows.

    A row's log-probs do not depend on the chunk that it is in but by the rounding of attention's sums, whose terms are
    grouped by the columns; where all rows are of like length nothing moves, and nothing is rounded anew.
    """
    group = rollout.group_size
    scored = rearrange((noise.weight != 0).any(0).any(-1), "(p g) -> p g", g=group).any(-1)
    columns = rearrange(rollout.attention_mask, "(p g) t -> p g t", g=group).any(1)
    facts = torch.cat([scored[:, None], columns], dim=-1).cpu()
    chosen, columns = facts[:, 0].nonzero()[:, 0], facts[:, 1:]
    begin, end = columns.long().argmax(-1), columns.shape[1] - columns.flip(-1).long().argmax(-1)
    places, found = torch.arange(group), []
    for bucket in buckets((end - begin)[chosen].tolist()):
        groups = chosen[bucket]
        for part in groups.split(len(groups) if micro_batch_size is None else max(1, micro_batch_size // group)):
            (rows,) = send(rollout.tokens.device, rearrange(part[:, None] * group + places, "p g -> (p g)"))
            found.append(Chunk(rows, slice(int(begin[part].min()), int(end[part].max()))))
    return found


def buckets(lengths: list[int]) -> list[list[int]]:
    """Indices of lengths of which none is below SPREAD times the longest, in their order; the longest first."""
    found: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not found or lengths[i] < SPREAD * longest:
            found.append([])
            longest = lengths[i]
        found[-1].append(i)
    return [sorted(bucket) for bucket in found]


def score_view(
    policy: Policy,
    rollout: Rollout,
    masked: Bool[Tensor, "B T"],
    scored: Bool[Tensor, "B T"],
    *,
    packed: bool = False,
) -> Float[Tensor, "B T"]:
    """One forward: log p of the rollout's tokens at `scored`, with `masked` positions hidden; nats, 0 elsewhere.

    packed  every block sees the others without masks (`packed_hidden`).
    """
    out = torch.zeros(scored.numel(), device=scored.device)
    view = run_view(policy, rollout, masked, scored, packed)
    if view is not None:
        logp = token_logprobs(policy, view.states, view.tokens, rollout.sampling_params, view.kept)
        out = out.index_copy(0, view.places, logp)
    return out.view(scored.shape)


def backward_view(
    policy: Policy,
    rollout: Rollout,
    masked: Bool[Tensor, "B T"],
    vector: Float[Tensor, "B T"],
    *,
    packed: bool = False,
) -> None:
    """score_view(...).backward(vector) in one forward and backward; positions where `vector` is 0 are left out."""
    view = run_view(policy, rollout, masked, vector != 0, packed)
    if view is not None:
        at = vector.flatten()[view.places]
        backward_token_logprobs(policy, view.states, view.tokens, rollout.sampling_params, at, view.kept)


@dataclass(frozen=True)
class View:
    """The scored positions of a view, row by row: their places in the flattened batch, their hidden states, their
    tokens, and, where log-probs are normalised over them, the ids that the rollout kept there."""

    places: Int[Tensor, " K"]
    states: Float[Tensor, "K D"]
    tokens: Int[Tensor, " K"]
    kept: Int[Tensor, "K C"] | None


def run_view(
    policy: Policy, rollout: Rollout, masked: Bool[Tensor, "B T"], scored: Bool[Tensor, "B T"], packed: bool
) -> View | None:
    """One forward with `masked` positions hidden from the model; None, and no forward, where nothing is scored.

    Where all completions of a prompt look the same to the model, one forward serves the group; rows without a scored
    position are left out. Which these are is asked of the device once; all that follows from it goes back as one copy.
    """
    mask_id, group, attention_mask = policy.spec.mask_id, rollout.group_size, rollout.attention_mask
    tokens = rollout.tokens if mask_id is None else rollout.tokens.masked_fill(masked, mask_id)
    first = lambda x: repeat(x[::group], "p t -> (p g) t", g=group)  # noqa: E731
    alike = (tokens == first(tokens)).all() & (attention_mask == first(attention_mask)).all()
    flat, same = torch.cat([scored.flatten(), alike[None]]).cpu().split([scored.numel(), 1])
    where = flat.view(scored.shape)
    live, places = where.any(-1).nonzero()[:, 0], where.flatten().nonzero()[:, 0]
    if not len(places):
        return None
    together = group > 1 and bool(same) and not packed
    inside = places if together else where[live].flatten().nonzero()[:, 0]
    live, places, inside = send(scored.device, live, places, inside)
    if together:
        hidden = repeat(policy.hidden(tokens[::group], attention_mask[::group]), "p t d -> (p g) t d", g=group)
    elif packed:
        hidden = packed_hidden(policy, rollout.tokens[live], masked[live], attention_mask[live])
    else:
        hidden = policy.hidden(tokens[live], attention_mask[live])
    kept = rollout.kept_ids if rollout.sampling_params.support == "rollout" else None
    return View(
        places=places,
        states=hidden.flatten(0, 1)[inside],
        tokens=rollout.tokens.flatten()[places],
        kept=None if kept is None else kept.flatten(0, 1)[places],
    )
