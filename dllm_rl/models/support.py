"""The tokens over which log-probs are normalised where top_k or top_p filter: what a sampler records of its filter, and
the three conventions by which a learner uses it.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.types import FilterSupport, Rollout, Support

KEPT_IDS = 64  # most tokens of a filtered distribution whose ids a rollout records


def kept_set(
    logits: Float[Tensor, "K V"], filtered: Float[Tensor, "K V"]
) -> tuple[Float[Tensor, " K"], Int[Tensor, "K C"]]:
    """Log of the mass that a filter kept (nats), and up to KEPT_IDS + 1 kept ids, likeliest first, then -1."""
    log_mass = filtered.logsumexp(-1) - logits.logsumexp(-1)
    values, ids = filtered.topk(min(KEPT_IDS + 1, filtered.shape[-1]), dim=-1)  # one more shows that they do not fit
    return log_mass, ids.where(values > -torch.inf, -1).int()


def fitting(kept_ids: Int[Tensor, "B T C"]) -> Int[Tensor, "B T c"] | None:
    """The ids in as few columns as possible; None where a set is larger than KEPT_IDS."""
    width = int((kept_ids >= 0).sum(-1).max())
    return None if width > KEPT_IDS else kept_ids[..., :width]


def kept_part(log_mass: Float[Tensor, "B T"], ids: Int[Tensor, "B T C"]) -> FilterSupport:
    """The rollout's record, from what `kept_set` gave for each token."""
    return FilterSupport(log_mass, fitting(ids))


def with_support(rollout: Rollout, support: Support) -> Rollout:
    """The rollout as it is to be scored where top_k or top_p filter; itself where neither does. ValueError when it
    lacks what the convention needs. p is the rollout's distribution, S its kept set, q is the learner's:

    own         each policy normalises over its own kept set and the sampled token. The ratio's mean is not 1
    unfiltered  over the whole vocabulary on both sides. The ratio's mean is q(S)/p(S)

    Args:
        rollout: Over S for every policy (DeepSeek-V3.2's "keep sampling mask", arXiv 2512.02556 [digest]). The ratio's
            mean is 1: weights are unbiased for the learner in S.
    """
    params = rollout.sampling_params
    if support == params.support or not params.filters:
        return rollout
    if params.support != "per_policy":
        raise ValueError(f"support={support!r}: the rollout has {params.support!r} already; take the sampler's own")
    kept = rollout.filter_support
    if kept is None or (support == "rollout" and kept.ids is None):
        advice = "sample with this library's samplers, or use 'per_policy'"
        if support == "rollout":
            advice = f"ids are recorded for at most {KEPT_IDS} tokens; lower top_k or top_p, or use 'unfiltered'"
        raise ValueError(f"support={support!r} needs what the sampler kept, which is not recorded: {advice}")
    changed = replace(rollout, sampling_params=replace(params, support=support))
    return changed if support == "rollout" else replace(changed, logprobs=rollout.logprobs + kept.log_mass)


def ids_at(rollout: Rollout, places: Int[Tensor, " K"]) -> Int[Tensor, "K C"] | None:
    """The ids over which the tokens at K places of the flattened batch are normalised; None: each policy's own."""
    if (
        rollout.sampling_params.support != "rollout"
        or rollout.filter_support is None
        or rollout.filter_support.ids is None
    ):
        return None
    return rollout.filter_support.ids.flatten(0, 1)[places]
