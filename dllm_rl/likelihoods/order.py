"""The order's term of `trajectory()`.

Under `confidence`, each view also scores the positions that its step left masked. Under `plackett_luce` and
`soft_threshold`, each written position also gets the log-prob of its draw, or its share of the step's set. Formulas:
models/order.py, models/soft_threshold.py.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.likelihoods.packed import Packed
from dllm_rl.likelihoods.views import Plan, View, ViewFeature, ViewStates
from dllm_rl.models import order
from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import backward_chunked, token_logprobs
from dllm_rl.models.soft_threshold import set_logprobs
from dllm_rl.types import Order, Rollout, Views


def with_order(rollout: Rollout, views: Views) -> Views:
    """Add the order's log-probability to views of one step each, if it has one.

    Raise ValueError where the distribution was filtered and its support is not recorded.
    """
    params = rollout.sampling_params
    recorded = rollout.order
    if recorded is None or recorded.logprobs is None:
        return views
    if params.filters and params.support != "per_policy" and recorded.rank_function is None:
        raise ValueError(
            f"sampling_support={params.support!r}: the rollout does not record which tokens a filter kept at positions "
            "left masked, so their order has no probability; use sampling_support='per_policy', or "
            "trajectory(include_order=False)"
        )
    stayed = views.masked & (views.coefficients == 0)
    if not any(isinstance(part, Packed) for part in views.features):
        # A later block's positions are masked too, but could not be chosen.
        stayed &= recorded.block_first_step <= torch.arange(len(stayed), device=stayed.device)[:, None, None]
    return replace(views, coefficients=views.coefficients + stayed, features=(*views.features, Stayed(stayed)))


@dataclass(frozen=True)
class Stayed(ViewFeature):
    """Feature of views that also score positions by the probability of staying masked."""

    is_per_token: ClassVar[bool] = False  # a contribution includes an order's log-prob

    stayed: Bool[Tensor, "N B T"]

    def apply_to(self, view: View, number: int) -> View:
        return replace(view, scoring=OrderScoring(self.stayed[number]))

    def sampler_logprobs(self, rollout: Rollout, logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        assert rollout.order is not None and rollout.order.logprobs is not None, "views score an order that is recorded"
        return rollout.order.logprobs + logprobs  # in the order in which views are summed: the later step last


@dataclass(frozen=True)
class OrderScoring:
    """Scoring of written positions by their tokens' log-probs, and of positions left masked by the log-prob of staying.

    Under `plackett_luce` and `soft_threshold`, positions left masked score 0, and each written position also gets the
    log-prob of its draw, or its share of the set's.
    """

    marks: Bool[Tensor, "B T"]  # those left masked

    def needed(self, rollout: Rollout, at: Bool[Tensor, "B T"], scored: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        live = scored & at.any(-1, keepdim=True)
        if order_of(rollout).rank_function is not None:  # a draw depends on all positions that its step offered
            return live
        return at | (live & ~self.marks)  # the committed tokens determine the probability of staying masked

    def logprobs(self, policy: Policy, rollout: Rollout, seen: ViewStates) -> Float[Tensor, " K"]:
        plan, params = seen.plan, rollout.sampling_params
        drawn = plan.plain
        states, tokens = seen.states[drawn], seen.tokens[drawn]
        recorded = order_of(rollout)
        if recorded.rank_function is not None:
            kept = seen.kept if seen.kept is None else seen.kept[drawn]
            logps = token_logprobs(policy, states, tokens, params, kept)
            logps = logps + self._of_draws(policy, rollout, seen)
            return logps.new_zeros(len(plan.places)).index_copy(0, drawn, logps)
        logps, confidences = order.token_logprobs_and_confidences(policy, states, tokens, params)
        bounds = _bounds(rollout, plan, confidences)
        stayed = order.left_logprobs(policy, seen.states[plan.marked], *bounds, params)
        out = logps.new_zeros(len(plan.places)).index_copy(0, drawn, logps)
        return out.index_copy(0, plan.marked, stayed)

    def _of_draws(self, policy: Policy, rollout: Rollout, seen: ViewStates) -> Float[Tensor, " C"]:
        """Return what each written position adds under `plackett_luce` and `soft_threshold`."""
        recorded, plan, params = order_of(rollout), seen.plan, rollout.sampling_params
        groups, width = _blocks(rollout, plan), rollout.tokens.shape[1]
        assert recorded.rank_function is not None, "the positions were drawn by scores"
        scores = order.state_scores(policy, seen.states, params, recorded.rank_function)
        if recorded.soft_threshold_params is not None:
            tau, temperature = recorded.soft_threshold_params
            return set_logprobs(scores, groups, plan.plain, width, tau=tau, temperature=temperature)
        assert recorded.draw_index is not None, "the order of `plackett_luce`"
        nth = recorded.draw_index.flatten()[plan.places].index_fill(0, plan.marked, width)  # left: drawn later
        return order.drawn_logprobs(scores, groups, nth, plan.plain, width)

    def backward(self, policy: Policy, rollout: Rollout, seen: ViewStates, vector: Float[Tensor, " K"]) -> None:
        plan, states, params = seen.plan, seen.states, rollout.sampling_params
        if order_of(rollout).rank_function is not None:
            logps = self.logprobs(policy, rollout, seen)
            if logps.requires_grad:
                logps.backward(vector)
            return
        drawn, left = plan.plain, plan.marked
        run = order.score_committed(policy, params)
        of_drawn, (confidences,) = backward_chunked(run, policy, vector[drawn], states[drawn], seen.tokens[drawn])
        bounds = _bounds(rollout, plan, confidences)
        of_left, _ = backward_chunked(order.score_left(policy, params), policy, vector[left], states[left], *bounds)
        if states.requires_grad:  # not if only the head is trained
            gradient = torch.zeros_like(states).index_copy(0, drawn, of_drawn)  # one backward through the backbone
            states.backward(gradient.index_copy(0, left, of_left))


def order_of(rollout: Rollout) -> Order:
    """Return the rollout's order, which must be recorded."""
    assert rollout.order is not None, "an order is scored only where the sampler recorded it"
    return rollout.order


def _bounds(rollout: Rollout, plan: Plan, confidences: Float[Tensor, " C"]) -> tuple[Tensor, Tensor]:
    """Return, for each position left masked, the lowest confidence that its block committed.

    The second result is whether the position is to the right of the position with this confidence.
    """
    block = _blocks(rollout, plan)
    column = plan.places % rollout.tokens.shape[1]
    drawn, left = plan.plain, plan.marked
    number = rollout.tokens.numel()
    return order.commit_cutoff(confidences, block[drawn], column[drawn], block[left], column[left], number)


def _blocks(rollout: Rollout, plan: Plan) -> Int[Tensor, " K"]:
    """Return a rising number for each row and block. The opening step distinguishes the blocks of a packed view."""
    width = rollout.tokens.shape[1]
    return plan.places // width * width + order_of(rollout).block_first_step.flatten()[plan.places]
