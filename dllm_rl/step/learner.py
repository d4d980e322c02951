"""The learner's half of a training step: compute log-probs, correct for the mismatch, update the weights.

A view is one choice of masked positions for every row of the batch, scored by one forward. A set of views (`Views`) has
N views, and features that change how a view is computed (`ViewFeature`). An update uses one set. Memory does not grow
with N: if s_n are the log-probs under view n, the gradient of a loss f is grad f = sum_n (df/ds_n) . grad s_n, and the
sum is computed one forward at a time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from accelerate import Accelerator
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.algorithms.correctors import Corrector, TokenStats, TokenWeights
from dllm_rl.algorithms.mismatch import PREFIX, mismatch_metrics, off_policy_metrics, step_metrics, symptom_metrics
from dllm_rl.device import copy_to_device
from dllm_rl.diagnostics.batch_invariance import check_bitwise_equal
from dllm_rl.distributed.collectives import (
    Metrics,
    gather_on_host,
    local,
    reduce_metrics,
    sum_gradients,
    sum_over,
    wait_metrics_of,
)
from dllm_rl.likelihoods.estimator import LikelihoodEstimator, recorded
from dllm_rl.likelihoods.replay import record_experts, with_recorded_experts, with_sampled_experts
from dllm_rl.likelihoods.views import each_view, row_chunks
from dllm_rl.models.base import Policy, gather_if_sharded, trainable_parameters
from dllm_rl.models.forward.uneven import join_uneven_forwards
from dllm_rl.models.logprobs import chunked, process
from dllm_rl.recipe import Recipe, UpdateSettings
from dllm_rl.step.balance import balance
from dllm_rl.step.compare import compare_rollout_and_learner, order_and_routing_metrics
from dllm_rl.step.context import StepContext
from dllm_rl.step.forwards import learner_forward
from dllm_rl.step.mask_sets import (
    active_groups,
    draw_view_sets,
    metric_weights,
    restrict_to_groups,
    select_local_rows,
)
from dllm_rl.step.samples import Samples, StepResult
from dllm_rl.step.value_head import value_metrics
from dllm_rl.types import Batch, Logprobs, Rollout, Views

MEASURED_ROWS = 16  # rows of each process that `update_direction` measures
MEASURED_VIEWS = 4


@dataclass(frozen=True)
class ScoredSamples:
    """Samples of a step, with their log-probs before the step's first update.

    Args:
        samples: The samples, after load balancing.
        logps: Log-probs under each of the step's sets of views; the first set also serves the metrics.
        comparison: Counts of agreement between rollout and learner, on the unmasking order and on the experts (None
            without experts); see `compare_rollout_and_learner`.
        value_sums: Sums for `value_metrics`; {} without a value model.
    """

    samples: Samples
    logps: list[Logprobs]
    comparison: tuple[Metrics, Int[Tensor, "M X"] | None]
    value_sums: Metrics


def train_step(run: StepContext[Recipe], samples: Samples, step: int, optimizer: torch.optim.Optimizer) -> StepResult:
    """Train on a step's samples: score them, correct for the mismatch, and update the weights."""
    with run.log.stage("scoring"), learner_forward(run):
        scored = score_samples(run, samples, samples.batch_number_of(step))
    with run.log.stage("update"), learner_forward(run):
        batches, mismatch = make_batches(run, scored)
        batches = [batches[k % len(batches)] for k in range(run.recipe.num_iterations)]
        update_metrics = update(run.policy, optimizer, batches, run.accelerator, run.recipe.update_settings(step))
        if run.value_head is not None:
            run.value_head.learn(run.accelerator)
    return StepResult(scored.samples, scored.logps[0], mismatch | update_metrics)


def score_samples(run: StepContext[Recipe], samples: Samples, step: int) -> ScoredSamples:
    """Compute the log-probs of a step's samples under learner, rollout policy and reference.

    Call it before the step's first update. `step` is the number of the samples' batch.
    """
    recipe = run.recipe
    # Score the groups that the update trains on, and a random sample of the other groups. Together, weighted, they
    # estimate the metrics of all groups.
    samples = samples.with_metric_weights(metric_weights(recipe, samples.advantages, step))
    # So that the processes finish together:
    samples = balance(recipe, samples, run.accelerator, pad_id=run.policy.pad_id)
    rollout = samples.rollout
    is_trained_row = select_local_rows(active_groups(recipe, samples.advantages), rollout.group_size, run.accelerator)
    # All policies use the same views. The sets after the first serve only the later updates, not the metrics.
    views = draw_view_sets(recipe, samples, step, run.accelerator)
    # Compare before `score`, which may retain graphs: their memory and this comparison's would add up.
    comparison = compare_rollout_and_learner(run.policy, run.rollout_policy, rollout, views[0])
    rollout_logps = samples.rollout_logprobs or (None,) * len(views)  # set only for asynchronous rollouts
    logps = []
    value_sums: Metrics = {}
    for k in reversed(range(len(views))):  # the first set comes last, since it may retain graphs
        token_advantages = None
        if run.value_head is not None:
            local_advantages = local(rearrange(samples.advantages, "p g -> (p g)"), run.accelerator)
            (advantages,) = copy_to_device(run.accelerator.device, local_advantages)
            token_advantages, value_sums = run.value_head.token_advantages(
                run.policy, rollout, views[k], advantages, recipe.micro_batch_size
            )
        retain_graphs = is_trained_row if k == 0 else False
        scores = score(run, rollout, views[k], rollout_logprobs=rollout_logps[k], retain_graphs=retain_graphs)
        logps.append(replace(scores, token_advantages=token_advantages))
    return ScoredSamples(samples, logps[::-1], comparison, value_sums)


def make_batches(run: StepContext[Recipe], scored: ScoredSamples) -> tuple[list[Batch], dict[str, float]]:
    """Make a training batch for each set of views; also return metrics of the mismatch between learner and rollout."""
    samples = scored.samples
    batch, metrics = correct(run, samples, scored.logps[0])
    later_batches = [make_later_batch(run, samples, logps) for logps in scored.logps[1:]]
    order_counts, routing_counts = scored.comparison
    # After scoring: a collective before it would make the processes wait for each other.
    agreement = order_and_routing_metrics(order_counts, routing_counts, run.accelerator)
    return [batch, *later_batches], agreement | metrics | value_metrics(scored.value_sums, run.accelerator)


def rollout_logprob_source(
    recipe: Recipe, policy: Policy, rollout_policy: Policy
) -> Literal["recorded", "scored", "learner"]:
    """Return the source of the rollout's log-probs: "recorded" (by the sampler; the recipe's estimator would compute
    the same numbers), "scored" (a forward of the rollout policy) or "learner" (the learner itself sampled).
    """
    if recipe.likelihood.exact_for_sampler:
        return "recorded"
    return "learner" if rollout_policy is policy else "scored"


def score(
    run: StepContext[Recipe],
    rollout: Rollout,
    views: Views,
    *,
    rollout_logprobs: Float[Tensor, "B T"] | None = None,
    retain_graphs: bool | Bool[Tensor, " B"] = False,
) -> Logprobs:
    """Compute the log-probs of the rollout's rows under learner, rollout policy and reference, in the same views.

    Args:
        run: Settings and policies.
        rollout: The rows to score.
        views: The set of views.
        rollout_logprobs: Log-probs of the rollout policy, in nats (B, T), if the weights that sampled are no longer in
            memory. None (default): take them from `rollout_logprob_source`.
        retain_graphs: Rows whose autograd graphs the first update reuses. No graph is retained unless
            `can_retain_graphs`. Default: no row.

    Returns:
        Log-probs in nats, each (B, T).

    Raises:
        RuntimeError: `zero_mismatch` is set and the log-probs of learner and rollout differ.
    """
    recipe, policy, rollout_policy, likelihood = run.recipe, run.policy, run.rollout_policy, run.recipe.likelihood
    source = rollout_logprob_source(recipe, policy, rollout_policy)
    micro_batch_size = recipe.micro_batch_size
    reference_logprobs = None
    if run.reference is not None and recipe.beta:  # with beta=0 the reference is only the teacher of a distillation
        reference_logprobs = likelihood.logprobs(run.reference, rollout, views, micro_batch_size=micro_batch_size)
    if recipe.router_replay is not None:  # the learner reuses the rollout's experts
        views = with_sampled_experts(views, rollout) if source == "recorded" else record_experts(policy, rollout, views)
    if source == "recorded":
        rollout_logprobs = recorded(rollout, views)
    elif source == "scored" and rollout_logprobs is None:
        rollout_logprobs = likelihood.logprobs(rollout_policy, rollout, views, micro_batch_size=micro_batch_size)
        views = with_recorded_experts(views, rollout)  # unchanged if no experts were recorded
    num_forwards = len(views.coefficients) * math.prod(feature.num_forwards for feature in views.features)
    if not can_retain_graphs(recipe, policy, num_forwards=num_forwards, rows=len(rollout.tokens)):
        retain_graphs = False
    entropy = token_entropy(policy, rollout, views, micro_batch_size) if recipe.corrector.needs_entropy else None
    # Last: the memory of retained graphs and of another forward would add up.
    view_logprobs = likelihood.view_logprobs(
        policy, rollout, views, micro_batch_size=micro_batch_size, retain_graphs=retain_graphs
    )
    old_logprobs = likelihood.combine(view_logprobs.detach(), views)
    logps = Logprobs(
        old_logprobs=old_logprobs,
        old_view_logprobs=view_logprobs,
        rollout_logprobs=old_logprobs if rollout_logprobs is None else rollout_logprobs,
        reference_logprobs=reference_logprobs,
        views=views,
        entropy=entropy,
    )
    if recipe.zero_mismatch:
        check_bitwise_equal(rollout, views, logps, policy=policy, rollout_policy=rollout_policy)
    return logps


@torch.no_grad()
def token_entropy(policy: Policy, rollout: Rollout, views: Views, micro_batch_size: int | None) -> Float[Tensor, "B T"]:
    """Return the entropy in nats of the learner's distribution at each scored token, averaged over the views that score
    the token.

    It costs one more forward per view, so only correctors with `needs_entropy` use it.
    """

    def entropy(hidden: Tensor) -> tuple[Tensor]:
        # `process` applies the sampler's temperature and filters.
        logps = process(policy.head(hidden), rollout.sampling_params).log_softmax(-1)
        return (-(logps.exp() * logps.masked_fill(logps == -torch.inf, 0)).sum(-1),)

    total = torch.zeros(rollout.tokens.shape, device=rollout.tokens.device)
    count = torch.zeros_like(total)
    with join_uneven_forwards(policy):
        for chunk in row_chunks(rollout, views, micro_batch_size):
            rows, chunk_views = chunk.of(rollout, views)
            for view in each_view(chunk_views):
                forward = view.run(policy, rows, view.scored)
                if forward is not None:
                    token_values = torch.zeros(view.scored.numel(), device=total.device)
                    (values,) = chunked(entropy, forward.states, policy=policy)
                    token_values = token_values.index_copy(0, forward.plan.flat_index, values.float())
                    token_values = token_values.view(view.scored.shape)
                    total[chunk.rows, chunk.columns] += token_values
                    count[chunk.rows, chunk.columns] += view.scored
    return total / count.clamp(min=1)


def can_retain_graphs(recipe: Recipe, policy: Policy, *, num_forwards: int, rows: int) -> bool:
    """Return whether the first update can reuse the autograd graphs of scoring, one per micro-batch and view.

    It can if their number is at most `max_retained_graphs`, and the learner is not sharded and has no dropout.
    """
    num_graphs = num_forwards * math.ceil(rows / (recipe.micro_batch_size or rows))
    has_dropout = policy.lora is not None and policy.lora.dropout  # scoring runs without dropout, an update with it
    # A sharded learner must run the backward before the next forward, so no graph is kept.
    is_unsharded = recipe.shard_size == 1
    return is_unsharded and num_graphs <= recipe.max_retained_graphs and not has_dropout


def correct(run: StepContext[Recipe], samples: Samples, logps: Logprobs) -> tuple[Batch, dict[str, float]]:
    """Make the batch of the first update, with the corrector's weights and loss mask; also return mismatch metrics over
    all processes.
    """
    # Measured before `gather_rows`, which makes every process wait for the slowest.
    wait_metrics = reduce_metrics(wait_metrics_of("scoring", run.accelerator), run.accelerator)
    rows = gather_rows(run, samples, logps)
    weights, trained_metrics = apply_corrector(run.recipe.corrector, rows)
    stats = rows.stats
    metrics = mismatch_metrics(  # of all rows, estimated from the scored rows
        stats.log_mismatch,
        rows.completion,
        old=stats.old_logprobs,
        advantages=rows.advantages,
        row_weights=rows.metric_weights,
    )
    batch = make_batch(run, samples.rollout, logps, rows, weights)
    likelihood = run.recipe.likelihood
    if likelihood.exact_ratios or not likelihood.is_random:  # random masks match no denoising step
        metrics |= step_metrics(
            stats.log_mismatch, rows.completion & (rows.metric_weights > 0)[:, None], stats.unmask_step
        )
    return batch, wait_metrics | metrics | trained_metrics | symptoms(run.recipe, rows, logps.views)


def make_later_batch(run: StepContext[Recipe], samples: Samples, logps: Logprobs) -> Batch:
    """Make the batch of an update after the first, with the corrector's weights for that update's set of views."""
    rows = gather_rows(run, samples, logps)
    weights, _ = apply_corrector(run.recipe.corrector, rows)
    return make_batch(run, samples.rollout, logps, rows, weights)


@dataclass(frozen=True)
class Rows:
    """The rows of all processes, on the host."""

    stats: TokenStats  # log_mismatch has all scored tokens; `mask` has those in rows that the update trains on
    completion: Bool[Tensor, "B T"]
    tokens: Int[Tensor, "B T"]
    is_trained: Bool[Tensor, " B"]
    metric_weights: Float[Tensor, " B"]  # inverse sampling fractions (`inverse_sampling_weights`), 0 where not scored
    advantages: Float[Tensor, " B"] | Float[Tensor, "B T"]  # those of the loss: per token with a value model


def gather_rows(run: StepContext[Recipe], samples: Samples, logps: Logprobs) -> Rows:
    """Gather the rows of all processes, with the log-probs under one set of views, on the host.

    All rows of one set of views are transferred in this one call. Collective: every process must call it.
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
    if logps.token_advantages is not None:
        local_tensors["advantages"] = logps.token_advantages
    gathered = dict(zip(local_tensors, gather_on_host(list(local_tensors.values()), run.accelerator), strict=True))
    is_trained_row = repeat(active_groups(run.recipe, samples.advantages), "p -> (p g)", g=rollout.group_size)
    stats = TokenStats(
        log_mismatch=gathered["log_mismatch"],
        advantages=rearrange(samples.advantages, "p g -> (p g)"),
        mask=gathered["scored"] & is_trained_row[:, None],
        old_logprobs=gathered["old"],
        rollout_logprobs=gathered["rollout"],
        unmask_step=gathered["unmask_step"],
        entropy=gathered.get("entropy"),
    )
    row_weights = repeat(samples.metric_weights, "p -> (p g)", g=rollout.group_size)
    advantages = gathered.get("advantages", stats.advantages)
    return Rows(stats, gathered["completion"], gathered["tokens"], is_trained_row, row_weights, advantages)


def apply_corrector(corrector: Corrector, rows: Rows) -> tuple[TokenWeights, dict[str, float]]:
    """Compute the corrector's weights and loss mask for the rows that the update trains on, and metrics of these rows.

    The metrics are named `trained/*`; the metrics of all rows are named `rollout_corr/*`.
    """
    stats = rows.stats.among(rows.stats.mask)  # sets log_mismatch to 0 outside the mask
    weights = corrector.weights(stats)
    metrics = weights.metrics
    if (stats.mask & stats.log_mismatch.isfinite()).any():  # a step may have no row to train on
        metrics = metrics | mismatch_metrics(
            stats.log_mismatch, stats.mask, old=stats.old_logprobs, advantages=rows.advantages
        )
    trained_metrics = {name.replace(PREFIX, "trained/"): value for name, value in metrics.items()}
    accepted = weights.loss_mask.sum() / stats.mask.sum().clamp(min=1)
    trained_metrics["trained/rollout_rs_masked_fraction"] = 1 - accepted.item()
    return weights, trained_metrics


def symptoms(recipe: Recipe, rows: Rows, views: Views) -> dict[str, float]:
    """Return signs of a collapse (`symptom_metrics`) in the rows that the update trains on.

    The share of error tokens (p_learner < 1e-4) is measured only if each log-prob belongs to one token.
    """
    is_per_token = recipe.likelihood.exact_ratios and all(feature.is_per_token for feature in views.features)
    stats = rows.stats
    return symptom_metrics(rows.tokens, stats.mask, rows.advantages, old=stats.old_logprobs if is_per_token else None)


def make_batch(run: StepContext[Recipe], rollout: Rollout, logps: Logprobs, rows: Rows, weights: TokenWeights) -> Batch:
    """Make the update's batch of this process's rows, on its device."""
    accelerator, loss_mask = run.accelerator, weights.loss_mask
    device = rollout.tokens.device
    width = rollout.tokens.shape[1]  # other processes' rows may be wider
    is_trained_group = rows.is_trained[:: rollout.group_size]
    return Batch(
        rollout=rollout,
        views=restrict_to_groups(logps.views, is_trained_group, rollout.group_size, accelerator),
        advantages=copy_to_device(device, local(rows.stats.advantages, accelerator))[0],
        # "rollout" is VeXact's bypass, eq. 4: the ratios are current / rollout, and need no importance weights. Under
        # mismatch, the reward of such a run drops once, while k1 and k3 rise. With recomputed old log-probs and without
        # importance weights, a run collapses in stages, while k1 and k3 stay flat [digest].
        old_logprobs=logps.rollout_logprobs if run.recipe.old_logprobs == "rollout" else logps.old_logprobs,
        old_view_logprobs=logps.old_view_logprobs,
        importance_weights=copy_to_device(device, local(weights.importance_weights, accelerator)[:, :width])[0],
        loss_mask=copy_to_device(device, local(loss_mask, accelerator)[:, :width])[0],
        reference_logprobs=logps.reference_logprobs,
        # Tokens that are not scored, and rows without advantage, count in the denominators, so that they add zeros to
        # the mean.
        num_tokens=int((loss_mask | (rows.completion & ~rows.stats.mask)).sum()),
        num_sequences=len(loss_mask),
        rollout_logprobs=logps.rollout_logprobs,  # some losses read them too
        token_advantages=logps.token_advantages,
        sum_over_processes=partial(accelerator.reduce, reduction="sum"),
    )


def check_staleness(rollout: Rollout, policy: Policy, *, max_staleness: int = 0) -> None:
    """Raise RuntimeError unless the rollout was sampled with the learner's current weights, or with weights at most
    `max_staleness` updates older.
    """
    if not 0 <= policy.weights_version - rollout.weights_version <= max_staleness:
        raise RuntimeError(
            f"weights_version={rollout.weights_version} of the rollout is "
            f"{policy.weights_version - rollout.weights_version} updates behind the learner's {policy.weights_version}"
            ": call sync_weights before sampling"
        )


Loss = Callable[[Tensor, Batch], tuple[Tensor, Metrics, Tensor]]  # detached log-probs, batch -> loss, metrics, gradient


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    accelerator: Accelerator,
    settings: UpdateSettings,
) -> dict[str, float]:
    """Take one optimizer step per batch. All batches belong to the same rollout. A forward has `micro_batch_size` rows,
    a multiple of the group size.

    Returns:
        The last iteration's metrics; grad_norm and off_policy/* of every iteration as NAME/iteration_I; and, if
        `settings.measure` is set, the metric of `update_direction`.

    Raises:
        RuntimeError: The rollout's weights are too old or too new (`check_staleness`).
        FloatingPointError: Logits or a gradient norm are not finite. That iteration is not applied; earlier iterations
            are.
    """
    likelihood, learning_rate, micro_batch_size = settings.likelihood, settings.learning_rate, settings.micro_batch_size
    check_staleness(batches[0].rollout, policy, max_staleness=settings.max_staleness)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    view_logprobs = batches[0].old_view_logprobs
    retain_graphs = view_logprobs.grad_fn is not None
    update_metrics = {"learning_rate": learning_rate}
    for iteration, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)  # frees the gradients' memory before the forward
        if iteration:
            torch.clear_autocast_cache()  # its bf16 weights are from before the last optimizer step
            view_logprobs = likelihood.view_logprobs(
                policy, batch.rollout, batch.views, micro_batch_size=micro_batch_size, retain_graphs=retain_graphs
            )
        metrics = forward_backward(
            policy, batch, view_logprobs, loss=settings.loss, likelihood=likelihood, micro_batch_size=micro_batch_size
        )
        metrics |= wait_metrics_of("update", accelerator)
        sum_gradients(policy.module, accelerator)
        parameters = trainable_parameters(policy.module)
        norm = gather_if_sharded(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
        reduced = reduce_metrics(metrics | {"grad_norm": (norm, torch.ones_like(norm))}, accelerator)
        if not math.isfinite(reduced["grad_norm"]):
            problem = f"gradient norm is {reduced['grad_norm']}"
            if not view_logprobs.isfinite().all():
                problem = "logits are not finite"
            raise FloatingPointError(
                f"{problem} at inner iteration {iteration}, learning_rate={learning_rate:g}; the update was not applied"
            )
        if iteration == 0:
            # Before the optimizer step: if the step fails halfway, the changed weights already have the new version.
            policy.weights_version += 1
        optimizer.step()
        update_metrics |= reduced
        for name, value in reduced.items():
            if name.startswith(("off_policy/", "grad_norm")):
                update_metrics[f"{name}/iteration_{iteration}"] = value
    if settings.measure:
        torch.clear_autocast_cache()
        update_metrics |= update_direction(policy, batches[0], accelerator, likelihood, micro_batch_size)
    return update_metrics


def update_direction(
    policy: Policy,
    batch: Batch,
    accelerator: Accelerator,
    likelihood: LikelihoodEstimator,
    micro_batch_size: int | None = None,
) -> dict[str, float]:
    """Measure how the step's updates changed the log-probs of the trained rows with the highest and the lowest
    advantages, in a few of their views. The off_policy/* ratios are computed before each optimizer step, so they do not
    show its effect.

    Returns:
        update/direction: cosine similarity of the rows' advantages and the changes of their log-probs, in [-1, 1]; with
        a value model, of the tokens'. Below 0, worse answers became more likely. {} if nothing changed.
    """
    row_advantages = batch.advantages if batch.token_advantages is None else batch.token_advantages.sum(-1)
    by_advantage = row_advantages.argsort(stable=True)
    is_measured_row = torch.zeros_like(batch.advantages, dtype=torch.bool)
    is_measured_row[torch.cat([by_advantage[: MEASURED_ROWS // 2], by_advantage[-(MEASURED_ROWS // 2) :]])] = True
    views = batch.views.restrict_to_rows(is_measured_row & batch.loss_mask.any(-1))
    tokens_per_view = (views.coefficients != 0).sum((-1, -2))
    largest_views = tokens_per_view.topk(min(MEASURED_VIEWS, len(tokens_per_view))).indices
    is_measured_view = torch.zeros_like(tokens_per_view).scatter(0, largest_views, 1)
    views = replace(views, coefficients=views.coefficients * is_measured_view[:, None, None])
    new_view_logprobs = likelihood.view_logprobs(policy, batch.rollout, views, micro_batch_size=micro_batch_size)
    is_scored = views.coefficients != 0
    change = torch.where(is_scored, new_view_logprobs - batch.old_view_logprobs.detach(), 0).double()
    if batch.token_advantages is None:
        change = change.sum((0, 2))
        advantages = torch.where(is_scored.any(0).any(-1), batch.advantages, 0).double()
    else:
        change = change.sum(0).flatten()
        advantages = torch.where(is_scored.any(0), batch.token_advantages, 0).double().flatten()
    products = torch.stack([advantages @ change, advantages @ advantages, change @ change])
    dot, *squares = sum_over(products, accelerator).tolist()
    if not math.isfinite(dot):
        raise FloatingPointError("logits are not finite after the update; use a lower learning_rate")
    scale = math.sqrt(math.prod(squares))
    return {"update/direction": dot / scale} if scale else {}


def forward_backward(
    policy: Policy,
    batch: Batch,
    view_logprobs: Float[Tensor, "N B T"],  # log-probs of every view, nats
    *,
    loss: Loss,
    likelihood: LikelihoodEstimator,
    micro_batch_size: int | None = None,
) -> Metrics:
    """Add this process's share of the loss gradient to the parameters and return (sum, count) metrics.

    The loss and its derivative use `view_logprobs`. Without retained graphs, `likelihood.backward` runs the forwards
    again, only to carry the gradient back to the parameters.
    """
    view_leaves = view_logprobs.detach().requires_grad_()  # df/ds_n stops here
    logps = likelihood.combine(view_leaves, batch.views)
    _, metrics, loss_gradient = loss(logps.detach(), batch)
    (grad_outputs,) = torch.autograd.grad(logps, view_leaves, loss_gradient)
    metrics |= off_policy_metrics(
        logps.detach(), batch, old=likelihood.combine(batch.old_view_logprobs.detach(), batch.views)
    )
    if view_logprobs.grad_fn is not None:  # retained graphs
        view_logprobs.backward(grad_outputs)  # frees the graphs; no forward runs
        return metrics
    likelihood.backward(policy, batch.rollout, batch.views, grad_outputs, micro_batch_size=micro_batch_size)
    return metrics
