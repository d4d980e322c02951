"""The log-probability of the order in which a sampler writes the positions, as `Trajectory()` scores it.

Under the rank `Confidence`, each view also scores the positions that its step left masked. Under `PlackettLuce`, each
written position also gets the log-prob of being drawn next, and under `SoftThreshold` its share of the log-prob of the
set of positions that its step wrote. decoding/order.py explains the formulas.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.decoding import order
from dllm_rl.likelihoods.packed import Packed
from dllm_rl.likelihoods.views import ForwardPlan, View, ViewFeature, ViewStates
from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import backward_chunked, token_logprobs
from dllm_rl.types.rollouts import Order, Rollout
from dllm_rl.types.scoring import Views


def add_order_logprobs(rollout: Rollout, views: Views) -> Views:
    """Add the recorded log-probability of the order to views of one step each.

    Raises:
        ValueError: The distribution was filtered, and its support is not recorded at positions that stayed masked.
    """
    params, record = rollout.sampling_params, recorded_order(rollout)
    if params.filters and params.support != "per_policy" and record.rank_function is None:
        raise ValueError(
            f"sampling_support={params.support!r}: the rollout does not record which tokens a filter kept at positions "
            "left masked, so their order has no probability; use sampling_support='per_policy', or "
            "likelihood=Trajectory(include_order=False)"
        )
    stay_masked = views.masked & (views.coefficients == 0)
    if not any(isinstance(feature, Packed) for feature in views.features):
        # The positions of later blocks are masked too, but the step could not choose them.
        step = torch.arange(len(stay_masked), device=stay_masked.device)[:, None, None]
        stay_masked &= record.block_first_step <= step
    coefficients = views.coefficients + stay_masked
    return replace(views, coefficients=coefficients, features=(*views.features, StayMasked(stay_masked)))


@dataclass(frozen=True)
class StayMasked(ViewFeature):
    """Feature of views that also score positions by the probability of staying masked."""

    is_per_token: ClassVar[bool] = False  # a contribution includes an order's log-prob

    stay_masked: Bool[Tensor, "N B T"]

    def apply_to(self, view: View, number: int) -> View:
        return OrderView(**{**vars(view), "stay_masked": self.stay_masked[number]})

    def sampler_logprobs(self, rollout: Rollout, logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        assert rollout.order is not None and rollout.order.logprobs is not None, "views score a recorded order"
        return rollout.order.logprobs + logprobs  # summed as views are: staying masked in earlier steps, then writing


class OrderView(View):
    """A view that scores the tokens of one step and its choice of positions.

    A written position is scored by the log-prob of its token. Under `Confidence`, a position that stays masked is
    scored by the log-prob of staying masked. Under `PlackettLuce` and `SoftThreshold` it scores 0, and each written
    position also gets the log-prob of its draw, or its share of the log-prob of the set.
    """

    def logprobs_at(self, policy: Policy, rollout: Rollout, view_states: ViewStates) -> Float[Tensor, " K"]:
        plan, params = view_states.plan, rollout.sampling_params
        written, stay_masked = plan.written, plan.stay_masked
        states, tokens = view_states.states[written], view_states.tokens[written]
        if recorded_order(rollout).rank_function is not None:
            support_ids = view_states.support_ids
            if support_ids is not None:
                support_ids = support_ids[written]
            logps = token_logprobs(policy, states, tokens, params, support_ids)
            logps = logps + self._draw_logprobs(policy, rollout, view_states)
            return logps.new_zeros(len(plan.flat_index)).index_copy(0, written, logps)
        logps, confidences = order.token_logprobs_and_confidences(policy, states, tokens, params)
        cutoff = _commit_cutoff(rollout, plan, confidences)
        stay_logps = order.stay_masked_logprobs(policy, view_states.states[stay_masked], *cutoff, params)
        out = logps.new_zeros(len(plan.flat_index)).index_copy(0, written, logps)
        return out.index_copy(0, stay_masked, stay_logps)

    def _draw_logprobs(self, policy: Policy, rollout: Rollout, view_states: ViewStates) -> Float[Tensor, " C"]:
        """Return the order's log-prob at each written position, under `PlackettLuce` or `SoftThreshold`."""
        record, plan = recorded_order(rollout), view_states.plan
        block_ids, width = _block_ids(rollout, plan), rollout.tokens.shape[1]
        assert record.rank_function is not None, "the positions were drawn by scores"
        scores = order.state_scores(policy, view_states.states, rollout.sampling_params, record.rank_function)
        if record.soft_threshold_params is not None:
            tau, temperature = record.soft_threshold_params
            return order.set_logprobs(scores, block_ids, plan.written, width, tau=tau, temperature=temperature)
        assert record.draw_index is not None, "the order of `PlackettLuce`"
        draw_index = record.draw_index.flatten()[plan.flat_index]
        draw_index = draw_index.index_fill(0, plan.stay_masked, width)  # positions that stay masked are drawn later
        return order.plackett_luce_logprobs(scores, block_ids, draw_index, plan.written, width)

    def backward(self, policy: Policy, rollout: Rollout, grad_output: Float[Tensor, "B T"]) -> None:
        assert self.stay_masked is not None, "`StayMasked` sets it"
        has_draws = recorded_order(rollout).rank_function is not None
        positions = self.scored & (grad_output != 0).any(-1, keepdim=True)
        if not has_draws:  # the probability of staying masked depends on the tokens that the step wrote
            positions = (grad_output != 0) | (positions & ~self.stay_masked)
        view_states = self.run(policy, rollout, positions)  # a draw depends on all masked positions of its step
        if view_states is None:
            return
        plan, states, params = view_states.plan, view_states.states, rollout.sampling_params
        grad_output = grad_output.flatten()[plan.flat_index]
        if has_draws:
            logps = self.logprobs_at(policy, rollout, view_states)
            if logps.requires_grad:
                logps.backward(grad_output)
            return
        written, stay_masked = plan.written, plan.stay_masked
        score_written = order.score_committed(policy, params)
        tokens = view_states.tokens[written]
        written_gradient, (confidences,) = backward_chunked(
            score_written, policy, grad_output[written], states[written], tokens
        )
        cutoff = _commit_cutoff(rollout, plan, confidences)
        score_stay_masked = order.score_stay_masked(policy, params)
        stay_gradient, _ = backward_chunked(
            score_stay_masked, policy, grad_output[stay_masked], states[stay_masked], *cutoff
        )
        if states.requires_grad:  # False if only the head is trained
            gradient = torch.zeros_like(states).index_copy(0, written, written_gradient)
            states.backward(gradient.index_copy(0, stay_masked, stay_gradient))  # one backward through the backbone


def recorded_order(rollout: Rollout) -> Order:
    """Return the rollout's order, which must be recorded."""
    assert rollout.order is not None, "an order is scored only where the sampler recorded it"
    return rollout.order


def _commit_cutoff(rollout: Rollout, plan: ForwardPlan, confidences: Float[Tensor, " C"]) -> tuple[Tensor, Tensor]:
    """The two vectors of `decoding.order.commit_cutoff`, one entry per position that stays masked in the step."""
    block_ids = _block_ids(rollout, plan)
    column = plan.flat_index % rollout.tokens.shape[1]
    written, stay_masked = plan.written, plan.stay_masked
    return order.commit_cutoff(
        confidences,
        block_ids[written],
        column[written],
        block_ids[stay_masked],
        column[stay_masked],
        num_steps=rollout.tokens.numel(),
    )


def _block_ids(rollout: Rollout, plan: ForwardPlan) -> Int[Tensor, " K"]:
    """Return an id per row and block for each position: row * width + the number of positions of earlier blocks."""
    width = rollout.tokens.shape[1]
    # A block's first step may exceed the width: `LateSchedule` may have more steps than positions.
    first_step = recorded_order(rollout).block_first_step.contiguous()
    num_earlier = torch.searchsorted(first_step.sort(-1).values, first_step)
    return plan.flat_index // width * width + num_earlier.flatten()[plan.flat_index]
