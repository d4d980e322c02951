"""What a sequence-likelihood estimator is: masks are drawn once, as data; every policy is scored under the same masks.

An estimator is a number of views of the batch. In view n some positions are masked and some are scored. `combine` sums
the views' log-probs per position; the sum over T estimates log p(completion | prompt). Scoring and the update both take
the views one at a time, in constant memory.
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
    """sum_n weight_n * log p(y_t | view n), per position, nats."""
    total = torch.zeros_like(scores[0])
    for score, weight in zip(scores, views.coefficients, strict=True):  # view by view, as a sampler adds up its record
        total = total + score * weight
    return total


def as_drawn(views: Views, advantages: Float[Tensor, " B"]) -> Views:
    return views  # most estimates do not depend on the advantages


@dataclass(frozen=True)
class LikelihoodEstimator:
    """Draws masks and combines the views' log-probs, as pure functions. Contributions are zero off the completion; both
    sides of a ratio use the same estimator and views.

    Args:
        draw_views: Rollout, generator -> masks and weights of every view.
        combine: Scores (N, B, T), views -> contributions (B, T); differentiable.
        with_advantages: Adapts the views to the advantages (B,); only `sandwich` needs it.
        exact_for_sampler: True if scoring under the rollout policy equals the sampler's record (`recorded`), reused
            then.
        scores_order: True if the views also score an order that has a log-probability (`models.order`).
        is_random: Whether two draws differ: an inner update then takes masks of its own (`Recipe.resample_masks`).
        reads_confidence_change: True if `draw_views` needs `Rollout.confidence_change`.
        block_size: Of the models that the estimate is for, where its views mask whole blocks; None: any.
        factory: The function of `estimators` with its keywords, so that a command line can change a keyword.

    Example:
        views = coupled().draw_views(rollout, generator)
        log_ratio = coupled().logprobs(policy, rollout, views) - coupled().logprobs(other, rollout, views)
    """

    name: str
    draw_views: Callable[[Rollout, Generator], Views]
    combine: Callable[[Tensor, Views], Tensor] = weighted_sum
    with_advantages: Callable[[Views, Tensor], Views] = as_drawn
    supported_attention: tuple[str, ...] = ("full", "block_causal")
    exact_for_sampler: bool = False
    scores_order: bool = False
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
        """Log p(y_t | view n) in nats where view n scores t, 0 elsewhere. `retain_graphs` keeps the graphs of all rows,
        or of the marked ones, until their backward; otherwise there is no gradient.
        """
        self.check(policy)
        out = torch.zeros(views.coefficients.shape, device=rollout.tokens.device)
        parts = [(views, retain_graphs is True)]
        if isinstance(retain_graphs, Tensor):  # no backward frees the graphs of other rows
            parts = [(views.restrict_to_rows(~retain_graphs), False), (views.restrict_to_rows(retain_graphs), True)]
        for part, kept in parts:
            # Processes may have different numbers of rows: see `join_uneven_forwards`.
            with torch.set_grad_enabled(kept), join_uneven_forwards(policy):
                for chunk in row_chunks(rollout, part, micro_batch_size):
                    rows, masks = chunk.of(rollout, part)
                    for n, view in enumerate(each_view(masks)):
                        out[n, chunk.rows, chunk.columns] = view.logprobs(policy, rows)
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
        """`scores(...).backward(vectors)` without kept graphs: every forward runs again, and carries its gradient back
        at once, so that memory does not grow with the number of views.
        """
        with join_uneven_forwards(policy, backward=True):
            for chunk in row_chunks(rollout, views, micro_batch_size):
                rows, masks = chunk.of(rollout, views)
                for view, vector in zip(each_view(masks), vectors, strict=True):
                    view.backward(policy, rows, vector[chunk.rows][:, chunk.columns])

    def logprobs(
        self, policy: Policy, rollout: Rollout, views: Views, *, micro_batch_size: int | None = None
    ) -> Float[Tensor, "B T"]:
        """Per-position contributions to the estimate, nats; their sum over T is the sequence's. No gradient."""
        return self.combine(self.view_logprobs(policy, rollout, views, micro_batch_size=micro_batch_size), views)

    @property
    def exact_ratios(self) -> bool:
        """Whether exp of a difference of two policies' estimates is a ratio of probabilities of the sampler's draws."""
        return self.exact_for_sampler or self.supported_attention == ("causal",)

    def is_exact_for(self, rollout: Rollout) -> bool:
        """Whether the estimate is the log-probability of all that the sampler decided by the weights: of the tokens,
        and of their order. False where the probability of the order is unknown, or is left out.
        """
        if self.supported_attention == ("causal",) or not self.exact_for_sampler or rollout.order is None:
            return self.supported_attention == ("causal",) or (self.exact_for_sampler and rollout.renoised is not None)
        known = rollout.order.probability
        return known in ("deterministic", "independent") or (known != "unknown" and self.scores_order)

    def check(self, policy: Policy) -> None:
        """Raise ValueError when the estimate is not for this policy's attention or block size."""
        if policy.spec.attention not in self.supported_attention:
            raise ValueError(
                f"likelihood={self.name!r} is for {' or '.join(self.supported_attention)} attention, but the policy's "
                f"is {policy.spec.attention!r}; "
                f"use {'causal()' if policy.spec.attention == 'causal' else 'trajectory()'}"
            )
        if self.block_size not in (None, policy.spec.block_size):
            raise ValueError(f"block_size={self.block_size} is not the policy's block size, {policy.spec.block_size}")


def recorded(rollout: Rollout, views: Views) -> Float[Tensor, "B T"]:
    """The sampler's recorded contributions for an estimate that is `exact_for_sampler`, nats."""
    logprobs = rollout.logprobs
    for part in views.features:
        logprobs = part.sampler_logprobs(rollout, logprobs)
    return logprobs
