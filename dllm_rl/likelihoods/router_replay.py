"""Router replay (R3): the learner's forwards use the experts that the rollout policy chose.

R3 (arXiv 2510.11370 [paper]) replays the experts that the sampler recorded for the state that each token was drawn
from; for the other states the learner's router chooses. Estimates that do not replay the sampler's steps (`Causal`,
ELBOs) have no such record: the rollout policy scores the rollout first, and the learner uses the experts of this
forward for all tokens. docs/papers.md explains the tag [paper].
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from dllm_rl.likelihoods.order_logprobs import StayMasked
from dllm_rl.likelihoods.views import ForwardPlan, View, ViewFeature
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.routing import Routing, to_state_columns, to_token_columns
from dllm_rl.models.lora import moe_layers
from dllm_rl.types import Rollout, Views


def check_replay(policy: Policy, mode: str | None) -> None:
    """Raise ValueError if `router_replay` is set and the model has no experts to replay."""
    if mode is not None and policy.spec.attention == "encoder_decoder":
        raise ValueError(f"router_replay={mode!r} does not replay renoise's steps; leave it at None")
    if mode is not None and not moe_layers(policy.module):
        raise ValueError(
            f"router_replay={mode!r} replays experts, and {type(policy.module).__name__} has none; leave it at None"
        )


@dataclass(frozen=True)
class Experts(ViewFeature):
    """Feature of views whose forwards use recorded experts.

    Args:
        ids: Recorded expert ids of each view; n=1 for all views.
        where: Tokens that use them. The router chooses the experts of the other tokens.
    """

    ids: Integer[Tensor, "n B T M E"]
    where: Bool[Tensor, "N B T"]

    def apply_to(self, view: View, number: int) -> View:
        ids = self.ids[number if len(self.ids) > 1 else 0]
        forward = partial(_forward_with_experts, forward=view.forward, ids=ids, where=self.where[number])
        return replace(view, forward=forward, share=False)


def _forward_with_experts(
    policy: Policy, plan: ForwardPlan, *inputs: Tensor, forward: Callable[..., Tensor], ids: Tensor, where: Tensor
) -> Tensor:
    with Routing(policy.module, to_state_columns(policy, ids[plan.rows]), to_state_columns(policy, where[plan.rows])):
        return forward(policy, plan, *inputs)


@dataclass(frozen=True)
class ExpertRecorder(ViewFeature):
    """Feature of views whose forwards write the chosen experts into `store`.

    Args:
        store: Expert ids of all rows, also in the views of a chunk of rows.
        flat_index: Index of each token of each view in the flattened N, B and T axes of the store.
    """

    store: Integer[Tensor, "N B T M E"]
    flat_index: Int[Tensor, "n R W"]

    def map(self, f: Callable[[Tensor], Tensor]) -> "ExpertRecorder":
        return replace(self, flat_index=f(self.flat_index))  # all chunks of rows write into the same store

    def apply_to(self, view: View, number: int) -> View:
        flat_index = self.flat_index[number]
        forward = partial(_forward_recording, forward=view.forward, store=self.store, flat_index=flat_index)
        return replace(view, forward=forward)


def _forward_recording(
    policy: Policy,
    plan: ForwardPlan,
    *inputs: Tensor,
    forward: Callable[..., Tensor],
    store: Tensor,
    flat_index: Tensor,
) -> Tensor:
    with Routing(policy.module) as routing:
        states = forward(policy, plan, *inputs)
    experts = to_token_columns(policy, routing.experts(len(plan.rows), flat_index.shape[1]))
    if plan.copies is not None:
        experts = experts[plan.copies[plan.scored_rows]]
    store.flatten(0, 2)[flat_index[plan.scored_rows]] = experts
    return states


def record_experts(policy: Policy, rollout: Rollout, views: Views) -> Views:
    """Return views that record the experts that `policy` chooses when it scores them.

    Call it before scoring under the rollout policy; `with_recorded_experts` then returns the learner's views.
    """
    # A forward of one token shows the number of MoE layers and the dtype of the ids.
    with torch.no_grad(), Routing(policy.module) as routing:
        policy.hidden(rollout.tokens[:1, :1], torch.ones_like(rollout.attention_mask[:1, :1]))
    experts = routing.experts(1)
    store = experts.new_zeros(*views.coefficients.shape, *experts.shape[2:])
    flat_index = torch.arange(views.masked.numel(), device=rollout.tokens.device).view_as(views.masked)
    return replace(views, features=(*views.features, ExpertRecorder(store, flat_index)))


def with_sampled_experts(views: Views, rollout: Rollout) -> Views:
    """Return views whose forwards use the experts that the sampler recorded.

    Raises:
        ValueError: The rollout has no experts, or only those of a position's last write.
    """
    if rollout.experts is None:
        raise ValueError(
            "router_replay='R3' needs the rollout's experts, which its sampler did not record; sample with unmask, "
            "or set router_replay=None"
        )
    if rollout.events is not None:
        raise ValueError(
            "router_replay='R3': a rollout that revises (remask, soft_edit) records only the experts of each "
            "position's last write; leave router_replay at None"
        )
    where = views.coefficients != 0
    for feature in views.features:
        if isinstance(feature, StayMasked):  # no token was drawn at these positions, so no experts are recorded
            where &= ~feature.stay_masked
    experts = Experts(rollout.experts[None], where)  # one record serves all views: each token is drawn in one of them
    return replace(views, features=(*views.features, experts))


def with_recorded_experts(views: Views, rollout: Rollout) -> Views:
    """Return views whose forwards use the experts that scoring recorded. Views without a recorder are unchanged.

    `views` are the result of `record_experts`.
    """
    if not any(isinstance(feature, ExpertRecorder) for feature in views.features):
        return views  # the same object, which all policies share
    features = []
    for feature in views.features:
        if isinstance(feature, ExpertRecorder):
            feature = Experts(feature.store, rollout.attention_mask.expand_as(views.coefficients))
        features.append(feature)
    return replace(views, features=tuple(features))
