"""Agreement of learner and rollout in the experts of each token, measured in every quantized run of a mixture."""

import warnings

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.routing import Routing, agreement, load, mixtures
from dllm_rl.types import Rollout, Views


@torch.no_grad()
def routing_counts(policy: Policy, rollout_policy: Policy, rollout: Rollout, views: Views) -> Int[Tensor, "M X"] | None:
    """Return counts per mixture, under the first view and one row per prompt: choices that both sides make, all
    choices, the tokens of each expert in the rollout, and in the learner.

    None without mixtures, if an engine hides them, if encoder and decoder route separately, or, with a warning, if a
    router's choice cannot be read.
    """
    if policy.spec.attention == "encoder_decoder" or not (mixtures(policy.module) and mixtures(rollout_policy.module)):
        return None
    first = slice(None, None, rollout.group_size)  # one row per prompt: enough choices, at a fraction of the work
    seen = rollout.attention_mask[first]
    tokens = next(each_view(views)).seen(policy, rollout)[first]
    sides = []
    for each in (policy, rollout_policy):
        with Routing(each.module) as routing:
            each.hidden(tokens, seen)
        if why := routing.unknown_reason():
            warnings.warn(f"routing/* is not measured: {why}", stacklevel=1)  # Python does not repeat it
            return None
        sides.append(routing.experts(len(tokens))[seen])
    ours, theirs = sides
    same = agreement(ours, theirs).sum((0, 2))
    every = torch.full_like(same, ours.shape[0] * ours.shape[2])
    count = max(map(routing.num_experts, range(len(routing.layers))))  # one table for mixtures of any size
    return torch.cat([same[:, None], every[:, None], load(theirs, count), load(ours, count)], dim=1)


def routing_metrics(counts: Int[Tensor, "M X"]) -> dict[str, float]:
    """Return metrics of counts over all processes.

    routing/agreement[/layer_I]: share of the rollout's experts that the learner uses too.

    routing/max_violation[/learner][/layer_I]: the busiest expert's tokens / the mean - 1, of the rollout and the
    learner, the largest or per layer (DeepSeek's MaxVio, arXiv 2408.15664 [paper]); 0 is balance.

    routing/idle[/learner]: share of experts that no token uses.
    """
    counts = counts.double()
    same = counts[:, 0]
    every = counts[:, 1]
    theirs, ours = counts[:, 2:].chunk(2, dim=1)
    metrics = {"routing/agreement": (same.sum() / every.sum()).item()}
    for layer, share in enumerate((same / every).tolist()):
        metrics[f"routing/agreement/layer_{layer}"] = share
    for side, tokens in (("", theirs), ("/learner", ours)):
        worst = (tokens.amax(1) / tokens.mean(1) - 1).tolist()
        metrics[f"routing/max_violation{side}"] = max(worst)
        for layer, share in enumerate(worst):
            metrics[f"routing/max_violation{side}/layer_{layer}"] = share
        metrics[f"routing/idle{side}"] = (tokens == 0).double().mean().item()
    return metrics
