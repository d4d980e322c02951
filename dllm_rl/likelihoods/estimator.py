"""The interface of a sequence-likelihood estimator.

An estimator scores several views of the batch. A view masks some positions and scores some positions. `combine` adds
up the views' log-probs per position; the sum over T estimates log p(completion | prompt). The views are drawn once, and
every policy is scored with the same views. Scoring and the update process one view at a time, so that memory does not
grow with the number of views.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from dllm_rl.likelihoods.views import each_view, row_chunks
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.uneven import join_uneven_forwards
from dllm_rl.types import Rollout, Views


def weighted_sum(scores: Float[Tensor, "N B T"], views: Views) -> Float[Tensor, "B T"]:
    """Return sum_n coefficient_n * log p(y_t | view n) per position, in nats. This is the default `combine`."""
    total = torch.zeros_like(scores[0])
    # One by one, so that the sum has the same bits as the sampler's record.
    for view_scores, coefficients in zip(scores, views.coefficients, strict=True):
        total = total + view_scores * coefficients
    return total


def ignore_advantages(views: Views, advantages: Float[Tensor, " B"]) -> Views:
    """Return the views unchanged. This is the default `with_advantages`."""
    return views


@dataclass(frozen=True)
class LikelihoodEstimator:
    """An estimate of log p(completion | prompt): pure functions that draw the views and combine their log-probs.

    Use a function of `likelihoods.estimators` (`elbo`, `trajectory`, ...) for a published estimate, and this record for
    a custom one, which `check_estimator` tests. Contributions are zero outside the completion. Both sides of a ratio
    must use the same estimator and the same views.

    Args:
        name: Name of the estimate in error messages.
        draw_views: Function of the rollout and a generator. It returns the masks and coefficients of every view.
        combine: Function of the log-probs (N, B, T) and the views. It returns contributions (B, T) in nats and must be
            differentiable.
        with_advantages: Function that adapts the views to the advantages (B,). Only `sandwich` needs it.
        supported_attention: Values of the policy's attention for which the estimate is defined.
        exact_for_sampler: Whether scoring under the rollout policy equals the sampler's record (`recorded`). If True,
            the record is reused.
        scores_order: Whether the views also score an order that has a log-probability (`models.order`).
        replays_steps: Whether view n shows what the sampler saw before it wrote the tokens that the view scores, and
            the views are in the sampler's order, as `value_head` requires.
        is_random: Whether two calls of `draw_views` differ. If True, each inner update may draw separate masks
            (`Recipe.resample_masks`).
        reads_confidence_change: Whether `draw_views` needs `Rollout.confidence_change`.
        block_size: Required block size of the policy, for views that mask complete blocks. None: any.

    Attributes:
        factory: Function that made the estimator, with its keywords, so that the command line can change a keyword. Set
            by `members.configurable`.

    Example:
            views = coupled().draw_views(rollout, generator)
            log_ratio = coupled().logprobs(policy, rollout, views) - coupled().logprobs(other, rollout, views)
    """

    name: str
    draw_views: Callable[[Rollout, Generator], Views]
    combine: Callable[[Tensor, Views], Tensor] = weighted_sum
    with_advantages: Callable[[Views, Tensor], Views] = ignore_advantages
    supported_attention: tuple[str, ...] = ("full", "block_causal")
    exact_for_sampler: bool = False
    scores_order: bool = False
    replays_steps: bool = False
    is_random: bool = True
    reads_confidence_change: bool = False
    block_size: int | None = None
    factory: partial | None = field(default=None, init=False, repr=False, compare=False)

    def view_logprobs(
        self,
        policy: Policy,
        rollout: Rollout,
        views: Views,
        *,
        micro_batch_size: int | None = None,
        retain_graphs: bool | Bool[Tensor, " B"] = False,
    ) -> Float[Tensor, "N B T"]:
        """Return log p(y_t | view n) in nats where view n scores t, and 0 elsewhere.

        Call it with `retain_graphs` to differentiate the result; call `logprobs` if no gradient is needed.

        Args:
            policy: Policy to score under.
            rollout: Rollout to score, of B rows.
            views: Views of `draw_views`.
            micro_batch_size: Number of rows per forward. None: all.
            retain_graphs: Rows whose autograd graphs are retained until their backward: all (True), the marked rows
                of a mask (B,), or none (False), so that the result has no gradient.
        """
        self.check(policy)
        out = torch.zeros(views.coefficients.shape, device=rollout.tokens.device)
        passes = [(views, retain_graphs is True)]
        if isinstance(retain_graphs, Tensor):  # no backward would free the graphs of the other rows
            passes = [(views.restrict_to_rows(~retain_graphs), False), (views.restrict_to_rows(retain_graphs), True)]
        for pass_views, with_grad in passes:
            # Processes may have different numbers of rows: see `join_uneven_forwards`.
            with torch.set_grad_enabled(with_grad), join_uneven_forwards(policy):
                for chunk in row_chunks(rollout, pass_views, micro_batch_size):
                    chunk_rollout, chunk_views = chunk.of(rollout, pass_views)
                    for n, view in enumerate(each_view(chunk_views)):
                        out[n, chunk.rows, chunk.columns] = view.logprobs(policy, chunk_rollout)
        return out

    def backward(
        self,
        policy: Policy,
        rollout: Rollout,
        views: Views,
        vectors: Float[Tensor, "N B T"],
        *,
        micro_batch_size: int | None = None,
    ) -> None:
        """Compute `view_logprobs(...).backward(vectors)` without retained graphs.

        Every forward runs again and is differentiated immediately, so that memory does not grow with the number of
        views. `vectors` is the gradient of the loss with respect to `view_logprobs(...)`.
        """
        with join_uneven_forwards(policy, backward=True):
            for chunk in row_chunks(rollout, views, micro_batch_size):
                chunk_rollout, chunk_views = chunk.of(rollout, views)
                for view, grad_output in zip(each_view(chunk_views), vectors, strict=True):
                    view.backward(policy, chunk_rollout, grad_output[chunk.rows][:, chunk.columns])

    def logprobs(
        self, policy: Policy, rollout: Rollout, views: Views, *, micro_batch_size: int | None = None
    ) -> Float[Tensor, "B T"]:
        """Return each position's contribution to the estimate in nats, without gradient.

        The sum over T estimates the sequence's log-prob.
        """
        return self.combine(self.view_logprobs(policy, rollout, views, micro_batch_size=micro_batch_size), views)

    @property
    def exact_ratios(self) -> bool:
        """Whether exp(difference of two policies' estimates) is the ratio of the probabilities of what was sampled."""
        return self.exact_for_sampler or self.supported_attention == ("causal",)

    def is_exact_for(self, rollout: Rollout) -> bool:
        """Return whether the estimate is the log-probability of the sampled tokens and of their order.

        The result is False if the probability of the order is unknown, or if the estimate leaves it out.
        """
        if self.supported_attention == ("causal",):
            return True
        if not self.exact_for_sampler:
            return False
        if rollout.order is None:
            return rollout.renoised is not None
        order_status = rollout.order.probability
        return order_status in ("deterministic", "independent") or (order_status != "unknown" and self.scores_order)

    def check(self, policy: Policy) -> None:
        """Raise ValueError when the estimate does not support this policy's attention or block size."""
        if policy.spec.attention not in self.supported_attention:
            raise ValueError(
                f"likelihood={self.name!r} is for {' or '.join(self.supported_attention)} attention, but the policy's "
                f"is {policy.spec.attention!r}; "
                f"use {'causal()' if policy.spec.attention == 'causal' else 'trajectory()'}"
            )
        if self.block_size not in (None, policy.spec.block_size):
            raise ValueError(f"block_size={self.block_size} is not the policy's block size, {policy.spec.block_size}")


def recorded(rollout: Rollout, views: Views) -> Float[Tensor, "B T"]:
    """Return the contributions (B, T) that the sampler recorded, in nats.

    Call it instead of scoring if the estimator is `exact_for_sampler`.
    """
    logprobs = rollout.logprobs
    for feature in views.features:
        logprobs = feature.sampler_logprobs(rollout, logprobs)
    return logprobs
