"""Router replay: masks with the rollout's experts, for the learner to take again.

R3 (arXiv 2510.11370 [paper]) replays the experts that the sampler recorded for the state that each token was drawn
from; the learner's router chooses elsewhere. Estimates that score the rollout again (`causal`, ELBOs) replay the
experts of all tokens in that scoring.
"""

from dataclasses import replace

import torch
from jaxtyping import Int, Integer
from torch import Tensor

from dllm_rl.models.base import Policy
from dllm_rl.models.forward.routing import Routing, agreement, load, mixtures
from dllm_rl.types import Noise, Rollout


def check_replay(policy: Policy, mode: str | None) -> None:
    """Raise ValueError where there are no experts to replay."""
    if mode is not None and not mixtures(policy.module):
        raise ValueError(
            f"router_replay={mode!r} takes experts again, and {type(policy.module).__name__} has none; leave it at None"
        )


def blank(policy: Policy, rollout: Rollout, noise: Noise) -> Integer[Tensor, "N B T M E"]:
    """An empty tensor for the experts of every view, which `LikelihoodEstimator.scores` fills."""
    with torch.no_grad(), Routing(policy.module) as routing:  # a forward of one token tells mixtures and dtype
        policy.hidden(rollout.tokens[:1, :1], torch.ones_like(rollout.attention_mask[:1, :1]))
    experts = routing.experts(1)
    return experts.new_zeros(*noise.weight.shape, *experts.shape[2:])


def as_sampled(noise: Noise, rollout: Rollout) -> Noise:
    """The masks with the sampler's recorded experts. Raises ValueError where none are recorded."""
    if rollout.experts is None:
        raise ValueError(
            "router_replay='R3' needs the rollout's experts, which its sampler did not note; sample with unmask, or "
            "set router_replay=None"
        )
    if noise.step is not None:
        raise ValueError(
            "router_replay='R3': a rollout that revises (remask, soft_edit) records the experts of each position's "
            "last writing alone; leave router_replay at None"
        )
    routed = noise.weight != 0
    if noise.left is not None:  # no token was drawn there, so that no experts are recorded
        routed &= ~noise.left
    return replace(noise, experts=rollout.experts[None], routed=routed)  # one record for all views: each token once


def as_noted(noise: Noise, rollout: Rollout, experts: Integer[Tensor, "N B T M E"] | None) -> Noise:
    """The masks with the experts of all tokens from another policy's scoring."""
    return replace(noise, experts=experts, routed=rollout.attention_mask.expand_as(noise.weight))


@torch.no_grad()
def routing_counts(policy: Policy, rollout_policy: Policy, rollout: Rollout, noise: Noise) -> Int[Tensor, "M X"] | None:
    """Counts per mixture, under the first view and one row per prompt: choices that both sides make, all choices, the
    tokens of each expert in the rollout, and in the learner. None without mixtures, or where an engine hides them."""
    if not (mixtures(policy.module) and mixtures(rollout_policy.module)):
        return None
    first = slice(None, None, rollout.group_size)  # one row per prompt: enough choices, a group's share of the work
    seen = rollout.attention_mask[first]
    tokens = noise.seen(rollout, 0, policy.spec.mask_id)[first]
    sides = []
    for each in (policy, rollout_policy):
        with Routing(each.module) as routing:
            each.hidden(tokens, seen)
        sides.append(routing.experts(len(tokens))[seen])
    ours, theirs = sides
    same = agreement(ours, theirs).sum((0, 2))
    every = torch.full_like(same, ours.shape[0] * ours.shape[2])
    count = max(map(routing.num_experts, range(len(routing.layers))))  # one table for mixtures of any size
    return torch.cat([same[:, None], every[:, None], load(theirs, count), load(ours, count)], dim=1)


def routing_metrics(counts: Int[Tensor, "M X"]) -> dict[str, float]:
    """Of counts over all processes:

    routing/agreement[/layer_I]  share of the rollout's experts that the learner takes too
    routing/max_violation[/learner][/layer_I]  the busiest expert's tokens / the mean - 1, of the rollout and the
                                               learner, the largest or per layer (DeepSeek's MaxVio, arXiv 2408.15664
                                               [paper]); 0 is balance
    routing/idle[/learner]  share of experts that no token takes
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
