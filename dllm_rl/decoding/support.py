"""The support of a filtered distribution: the tokens that top_k or top_p does not remove.

A sampler records the support of each token, and the learner normalizes log-probs by one of three conventions
(`with_support`). docs/papers.md explains the tag [digest].
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.types.rollouts import FilterSupport, Rollout, Support

MAX_SUPPORT_IDS = 64  # largest support whose token ids a rollout records


def filter_support(
    logits: Float[Tensor, "K V"], filtered: Float[Tensor, "K V"]
) -> tuple[Float[Tensor, " K"], Int[Tensor, "K C"]]:
    """Return the log-prob of a filter's support, in nats, and up to MAX_SUPPORT_IDS + 1 ids of it.

    The ids are in descending order of probability, padded with -1.
    """
    log_mass = filtered.logsumexp(-1) - logits.logsumexp(-1)
    # MAX_SUPPORT_IDS + 1 ids show that the support is too large to be recorded.
    values, ids = filtered.topk(min(MAX_SUPPORT_IDS + 1, filtered.shape[-1]), dim=-1)
    return log_mass, ids.where(values > -torch.inf, -1).int()


def make_filter_support(log_mass: Float[Tensor, "B T"], ids: Int[Tensor, "B T C"]) -> FilterSupport:
    """Make a rollout's record from the results of `filter_support` for each token.

    The ids have as few columns as possible, and are None if any token has more than MAX_SUPPORT_IDS.
    """
    width = int((ids >= 0).sum(-1).max())
    return FilterSupport(log_mass, None if width > MAX_SUPPORT_IDS else ids[..., :width])


def with_support(rollout: Rollout, support: Support) -> Rollout:
    """Apply a convention for scoring under top_k or top_p to a rollout. Without these filters, return it unchanged.

    With p the rollout's distribution, S its support, and q the learner's distribution, the conventions are:

    per_policy  each policy normalizes over its filter's support and the sampled token. The mean of the ratio is not 1
    unfiltered  both policies normalize over the full vocabulary. The mean of the ratio is q(S)/p(S)
    rollout     every policy normalizes over S (DeepSeek-V3.2's "keep sampling mask", arXiv 2512.02556 [digest]). The
                mean of the ratio is 1: weights are unbiased for the learner's distribution restricted to S

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
        raise ValueError(f"support={support!r}: the rollout has {params.support!r} already; pass the sampler's rollout")
    record = rollout.filter_support
    if record is None or (support == "rollout" and record.ids is None):
        advice = "sample with this library's samplers, or use 'per_policy'"
        if support == "rollout":
            advice = f"ids are recorded for at most {MAX_SUPPORT_IDS} tokens; lower top_k or top_p, or use 'unfiltered'"
        raise ValueError(f"support={support!r} needs the filter's support, which is not recorded: {advice}")
    rollout = replace(rollout, sampling_params=replace(params, support=support))
    return rollout if support == "rollout" else replace(rollout, logprobs=rollout.logprobs + record.log_mass)
