"""The tokens over which log-probs are normalized under top_k or top_p.

A sampler records what its filter kept, and a learner uses the record by one of three conventions.
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
    """Return the log of the mass that a filter kept, in nats, and up to KEPT_IDS + 1 kept ids.

    The ids are ordered from the likeliest on, then -1.
    """
    log_mass = filtered.logsumexp(-1) - logits.logsumexp(-1)
    values, ids = filtered.topk(min(KEPT_IDS + 1, filtered.shape[-1]), dim=-1)  # one more shows that the ids do not fit
    return log_mass, ids.where(values > -torch.inf, -1).int()


def fitting(kept_ids: Int[Tensor, "B T C"]) -> Int[Tensor, "B T c"] | None:
    """Return the ids in as few columns as possible, or None where a set is larger than KEPT_IDS."""
    width = int((kept_ids >= 0).sum(-1).max())
    return None if width > KEPT_IDS else kept_ids[..., :width]


def kept_part(log_mass: Float[Tensor, "B T"], ids: Int[Tensor, "B T C"]) -> FilterSupport:
    """Return the rollout's record, made of the results of `kept_set` for each token."""
    return FilterSupport(log_mass, fitting(ids))


def with_support(rollout: Rollout, support: Support) -> Rollout:
    """Apply a convention for scoring under top_k or top_p to a rollout. Without these filters, return it unchanged.

    With p the rollout's distribution, S its kept set, and q the learner's distribution, the conventions are:

    per_policy  each policy normalizes over its kept set and the sampled token. The ratio's mean is not 1
    unfiltered  both sides normalize over the full vocabulary. The ratio's mean is q(S)/p(S)
    rollout     every policy normalizes over S (DeepSeek-V3.2's "keep sampling mask", arXiv 2512.02556 [digest]). The
                ratio's mean is 1: weights are unbiased for the learner in S

    Args:
        rollout: Rollout of a sampler.
        support: Name of the convention.

    Raises:
        ValueError: The rollout lacks what the convention needs.
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
    """Return the ids over which K tokens of the flattened batch are normalized, or None for each policy's kept set."""
    if (
        rollout.sampling_params.support != "rollout"
        or rollout.filter_support is None
        or rollout.filter_support.ids is None
    ):
        return None
    return rollout.filter_support.ids.flatten(0, 1)[places]
