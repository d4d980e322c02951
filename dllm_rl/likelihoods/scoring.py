"""One forward of one view: its log-probs, and its backward for a given vector."""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.likelihoods.packed import packed_hidden
from dllm_rl.models.base import Policy
from dllm_rl.models.buckets import length_buckets
from dllm_rl.models.logprobs import backward_token_logprobs, token_logprobs
from dllm_rl.models.transfer import send
from dllm_rl.types import Noise, Rollout


@dataclass(frozen=True)
class Chunk:
    """Rows that go through the model together, and the columns from the first that one of them does not pad."""

    rows: Int[Tensor, " R"]
    columns: slice

    def of(self, rollout: Rollout, noise: Noise) -> tuple[Rollout, Noise]:
        return rollout.rows(self.rows, self.columns), noise.rows(self.rows, self.columns)


def row_chunks(rollout: Rollout, noise: Noise, micro_batch_size: int | None) -> list[Chunk]:
    """The groups that any view scores, in chunks of whole groups, of at most micro_batch_size rows (or one group), and
    of like lengths, without the padding that all of them begin with.

    Lengths are those of the whole rollout (`length_buckets`), scored or not: a row is run at the width that it was
    sampled at. Where all rows go together they keep their columns.
    """
    group = rollout.group_size
    scored = rearrange((noise.weight != 0).any(0).any(-1), "(p g) -> p g", g=group).any(-1)
    first = rearrange(rollout.attention_mask.long().argmax(-1), "(p g) -> p g", g=group).amin(-1)
    chosen, starts = torch.stack([scored, first]).cpu()
    size = len(chosen) if micro_batch_size is None else max(1, micro_batch_size // group)
    found, width = [], rollout.tokens.shape[1]
    alike = length_buckets(starts.repeat_interleave(group), width, rollout.tokens.device)
    for bucket in alike:
        columns = slice(bucket.start if len(alike) > 1 else 0, width)
        groups = bucket.rows[::group] // group
        for part in groups[chosen[groups] != 0].split(size):
            if len(part):
                rows = rearrange(part[:, None] * group + torch.arange(group), "p g -> (p g)")
                found.append(Chunk(*send(rollout.tokens.device, rows), columns))
    return found


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
