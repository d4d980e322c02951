"""Router replay: views with the rollout's experts, for the learner to reuse.

R3 (arXiv 2510.11370 [paper]) replays the experts that the sampler recorded for the state that each token was drawn
from; elsewhere the learner's router chooses. Estimates that score the rollout differently (`causal`, ELBOs) replay the
experts of all tokens in the scoring forward.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from dllm_rl.likelihoods.order import Stayed
from dllm_rl.likelihoods.views import Plan, View, ViewFeature
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.routing import Routing, mixtures, of_states, of_tokens
from dllm_rl.types import Rollout, Views


def check_replay(policy: Policy, mode: str | None) -> None:
    """Raise ValueError if the model has no experts to replay."""
    if mode is not None and policy.spec.attention == "encoder_decoder":
        raise ValueError(f"router_replay={mode!r} does not replay renoise's steps; leave it at None")
    if mode is not None and not mixtures(policy.module):
        raise ValueError(
            f"router_replay={mode!r} takes experts again, and {type(policy.module).__name__} has none; leave it at None"
        )


@dataclass(frozen=True)
class Experts(ViewFeature):
    """Feature of views whose forward n uses recorded experts where `where`; elsewhere a token's router chooses."""

    ids: Integer[Tensor, "n B T M E"]  # n=1: for all views
    where: Bool[Tensor, "N B T"]

    def apply_to(self, view: View, number: int) -> View:
        ids = self.ids[number if len(self.ids) > 1 else 0]
        again = partial(_replaying, forward=view.forward, ids=ids, where=self.where[number])
        return replace(view, forward=again, share=False)


def _replaying(
    policy: Policy, plan: Plan, *inputs: Tensor, forward: Callable[..., Tensor], ids: Tensor, where: Tensor
) -> Tensor:
    with Routing(policy.module, of_states(policy, ids[plan.rows]), of_states(policy, where[plan.rows])):
        return forward(policy, plan, *inputs)


@dataclass(frozen=True)
class Watched(ViewFeature):
    """Feature of views whose forwards write the chosen experts into the store."""

    store: list[Tensor]  # one (N, B, T, M, E) in a list: a feature's tensors are cut to rows, and the store must not be
    place: Int[Tensor, "1 B T"]  # index of each token in the store's B T

    def apply_to(self, view: View, number: int) -> View:
        watching = partial(_watching, forward=view.forward, experts=self.store[0][number], place=self.place[0])
        return replace(view, forward=watching)


def _watching(
    policy: Policy, plan: Plan, *inputs: Tensor, forward: Callable[..., Tensor], experts: Tensor, place: Tensor
) -> Tensor:
    with Routing(policy.module) as routing:
        states = forward(policy, plan, *inputs)
    chosen = of_tokens(policy, routing.experts(len(plan.rows), place.shape[1]))
    if plan.together:
        chosen = chosen.repeat_interleave(len(place) // len(plan.rows), 0)[plan.live]
    experts.flatten(0, 1)[place[plan.live]] = chosen
    return states


def watched(policy: Policy, rollout: Rollout, views: Views) -> Views:
    """Return views under which scoring records the experts that `policy` chooses, for `as_chosen`."""
    with torch.no_grad(), Routing(policy.module) as routing:  # a forward of one token shows mixtures and dtype
        policy.hidden(rollout.tokens[:1, :1], torch.ones_like(rollout.attention_mask[:1, :1]))
    experts = routing.experts(1)
    store = experts.new_zeros(*views.coefficients.shape, *experts.shape[2:])
    place = torch.arange(rollout.tokens.numel(), device=rollout.tokens.device).view_as(rollout.tokens)[None]
    return replace(views, features=(*views.features, Watched([store], place)))


def as_sampled(views: Views, rollout: Rollout) -> Views:
    """Return the views with the sampler's recorded experts. Raise ValueError where none are recorded."""
    if rollout.experts is None:
        raise ValueError(
            "router_replay='R3' needs the rollout's experts, which its sampler did not note; sample with unmask, or "
            "set router_replay=None"
        )
    if rollout.events is not None:
        raise ValueError(
            "router_replay='R3': a rollout that revises (remask, soft_edit) records the experts of each position's "
            "last writing alone; leave router_replay at None"
        )
    where = views.coefficients != 0
    for part in views.features:
        if isinstance(part, Stayed):  # no token was drawn at these positions, so no experts are recorded
            where &= ~part.stayed
    experts = Experts(rollout.experts[None], where)  # one record for all views: each token once
    return replace(views, features=(*views.features, experts))


def as_chosen(views: Views, rollout: Rollout) -> Views:
    """Return the views with the experts that a scoring under `watched` ones recorded; other views unchanged."""
    if not any(isinstance(part, Watched) for part in views.features):
        return views  # the same object, which all policies share
    parts = []
    for part in views.features:
        if isinstance(part, Watched):
            part = Experts(part.store[0], rollout.attention_mask.expand_as(views.coefficients))
        parts.append(part)
    return replace(views, features=tuple(parts))
