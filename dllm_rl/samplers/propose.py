"""What the model proposes at masked positions: tokens with their log-probabilities, and rank scores."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import chunked, invert, kept_set, process
from dllm_rl.models.order import last_committed, left_logprobs
from dllm_rl.samplers.rules import rank_inputs
from dllm_rl.samplers.turns import Turn
from dllm_rl.types import SamplingParams

SLAB = {"cpu": 2**19, "cuda": 2**24}  # fp32 logits reduced at once; on a CPU they should stay in its cache


def propose(
    policy: Policy, hidden: Float[Tensor, "K D"], uniforms: Float[Tensor, " K"], sampling_params: SamplingParams
) -> tuple[Tensor, ...]:
    """Tokens for K positions and their log-probs (nats) as sampled; with top_k or top_p also `kept_set`'s result."""

    def one(logits: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        logits[:, policy.spec.mask_id] = -torch.inf
        tokens, logp, _, kept = _draw(logits, u, sampling_params)
        return tokens, logp, *kept

    return _slabs(policy, one, sampling_params, hidden, uniforms)


def propose_and_rank(
    policy: Policy,
    hidden: Float[Tensor, "K D"],
    uniforms: Float[Tensor, " K"],
    ties: Float[Tensor, " K"],
    sampling_params: SamplingParams,
    rank: Callable,
) -> tuple[Tensor, ...]:
    """The rank's score of each position, and the result of `propose`."""
    needs = rank_inputs(rank)
    mask_id = policy.spec.mask_id
    same = sampling_params.temperature in (0, 1) and not sampling_params.filters

    def one(logits: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        mask = logits[:, mask_id].clone()
        logits[:, mask_id] = -torch.inf
        tokens, logp, normalizer, kept = _draw(logits, u, sampling_params)
        logits[:, mask_id] = mask
        offered = {"logits": logits, "tokens": tokens, "uniforms": v}
        if "normalizer" in needs:
            # With the mask token, as in the published algorithms; `same` reuses the log-sum-exp of the draw.
            offered["normalizer"] = normalizer.logaddexp(mask) if same else logits.logsumexp(-1)
        return rank(**{name: offered[name] for name in needs}).float(), tokens, logp, *kept

    return _slabs(policy, one, sampling_params, hidden, uniforms, ties)


def order_logprobs(
    policy: Policy,
    hidden: Float[Tensor, "K D"],
    sampling_params: SamplingParams,
    turn: Turn,
    scores: Float[Tensor, " K"],
    committed: Int[Tensor, " C"],
    left: Int[Tensor, " J"],
) -> Float[Tensor, " J"]:
    """For each position left, the log-prob that its draw ranks behind the row's committed by `confidence`; nats."""
    lowest, last = last_committed(scores[committed], turn.row[committed], turn.place[committed], len(scores))
    mine = turn.row[left]
    # The head runs again, because the committed positions are known only now.
    return left_logprobs(policy, hidden[left], lowest[mine], turn.place[left] > last[mine], sampling_params)


def rank_only(
    policy: Policy,
    hidden: Float[Tensor, "K D"],
    ties: Float[Tensor, " K"],
    sampling_params: SamplingParams,
    rank: Callable,
) -> Float[Tensor, " K"]:
    """Scores of a rank that takes no tokens; the head runs only for a rank that takes logits."""
    needs = rank_inputs(rank)
    if not needs & {"logits", "normalizer"}:
        return rank(**dict.fromkeys(needs, ties)).float()

    def one(logits: Tensor, v: Tensor) -> tuple[Tensor]:
        offered = {"logits": logits, "uniforms": v}
        if "normalizer" in needs:
            offered["normalizer"] = logits.logsumexp(-1)
        return (rank(**{name: offered[name] for name in needs}).float(),)

    return _slabs(policy, one, sampling_params, hidden, ties)[0]


def _slabs(
    policy: Policy, one: Callable, sampling_params: SamplingParams, hidden: Tensor, *rows: Tensor
) -> tuple[Tensor, ...]:
    """Run the head in chunks, and `one` on their fp32 slabs; all suppressed ids except the mask token are at -inf."""
    size = max(1, SLAB.get(policy.device.type, SLAB["cuda"]) // policy.vocab_size)

    def chunk(h: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        raw = policy.head(h)
        for token in set(sampling_params.suppress) - {policy.spec.mask_id}:
            raw[:, token] = -torch.inf
        parts = [one(x.float(), *others) for x, *others in zip(*(r.split(size) for r in (raw, *rest)), strict=True)]
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    return chunked(chunk, hidden, *rows, policy=policy)


def _draw(
    logits: Tensor, u: Tensor, sampling_params: SamplingParams
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Tokens, log-probabilities and log-sum-exp of the processed distribution, and what filters kept."""
    sampling_params = replace(sampling_params, suppress=())  # they are at -inf already
    unfiltered = process(logits, replace(sampling_params, support="unfiltered"))
    logits = process(logits, sampling_params)
    kept = kept_set(unfiltered, logits) if sampling_params.filters else ()
    if sampling_params.temperature == 0:
        best, tokens = logits.max(-1)  # the first of equals
        normalizer = logits.sub(best[:, None]).exp_().sum(-1).log_().add_(best)
        return tokens, best - normalizer, normalizer, kept
    peak = logits.amax(-1, keepdim=True)
    mass = logits.sub(peak).exp_()
    normalizer = mass.sum(-1).log_().add_(peak[:, 0])
    tokens = invert(mass, u)
    return tokens, logits.gather(-1, tokens[:, None])[:, 0] - normalizer, normalizer, kept
