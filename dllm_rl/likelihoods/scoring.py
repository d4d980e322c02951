"""One forward of one view: its log-probs, and its backward for a given vector."""

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.likelihoods.packed import packed_hidden
from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import backward_token_logprobs, token_logprobs
from dllm_rl.types import Noise, Rollout


def row_chunks(noise: Noise, micro_batch_size: int | None, group_size: int) -> tuple[Int[Tensor, " R"], ...]:
    """Rows of the groups that any view scores, in chunks of whole groups of at most micro_batch_size (or one group)."""
    scored = rearrange((noise.weight != 0).any(0).any(-1), "(p g) -> p g", g=group_size).any(-1)
    rows = repeat(scored, "p -> (p g)", g=group_size).nonzero()[:, 0]
    if not len(rows):
        return ()
    size = len(rows) if micro_batch_size is None else max(group_size, micro_batch_size // group_size * group_size)
    return rows.split(size)


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
    if not scored.any():
        return torch.zeros(scored.shape, device=scored.device)
    states = view_states(policy, rollout, masked, scored, packed)
    logp = token_logprobs(policy, states, rollout.tokens[scored], rollout.sampling_params, kept_by(rollout, scored))
    return torch.zeros(scored.shape, device=scored.device).masked_scatter(scored, logp)


def backward_view(
    policy: Policy,
    rollout: Rollout,
    masked: Bool[Tensor, "B T"],
    vector: Float[Tensor, "B T"],
    *,
    packed: bool = False,
) -> None:
    """score_view(...).backward(vector) in one forward and backward; positions where `vector` is 0 are left out."""
    scored = vector != 0
    if scored.any():
        states = view_states(policy, rollout, masked, scored, packed)
        tokens, kept = rollout.tokens[scored], kept_by(rollout, scored)
        backward_token_logprobs(policy, states, tokens, rollout.sampling_params, vector[scored], kept)


def kept_by(rollout: Rollout, scored: Bool[Tensor, "B T"]) -> Int[Tensor, "K C"] | None:
    """The ids that the rollout kept at `scored`, where log-probs are normalised over them."""
    kept = rollout.kept_ids if rollout.sampling_params.support == "rollout" else None
    return None if kept is None else kept[scored]


def view_states(
    policy: Policy, rollout: Rollout, masked: Bool[Tensor, "B T"], scored: Bool[Tensor, "B T"], packed: bool
) -> Float[Tensor, "K D"]:
    """The hidden states at `scored` (not empty), row by row, with `masked` positions hidden from the model.

    Where all completions of a prompt look the same to the model, one forward serves the group; rows without a scored
    position are left out.
    """
    live = scored.any(-1)
    if packed:
        states = packed_hidden(policy, rollout.tokens[live], masked[live], rollout.attention_mask[live])
        return states[scored[live]]
    mask_id = policy.spec.mask_id
    tokens = rollout.tokens if mask_id is None else rollout.tokens.masked_fill(masked, mask_id)
    group, attention_mask = rollout.group_size, rollout.attention_mask
    first = lambda x: repeat(x[::group], "p t -> (p g) t", g=group)  # noqa: E731
    if group > 1 and torch.equal(tokens, first(tokens)) and torch.equal(attention_mask, first(attention_mask)):
        return repeat(policy.hidden(tokens[::group], attention_mask[::group]), "p t d -> (p g) t d", g=group)[scored]
    return policy.hidden(tokens[live], attention_mask[live])[scored[live]]
