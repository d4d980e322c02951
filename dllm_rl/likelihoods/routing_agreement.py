"""Measure how often learner and rollout route a token to the same experts, in every quantized run of a mixture of
experts.
"""

import warnings

import torch
from jaxtyping import Int
from torch import Tensor

from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.routing import Routing, agreement, tokens_per_expert
from dllm_rl.models.lora import moe_layers
from dllm_rl.types import Rollout, Views, starts_group


def routes_comparably(policy: Policy, rollout_policy: Policy) -> bool:
    """Return whether both policies show the experts of each token: not if an engine hides them, or if encoder and
    decoder route separately.
    """
    has_experts = moe_layers(policy.module) and moe_layers(rollout_policy.module)
    return bool(has_experts) and policy.spec.attention != "encoder_decoder"


@torch.no_grad()
def routing_counts(policy: Policy, rollout_policy: Policy, rollout: Rollout, views: Views) -> Int[Tensor, "M X"] | None:
    """Count expert choices per layer with experts, under the first view, in one row per prompt.

    Returns:
        Columns: choices that both policies make, all choices, tokens of each expert in the rollout, tokens of each
        expert in the learner. None unless the policies `routes_comparably`, or, with a warning, if a router's choice
        cannot be read.
    """
    if not routes_comparably(policy, rollout_policy):
        return None
    first_rows = starts_group(rollout.group)  # one row per prompt: enough choices, at a fraction of the work
    attention_mask = rollout.attention_mask[first_rows]
    tokens = next(each_view(views)).inputs_and_targets(policy, rollout)[0][first_rows]
    experts_by_side = []
    for side_policy in (policy, rollout_policy):
        with Routing(side_policy.module) as routing:
            side_policy.hidden(tokens, attention_mask)
        if reason := routing.unknown_reason():
            warnings.warn(f"routing/* is not measured: {reason}", stacklevel=1)  # Python does not repeat it
            return None
        experts_by_side.append(routing.experts(len(tokens))[attention_mask])
    learner_experts, rollout_experts = experts_by_side
    num_same = agreement(learner_experts, rollout_experts).sum((0, 2))
    num_choices = torch.full_like(num_same, learner_experts.shape[0] * learner_experts.shape[2])
    # One table for layers with different numbers of experts.
    count = max(map(routing.num_experts, range(len(routing.layers))))
    return torch.cat(
        [
            num_same[:, None],
            num_choices[:, None],
            tokens_per_expert(rollout_experts, count),
            tokens_per_expert(learner_experts, count),
        ],
        dim=1,
    )


def routing_metrics(counts: Int[Tensor, "M X"]) -> dict[str, float]:
    """Return metrics of counts over all processes.

    routing/agreement[/layer_I]: share of the rollout's experts that the learner uses too.

    routing/max_violation[/learner][/layer_I]: the busiest expert's tokens / the mean - 1, of the rollout and the
    learner, the largest or per layer (DeepSeek's MaxVio, arXiv 2408.15664 [paper]); 0 is balance.

    routing/idle[/learner]: share of experts that no token uses.
    """
    counts = counts.double()
    num_same = counts[:, 0]
    num_choices = counts[:, 1]
    rollout_loads, learner_loads = counts[:, 2:].chunk(2, dim=1)
    metrics = {"routing/agreement": (num_same.sum() / num_choices.sum()).item()}
    for layer, share in enumerate((num_same / num_choices).tolist()):
        metrics[f"routing/agreement/layer_{layer}"] = share
    for side, tokens in (("", rollout_loads), ("/learner", learner_loads)):
        violations = (tokens.amax(1) / tokens.mean(1) - 1).tolist()
        metrics[f"routing/max_violation{side}"] = max(violations)
        for layer, share in enumerate(violations):
            metrics[f"routing/max_violation{side}/layer_{layer}"] = share
        metrics[f"routing/idle{side}"] = (tokens == 0).double().mean().item()
    return metrics
