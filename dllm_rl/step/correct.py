"""Correct for the mismatch between rollout and learner: the batches of a step, with the corrector's weights."""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.algorithms.correctors import Corrector, TokenStats, TokenWeights, check_state, check_weights
from dllm_rl.algorithms.mismatch import PREFIX, advantage_of_tokens, mismatch_metrics, step_metrics, symptom_metrics
from dllm_rl.distributed.collectives import (
    SumsAndCounts,
    collective,
    gather_on_host,
    reduce_metrics,
    wait_metrics_of,
)
from dllm_rl.likelihoods.estimators import LikelihoodEstimator
from dllm_rl.likelihoods.views import num_row_forwards
from dllm_rl.step.context import StepContext
from dllm_rl.step.samples import Samples, active_rows
from dllm_rl.step.score import ScoredSamples
from dllm_rl.types.scoring import Batch, Logprobs, Views


def make_batches(context: StepContext, scored: ScoredSamples) -> tuple[list[Batch], dict[str, float]]:
    """Make a training batch for each set of views, with the corrector's weights and loss mask; also return metrics of
    the mismatch between learner and rollout, over all processes. The metrics are those of the first set of views.
    """
    accelerator, samples = context.accelerator, scored.samples
    # Measured before `gather_rows`, which makes every process wait for the slowest.
    metrics = reduce_metrics(wait_metrics_of("scoring", accelerator), accelerator)
    batches: list[Batch] = []
    state = deepcopy(context.corrector_state or {})
    for logps in scored.logps:
        rows = gather_rows(context, samples, logps)
        weights, trained_metrics = apply_corrector(context.settings.corrector, rows, state)
        if not batches:
            metrics |= measure_rows(context.settings.likelihood, rows, logps.views) | trained_metrics
        batch = make_batch(context, samples, logps, rows, weights)
        if not batches and logps.views.inverse_chances is not None:
            metrics |= reduce_metrics(drawn_step_metrics(samples, logps, batch, accelerator), accelerator)
        batches.append(replace(batch, graphs=scored.graphs))
    context.next_corrector_state = state
    if state and context.corrector_state is None:
        raise ValueError(
            f"corrector={type(context.settings.corrector).__name__} keeps a state (stats.state), which TRL's trainer "
            "does not save: train with grpo or a recipe"
        )
    # After scoring: a collective before it would make the processes wait for each other.
    order = reduce_metrics(scored.order_agreement, accelerator)
    metrics |= {PREFIX + name: value for name, value in order.items()}
    return batches, metrics


@dataclass(frozen=True)
class Rows:
    """The rows of all processes, on the host."""

    stats: TokenStats  # log_mismatch has all scored tokens; `mask` has those in rows that the update trains on
    completion: Bool[Tensor, "B T"]
    tokens: Int[Tensor, "B T"]
    is_trained: Bool[Tensor, " B"]
    metric_weights: Float[Tensor, " B"]  # inverse sampling fractions (`inverse_sampling_weights`), 0 where not scored
    advantages: Float[Tensor, " B"] | Float[Tensor, "B T"]  # those of the loss: per token if a feature gives them

    @property
    def trained_tokens(self) -> Bool[Tensor, "B T"]:
        """Tokens of the rows that the update trains on, scored or not."""
        return self.completion & self.is_trained[:, None]


@collective
def gather_rows(context: StepContext, samples: Samples, logps: Logprobs) -> Rows:
    """Gather the rows of all processes, with the log-probs under one set of views, on the host.

    All rows of one set of views are transferred in this one call.
    """
    rollout = samples.rollout
    mask = logps.views.scored(rollout.completion_mask)
    log_mismatch = torch.where(mask, logps.old_logprobs - logps.rollout_logprobs, 0)
    local_tensors = {
        "log_mismatch": log_mismatch,
        "scored": mask,
        "completion": rollout.completion_mask,
        "old": logps.old_logprobs,
        "rollout": logps.rollout_logprobs,
        "tokens": rollout.tokens,
        "unmask_step": rollout.unmask_step,
    }
    if logps.entropy is not None:
        local_tensors["entropy"] = logps.entropy
    if logps.views.inverse_chances is not None:
        local_tensors["inverse_chances"] = logps.views.inverse_chances[0]
    if logps.token_advantages is not None:
        local_tensors["advantages"] = logps.token_advantages
    values = gather_on_host(list(local_tensors.values()), context.accelerator, samples.counts)
    gathered = dict(zip(local_tensors, values, strict=True))
    is_trained_row = active_rows(context.settings, samples, all_groups=context.trains_all_groups)
    stats = TokenStats(
        log_mismatch=gathered["log_mismatch"],
        advantages=samples.advantages,
        mask=gathered["scored"] & is_trained_row[:, None],
        old_logprobs=gathered["old"],
        rollout_logprobs=gathered["rollout"],
        unmask_step=gathered["unmask_step"],
        entropy=gathered.get("entropy"),
        inverse_chances=gathered.get("inverse_chances"),
    )
    advantages = gathered.get("advantages", stats.advantages)
    return Rows(stats, gathered["completion"], gathered["tokens"], is_trained_row, samples.metric_weights, advantages)


def apply_corrector(
    corrector: Corrector, rows: Rows, state: dict[str, Any] | None = None
) -> tuple[TokenWeights, dict[str, float]]:
    """Compute the corrector's weights and loss mask for the rows that the update trains on, and metrics of these rows.

    The metrics are named `trained/*`; the metrics of all rows are named `rollout_corr/*`. `state` is what the corrector
    has kept, into which it writes.
    """
    stats = rows.stats.among(rows.stats.mask)  # sets log_mismatch to 0 outside the mask
    state = {} if state is None else state
    weights = corrector.weights(replace(stats.copied(), state=state))
    check_weights(corrector, weights, stats.mask)
    check_state(corrector, state)
    metrics = weights.metrics
    if (stats.mask & stats.log_mismatch.isfinite()).any():  # a step may have no row to train on
        metrics = metrics | mismatch_metrics(
            stats.log_mismatch,
            stats.mask if stats.inverse_chances is None else rows.trained_tokens,
            old=stats.old_logprobs,
            advantages=rows.advantages,
            inverse_chances=stats.inverse_chances,
        )
    trained_metrics = {name.replace(PREFIX, "trained/"): value for name, value in metrics.items()}
    masked = (stats.mask & ~weights.loss_mask).sum() / stats.mask.sum().clamp(min=1)
    trained_metrics["trained/rollout_rs_masked_fraction"] = masked.item()
    return weights, trained_metrics


def measure_rows(likelihood: LikelihoodEstimator, rows: Rows, views: Views) -> dict[str, float]:
    """Return the mismatch metrics of all rows, estimated from the scored rows, and signs of a collapse in the rows that
    the update trains on.
    """
    stats, chances = rows.stats, rows.stats.inverse_chances
    scored = rows.completion & (rows.metric_weights > 0)[:, None]
    if chances is not None:
        scored &= chances > 0
    # A trainer that leaves out truncated completions may leave out all; of a few steps, none may be drawn.
    if not (rows.completion if chances is None else scored).any():
        return {}
    metrics = mismatch_metrics(
        stats.log_mismatch,
        rows.completion,
        old=stats.old_logprobs,
        advantages=rows.advantages,
        row_weights=rows.metric_weights,
        inverse_chances=chances,
    )
    if likelihood.exact_ratios or not likelihood.is_random:  # random masks match no denoising step
        metrics |= step_metrics(stats.log_mismatch, scored, stats.unmask_step, chances)
    # The share of error tokens (p_learner < 1e-4) is measured only if each log-prob belongs to one token.
    is_per_token = likelihood.exact_ratios and all(feature.is_per_token for feature in views.features)
    old = stats.old_logprobs if is_per_token else None
    mask = stats.mask if chances is None else rows.trained_tokens  # trigrams are of all tokens
    return metrics | symptom_metrics(rows.tokens, mask, rows.advantages, old=old, inverse_chances=chances)


def drawn_step_metrics(samples: Samples, logps: Logprobs, batch: Batch, accelerator: Accelerator) -> SumsAndCounts:
    """Return metrics of drawn steps: the mean number of rows that went through the model to score a completion, and the
    growth of the gradient's variance.

    The latter is what `drawn_steps.draw_steps` expects from the sampler's record, with the learner's probabilities and
    the corrector's weights in its place; estimated from the tokens that were drawn.
    """
    assert batch.inverse_chances is not None, "steps are drawn"
    num_rows = samples.local(samples.metric_weights > 0, accelerator).sum()
    chances = torch.where(batch.loss_mask, batch.inverse_chances, 0).double()
    miss = -torch.expm1(logps.old_logprobs.double().clamp(max=0))
    advantages = advantage_of_tokens(batch.advantages, batch.loss_mask)
    squares = chances * (advantages * batch.importance_weights * miss).square()
    return {
        "drawn_steps/row_forwards": (num_rows.new_tensor(num_row_forwards(samples.rollout, logps.views)), num_rows),
        "drawn_steps/variance_growth": (((chances - 1) * squares).sum(), squares.sum()),
    }


def make_batch(context: StepContext, samples: Samples, logps: Logprobs, rows: Rows, weights: TokenWeights) -> Batch:
    """Make the update's batch of this process's rows, on its device."""
    accelerator, loss_mask, rollout = context.accelerator, weights.loss_mask, samples.rollout
    width = rollout.tokens.shape[1]  # other processes' rows may be wider
    importance_weights = samples.local(weights.importance_weights, accelerator)[:, :width]
    advantages = logps.token_advantages
    views = logps.views
    has_reward = ~samples.rewards.isnan()
    is_dropped_row = rows.stats.mask.any(-1) & ~loss_mask.any(-1)
    if not rows.is_trained.all():
        views = views.restrict_to_rows(samples.local(rows.is_trained, accelerator))
    return Batch(
        rollout=rollout,
        views=views,
        advantages=samples.local(samples.advantages, accelerator) if advantages is None else advantages,
        # "rollout" is VeXact's bypass, eq. 4: the ratios are current / rollout, and need no importance weights. Under
        # mismatch, the reward of such a run drops once, while k1 and k3 rise. With recomputed old log-probs and without
        # importance weights, a run collapses in stages, while k1 and k3 stay flat [digest].
        old_logprobs=logps.rollout_logprobs if context.settings.old_logprobs == "rollout" else logps.old_logprobs,
        old_view_logprobs=logps.old_view_logprobs,
        importance_weights=importance_weights,
        loss_mask=samples.local(loss_mask, accelerator)[:, :width],
        reference_logprobs=logps.reference_logprobs,
        # Tokens that are not scored, and rows without advantage, count in the denominators, so that they add zeros to
        # the mean. Rows without a reward, and what the corrector drops, do not.
        num_tokens=int(((loss_mask | (rows.completion & ~rows.stats.mask)) & has_reward[:, None]).sum()),
        num_sequences=int((has_reward & ~is_dropped_row).sum()),
        rollout_logprobs=logps.rollout_logprobs,  # some losses read them too
        sum_over_processes=partial(accelerator.reduce, reduction="sum"),
        is_scored=logps.is_scored,
        inverse_chances=None if views.inverse_chances is None else views.inverse_chances[0],
    )
