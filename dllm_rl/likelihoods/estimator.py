"""The interface of a sequence-likelihood estimator.

An estimator scores several views of the batch. A view masks some positions and scores some positions. `combine` adds
up the views' log-probs per position; the sum over T estimates log p(completion | prompt). The views are drawn once, and
every policy is scored with the same views. Scoring and the update process one view at a time, so that memory does not
grow with the number of views.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from dllm_rl.likelihoods.turns import check_turns
from dllm_rl.likelihoods.views import each_view, row_chunks
from dllm_rl.models.base import Policy, join_uneven_forwards
from dllm_rl.records import Record
from dllm_rl.types import Rollout, Views


def weighted_sum(scores: Float[Tensor, "N B T"], views: Views) -> Float[Tensor, "B T"]:
    """Return sum_n coefficient_n * log p(y_t | view n) per position, in nats. This is the default of `combine`."""
    total = torch.zeros_like(scores[0])
    # One by one, so that the sum has the same bits as the sampler's record.
    for view_scores, coefficients in zip(scores, views.coefficients, strict=True):
        total = total + view_scores * coefficients
    return total


class LikelihoodEstimator(Record):
    """An estimate of log p(completion | prompt): pure functions that draw the views and combine their log-probs.

    Use a class of `likelihoods.estimators` (`ELBO`, `Trajectory`, ...) for a published estimate. For a custom one,
    subclass this class, override `draw_views` and the properties that differ, and test it by `check_estimator`. Where
    an estimator is expected, a plain function (rollout, generator) -> Views is one too. Contributions are zero outside
    the completion. Both sides of a ratio must use the same estimator and the same views.

    Example:
            views = Coupled().draw_views(rollout, generator)
            log_ratio = Coupled().logprobs(policy, rollout, views) - Coupled().logprobs(other, rollout, views)
    """

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        """Return the masks and coefficients of every view of the rollout."""
        raise TypeError(f"{type(self).__name__} must define draw_views(rollout, generator)")

    def combine(self, scores: Float[Tensor, "N B T"], views: Views) -> Float[Tensor, "B T"]:
        """Return the contributions in nats of the views' log-probs; differentiable. Default: `weighted_sum`."""
        return weighted_sum(scores, views)

    def with_advantages(self, views: Views, advantages: Float[Tensor, " B"]) -> Views:
        """Return the views, adapted to the advantages, as `Sandwich` does. Default: unchanged."""
        return views

    @property
    def name(self) -> str:
        """Name of the estimate in messages."""
        return type(self).__name__

    @property
    def supported_attention(self) -> tuple[str, ...]:
        """Values of the policy's attention for which the estimate is defined."""
        return ("full", "block_causal")

    @property
    def exact_for_sampler(self) -> bool:
        """Whether scoring under the rollout policy equals the sampler's record (`recorded`). It is then reused."""
        return False

    @property
    def scores_order(self) -> bool:
        """Whether the views also score an order that has a log-probability (`decoding.order`)."""
        return False

    @property
    def replays_steps(self) -> bool:
        """Whether view n shows what the sampler saw before it wrote the tokens that the view scores.

        The views must be in the sampler's order. A `ValueModel` requires it.
        """
        return False

    @property
    def is_random(self) -> bool:
        """Whether two calls of `draw_views` differ. Inner updates may then draw separate masks (`resample_masks`)."""
        return True

    @property
    def reads_confidence_change(self) -> bool:
        """Whether `draw_views` needs `Rollout.confidence_change`."""
        return False

    @property
    def required_block_size(self) -> int | None:
        """Block size that the policy must have, for views that mask complete blocks. None: any."""
        return None

    @classmethod
    def convert(cls, value: Any) -> "LikelihoodEstimator | None":
        return FunctionLikelihood(function=value) if callable(value) else None

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
        self.check_policy(policy)
        if rollout.first_step is not None:
            check_turns(policy, views)
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

    def check_policy(self, policy: Policy) -> None:
        """Raise ValueError when the estimate does not support this policy's attention or block size."""
        if policy.spec.attention not in self.supported_attention:
            raise ValueError(
                f"likelihood={self.name!r} is for {' or '.join(self.supported_attention)} attention, but the policy's "
                f"is {policy.spec.attention!r}; "
                f"use {'Causal()' if policy.spec.attention == 'causal' else 'Trajectory()'}"
            )
        if self.required_block_size not in (None, policy.spec.block_size):
            raise ValueError(
                f"block_size={self.required_block_size} is not the policy's block size, {policy.spec.block_size}"
            )


class FunctionLikelihood(LikelihoodEstimator):
    """An estimator whose views a function draws.

    Args:
        function: Function of the rollout and a generator. It returns the masks and coefficients of every view.
        combine_fn: Function of the log-probs (N, B, T) and the views. It returns contributions (B, T) in nats and must
            be differentiable. None (default): `weighted_sum`.
        advantages_fn: Function that adapts the views to the advantages (B,). None (default): unchanged.
        supported_attention: Values of the policy's attention for which the estimate is defined. Default: full and
            block_causal.
        is_random: Whether two calls of `function` differ. Default: True.
    """

    function: Callable[[Rollout, Generator], Any]
    combine_fn: Callable[[Tensor, Views], Any] | None = None
    advantages_fn: Callable[[Views, Tensor], Any] | None = None
    supported_attention: tuple[str, ...] = ("full", "block_causal")
    is_random: bool = True

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        return self.function(rollout, generator)

    def combine(self, scores: Tensor, views: Views) -> Tensor:
        return weighted_sum(scores, views) if self.combine_fn is None else self.combine_fn(scores, views)

    def with_advantages(self, views: Views, advantages: Tensor) -> Views:
        return views if self.advantages_fn is None else self.advantages_fn(views, advantages)


def recorded(rollout: Rollout, views: Views) -> Float[Tensor, "B T"]:
    """Return the contributions (B, T) that the sampler recorded, in nats.

    Call it instead of scoring if the estimator is `exact_for_sampler`.
    """
    logprobs = rollout.logprobs
    for feature in views.features:
        logprobs = feature.sampler_logprobs(rollout, logprobs)
    return logprobs
