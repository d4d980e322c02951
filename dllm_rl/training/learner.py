"""The learner's part of a step: score a rollout, correct for the mismatch, update the weights.

Memory does not grow with the number N of masks: grad f = sum_n (df/ds_n) . grad s_n is summed one forward at a time.
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
from dllm_rl.device import send
from dllm_rl.diagnostics.batch_invariance import check_bitwise_equal
from dllm_rl.distributed.collectives import (
    Metrics,
    gather_on_host,
    local,
    reduce_metrics,
    sum_gradients,
    sum_over,
    waited,
)
from dllm_rl.likelihoods.estimator import LikelihoodEstimator, recorded
from dllm_rl.likelihoods.replay import record_experts, with_recorded_experts, with_sampled_experts
from dllm_rl.likelihoods.views import each_view, row_chunks
from dllm_rl.models.base import Policy, trained_of, whole
from dllm_rl.models.forward.uneven import join_uneven_forwards
from dllm_rl.models.logprobs import chunked, process
from dllm_rl.recipe import Recipe, UpdateSettings
from dllm_rl.training.balance import balance
from dllm_rl.training.compare import compare_sides, side_metrics
from dllm_rl.training.context import StepContext
from dllm_rl.training.forwards import learner_forward
from dllm_rl.training.samples import Samples, Step
from dllm_rl.training.views import active_groups, metric_weights, only_groups, own_rows, views_of_step
from dllm_rl.types import Batch, Logprobs, Rollout, Views

MEASURED_ROWS = 16  # rows of each process that `update_direction` measures
MEASURED_VIEWS = 4


@dataclass(frozen=True)
class Scored:
    """A step's samples, scored under each set of its masks, and the counts of `compare_sides`."""

    samples: Samples
    logps: list[Logprobs]  # one per set of masks; the first also serves the metrics
    compared: tuple[Metrics, Int[Tensor, "M X"] | None]


def step(run: StepContext[Recipe], samples: Samples, number: int, optimizer: torch.optim.Optimizer) -> Step:
    """Learn from a step's samples: score them, correct for the mismatch, and update the weights."""
    with run.log.stage("scoring"), learner_forward(run):
        scored = score_samples(run, samples, number)
    with run.log.stage("update"), learner_forward(run):
        batches, mismatch = make_batches(run, scored)
        batches = [batches[k % len(batches)] for k in range(run.recipe.num_iterations)]
        learning = update(run.policy, optimizer, batches, run.accelerator, run.recipe.update_settings(number))
    return Step(scored.samples, scored.logps[0], mismatch | learning)


def score_samples(run: StepContext[Recipe], samples: Samples, number: int) -> Scored:
    """Score a step's samples before its first update."""
    recipe = run.recipe
    # Score the groups to learn from, and a sample of the other groups, from which metrics estimate all groups.
    samples = samples.weighted(metric_weights(recipe, samples.advantages, number))
    samples = balance(recipe, samples, run.accelerator, pad_id=run.policy.pad_id)  # so that all end together
    rollout = samples.rollout
    active = own_rows(active_groups(recipe, samples.advantages), rollout.group_size, run.accelerator)
    # Every policy is scored under the same masks. Masks of later updates serve only these updates, not the metrics.
    views = views_of_step(recipe, samples, number, run.accelerator)
    compared = compare_sides(run.policy, run.rollout_policy, rollout, views[0])  # before graphs are retained
    recorded_by = samples.rollout_logprobs or (None,) * len(views)
    logps = []
    for k in reversed(range(len(views))):  # the first set comes last, since it may retain graphs
        logps.append(score(run, rollout, views[k], rollout_logps=recorded_by[k], keep=active if k == 0 else False))
    return Scored(samples, logps[::-1], compared)


def make_batches(run: StepContext[Recipe], scored: Scored) -> tuple[list[Batch], dict[str, float]]:
    """Return a batch to learn from for each set of masks, and metrics of the mismatch between learner and rollout."""
    samples = scored.samples
    batch, mismatch = correct(run, samples, scored.logps[0])
    learned = samples.weighted(active_groups(run.recipe, samples.advantages).double())
    later = [weighted_batch(run, learned, logps) for logps in scored.logps[1:]]
    order, routing = scored.compared
    agreement = side_metrics(order, routing, run.accelerator)  # after scoring, which would wait for this collective
    return [batch, *later], agreement | mismatch


def rollout_side(recipe: Recipe, policy: Policy, rollout_policy: Policy) -> Literal["recorded", "scored", "learner"]:
    """Return the source of the rollout's log-probs: "recorded" (the sampler's record; the estimator is exact for it),
    "scored" (a forward of the rollout policy) or "learner" (the learner itself sampled).
    """
    if recipe.likelihood.exact_for_sampler:
        return "recorded"
    return "learner" if rollout_policy is policy else "scored"


def score(
    run: StepContext[Recipe],
    rollout: Rollout,
    views: Views,
    *,
    rollout_logps: Float[Tensor, "B T"] | None = None,
    keep: bool | Bool[Tensor, " B"] = False,
) -> Logprobs:
    """Compute the rollout's log-probs under every policy, with the same masks.

    Args:
        run: Settings and policies.
        rollout: The rows to score.
        views: The masks.
        rollout_logps: Log-probs of the rollout policy, in nats (B, T), if the weights that sampled are no longer in
            memory. None (default): the log-probs of `rollout_side`.
        keep: Rows whose autograd graphs are retained, if `keeps_graphs` allows any. Default: no row.

    Returns:
        Log-probs in nats, each (B, T).

    Raises:
        RuntimeError: `zero_mismatch` is set and the log-probs of learner and rollout differ.
    """
    recipe, policy, rollout_policy, likelihood = run.recipe, run.policy, run.rollout_policy, run.recipe.likelihood
    side = rollout_side(recipe, policy, rollout_policy)
    size = recipe.micro_batch_size
    reference_logps = None
    if run.reference is not None and recipe.beta:  # with beta=0 the reference is only a teacher
        reference_logps = likelihood.logprobs(run.reference, rollout, views, micro_batch_size=size)
    if recipe.router_replay is not None:  # the learner reuses the rollout's experts
        views = with_sampled_experts(views, rollout) if side == "recorded" else record_experts(policy, rollout, views)
    if side == "recorded":
        rollout_logps = recorded(rollout, views)
    elif side == "scored" and rollout_logps is None:
        rollout_logps = likelihood.logprobs(rollout_policy, rollout, views, micro_batch_size=size)
        views = with_recorded_experts(views, rollout)
    forwards = len(views.coefficients) * math.prod(part.num_forwards for part in views.features)
    if not keeps_graphs(recipe, policy, views=forwards, rows=len(rollout.tokens)):
        keep = False
    entropy = token_entropy(policy, rollout, views, size) if recipe.corrector.needs_entropy else None
    # Last: the memory of retained graphs and of another forward would add up.
    scores = likelihood.view_logprobs(policy, rollout, views, micro_batch_size=size, retain_graphs=keep)
    old = likelihood.combine(scores.detach(), views)
    logps = Logprobs(
        old_logprobs=old,
        old_view_logprobs=scores,
        rollout_logprobs=old if rollout_logps is None else rollout_logps,
        reference_logprobs=reference_logps,
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
        logps = process(policy.head(hidden), rollout.sampling_params).log_softmax(-1)
        return (-(logps.exp() * logps.masked_fill(logps == -torch.inf, 0)).sum(-1),)

    total = torch.zeros(rollout.tokens.shape, device=rollout.tokens.device)
    count = torch.zeros_like(total)
    with join_uneven_forwards(policy):
        for chunk in row_chunks(rollout, views, micro_batch_size):
            rows, masks = chunk.of(rollout, views)
            for view in each_view(masks):
                seen = view.run(policy, rows, view.scored)
                if seen is not None:
                    found = torch.zeros(view.scored.numel(), device=total.device)
                    (values,) = chunked(entropy, seen.states, policy=policy)
                    found = found.index_copy(0, seen.plan.flat_index, values.float()).view(view.scored.shape)
                    total[chunk.rows, chunk.columns] += found
                    count[chunk.rows, chunk.columns] += view.scored
    return total / count.clamp(min=1)


def keeps_graphs(recipe: Recipe, policy: Policy, *, views: int, rows: int) -> bool:
    """Return whether an update reuses the autograd graphs of scoring: at most `max_retained_graphs`, one per
    micro-batch and view.
    """
    forwards = views * math.ceil(rows / (recipe.micro_batch_size or rows))
    dropout = policy.lora is not None and policy.lora.dropout  # scoring runs without dropout, an update with it
    unsharded = recipe.shard_size == 1  # each forward of a sharded learner has its backward right after it, or none
    return unsharded and forwards <= recipe.max_retained_graphs and not dropout


def correct(run: StepContext[Recipe], samples: Samples, logps: Logprobs) -> tuple[Batch, dict[str, float]]:
    """Return the batch to learn from, with the corrector's weights and loss mask, and mismatch metrics over all
    processes.
    """
    lost = reduce_metrics(waited("scoring", run.accelerator), run.accelerator)  # before gathering, which waits for all
    rows = gather_rows(run, samples, logps)
    weights, live = apply_corrector(run.recipe.corrector, rows)
    stats = rows.stats
    every = mismatch_metrics(  # of all rows, estimated from the scored rows
        stats.log_mismatch,
        rows.completion,
        old=stats.old_logprobs,
        advantages=stats.advantages,
        row_weights=rows.metric_weights,
    )
    batch = make_batch(run, samples.rollout, logps, rows, weights)
    likelihood = run.recipe.likelihood
    if likelihood.exact_ratios or not likelihood.is_random:  # otherwise masks are random and belong to no step
        every |= step_metrics(
            stats.log_mismatch, rows.completion & (rows.metric_weights > 0)[:, None], stats.unmask_step
        )
    return batch, lost | every | live | symptoms(run.recipe, rows, logps.views)


def weighted_batch(run: StepContext[Recipe], samples: Samples, logps: Logprobs) -> Batch:
    """Return the batch of a later update, with the corrector's weights for that update's set of masks."""
    rows = gather_rows(run, samples, logps)
    weights, _ = apply_corrector(run.recipe.corrector, rows)
    return make_batch(run, samples.rollout, logps, rows, weights)


@dataclass(frozen=True)
class Rows:
    """The rows of all processes, on the host."""

    stats: TokenStats  # of all scored tokens; `mask` marks the tokens of rows that the update learns from
    completion: Bool[Tensor, "B T"]
    tokens: Int[Tensor, "B T"]
    learned: Bool[Tensor, " B"]
    metric_weights: Float[Tensor, " B"]  # inverse sampling fractions (`group_weights`), 0 where not scored


def gather_rows(run: StepContext[Recipe], samples: Samples, logps: Logprobs) -> Rows:
    """Gather the rows of all processes, with the log-probs under one set of masks, on the host.

    It is the only transfer of these rows in a step. Collective: every process must call it.
    """
    rollout = samples.rollout
    mask = logps.views.scored(rollout.completion_mask)
    apart = torch.where(mask, logps.old_logprobs - logps.rollout_logprobs, 0)
    parts = {
        "log_mismatch": apart,
        "scored": mask,
        "completion": rollout.completion_mask,
        "old": logps.old_logprobs,
        "rollout": logps.rollout_logprobs,
        "tokens": rollout.tokens,
        "unmask_step": rollout.unmask_step,
    }
    if logps.entropy is not None:
        parts["entropy"] = logps.entropy
    rows = dict(zip(parts, gather_on_host(list(parts.values()), run.accelerator), strict=True))
    learned = repeat(active_groups(run.recipe, samples.advantages), "p -> (p g)", g=rollout.group_size)
    stats = TokenStats(
        log_mismatch=rows["log_mismatch"],
        advantages=rearrange(samples.advantages, "p g -> (p g)"),
        mask=rows["scored"] & learned[:, None],
        old_logprobs=rows["old"],
        rollout_logprobs=rows["rollout"],
        unmask_step=rows["unmask_step"],
        entropy=rows.get("entropy"),
    )
    weights = repeat(samples.metric_weights, "p -> (p g)", g=rollout.group_size)
    return Rows(stats, rows["completion"], rows["tokens"], learned, weights)


def apply_corrector(corrector: Corrector, rows: Rows) -> tuple[TokenWeights, dict[str, float]]:
    """Return the corrector's weights and loss mask of the learned rows, and metrics of these rows.

    The metrics `rollout_corr/*` of the learned rows are renamed `trained/*`.
    """
    stats = rows.stats.among(rows.stats.mask)
    weights = corrector.weight_fn(stats)
    metrics = weights.metrics
    if (stats.mask & stats.log_mismatch.isfinite()).any():  # a step may have no row to learn from
        metrics = metrics | mismatch_metrics(
            stats.log_mismatch, stats.mask, old=stats.old_logprobs, advantages=stats.advantages
        )
    live = {name.replace(PREFIX, "trained/"): value for name, value in metrics.items()}
    live["trained/rollout_rs_masked_fraction"] = 1 - (weights.loss_mask.sum() / stats.mask.sum().clamp(min=1)).item()
    return weights, live


def symptoms(recipe: Recipe, rows: Rows, views: Views) -> dict[str, float]:
    """Return `symptom_metrics` of the learned rows. Error tokens are counted only if every contribution is the log-prob
    of one token.
    """
    single = recipe.likelihood.exact_ratios and all(part.is_per_token for part in views.features)
    stats = rows.stats
    return symptom_metrics(rows.tokens, stats.mask, stats.advantages, old=stats.old_logprobs if single else None)


def make_batch(run: StepContext[Recipe], rollout: Rollout, logps: Logprobs, rows: Rows, weights: TokenWeights) -> Batch:
    accelerator, keep = run.accelerator, weights.loss_mask
    device = rollout.tokens.device
    width = rollout.tokens.shape[1]  # other processes' rows may be wider
    chosen = rows.learned[:: rollout.group_size]
    return Batch(
        rollout=rollout,
        views=only_groups(logps.views, chosen, rollout.group_size, accelerator),
        advantages=send(device, local(rows.stats.advantages, accelerator))[0],
        # "rollout" is VeXact's bypass, eq. 4: ratios are current / rollout, without weights. Under mismatch it declines
        # silently, with K1 and K3 rising; recomputation without weights fails in stages, with K1 and K3 flat [digest].
        old_logprobs=logps.rollout_logprobs if run.recipe.old_logprobs == "rollout" else logps.old_logprobs,
        old_view_logprobs=logps.old_view_logprobs,
        importance_weights=send(device, local(weights.importance_weights, accelerator)[:, :width])[0],
        loss_mask=send(device, local(keep, accelerator)[:, :width])[0],
        reference_logprobs=logps.reference_logprobs,
        # Rows without advantage count in the denominators, so that a skipped group adds a zero to the mean.
        num_tokens=int((keep | (rows.completion & ~rows.stats.mask)).sum()),
        num_sequences=len(keep),
        rollout_logprobs=logps.rollout_logprobs,  # also if ratios divide by the learner's log-probs
        sum_over_processes=partial(accelerator.reduce, reduction="sum"),
    )


def check_version(rollout: Rollout, policy: Policy, *, max_staleness: int = 0) -> None:
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
    """Take an optimizer step on each batch. The batches belong to one rollout; a forward has `micro_batch_size` rows,
    in complete groups.

    Returns:
        The last iteration's metrics; grad_norm and off_policy/* of every iteration as NAME/iteration_I; and with
        `measure` the metric of `update_direction`.

    Raises:
        RuntimeError: The rollout was sampled with other weights than the learner's (`check_version`).
        FloatingPointError: Logits or a gradient norm are not finite. That iteration is not applied; earlier iterations
            are.
    """
    likelihood, learning_rate, size = settings.likelihood, settings.learning_rate, settings.micro_batch_size
    check_version(batches[0].rollout, policy, max_staleness=settings.max_staleness)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    scores = batches[0].old_view_logprobs
    keep = scores.grad_fn is not None
    gathered = {"learning_rate": learning_rate}
    for iteration, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)  # before scoring, which can use the memory
        if iteration:
            torch.clear_autocast_cache()  # it has bf16 copies of the weights before the last optimizer step
            scores = likelihood.view_logprobs(
                policy, batch.rollout, batch.views, micro_batch_size=size, retain_graphs=keep
            )
        metrics = accumulate_gradients(
            policy, batch, scores, loss=settings.loss, likelihood=likelihood, micro_batch_size=size
        )
        metrics |= waited("update", accelerator)
        sum_gradients(policy.module, accelerator)
        trained = trained_of(policy.module)
        norm = whole(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm))
        reduced = reduce_metrics(metrics | {"grad_norm": (norm, torch.ones_like(norm))}, accelerator)
        if not math.isfinite(reduced["grad_norm"]):
            what = f"gradient norm is {reduced['grad_norm']}" if scores.isfinite().all() else "logits are not finite"
            raise FloatingPointError(
                f"{what} at inner iteration {iteration}, learning_rate={learning_rate:g}; the update was not applied"
            )
        if iteration == 0:
            # Before the weights change: after an error in between, they must not have the old version.
            policy.weights_version += 1
        optimizer.step()
        gathered |= reduced
        for name, value in reduced.items():
            if name.startswith(("off_policy/", "grad_norm")):
                gathered[f"{name}/iteration_{iteration}"] = value
    if settings.measure:
        torch.clear_autocast_cache()
        gathered |= update_direction(policy, batches[0], accelerator, likelihood, size)
    return gathered


def update_direction(
    policy: Policy,
    batch: Batch,
    accelerator: Accelerator,
    likelihood: LikelihoodEstimator,
    micro_batch_size: int | None = None,
) -> dict[str, float]:
    """Measure how the step's updates changed the log-probs of a few rows that they learned from: those with the highest
    and the lowest advantages, in a few of their views. Ratios that are measured before an update cannot show this.

    Returns:
        update/direction: cosine of the rows' advantages and changes of log-prob, in [-1, 1]. Below 0, worse answers
        became likelier. {} if nothing changed.
    """
    order = batch.advantages.argsort(stable=True)
    rows = torch.zeros_like(batch.advantages, dtype=torch.bool)
    rows[torch.cat([order[: MEASURED_ROWS // 2], order[-(MEASURED_ROWS // 2) :]])] = True
    views = batch.views.restrict_to_rows(rows & batch.loss_mask.any(-1))
    scored = (views.coefficients != 0).sum((-1, -2))
    few = torch.zeros_like(scored).scatter(0, scored.topk(min(MEASURED_VIEWS, len(scored))).indices, 1)
    views = replace(views, coefficients=views.coefficients * few[:, None, None])
    after = likelihood.view_logprobs(policy, batch.rollout, views, micro_batch_size=micro_batch_size)
    at = views.coefficients != 0
    change = torch.where(at, after - batch.old_view_logprobs.detach(), 0).double().sum((0, 2))
    advantages = torch.where(at.any(0).any(-1), batch.advantages, 0).double()
    products = torch.stack([advantages @ change, advantages @ advantages, change @ change])
    covariance, *squares = sum_over(products, accelerator).tolist()
    if not math.isfinite(covariance):
        raise FloatingPointError("logits are not finite after the update; use a lower learning_rate")
    scale = math.sqrt(math.prod(squares))
    return {"update/direction": covariance / scale} if scale else {}


def accumulate_gradients(
    policy: Policy,
    batch: Batch,
    scores: Float[Tensor, "N B T"],  # log-probs of every view, nats
    *,
    loss: Loss,
    likelihood: LikelihoodEstimator,
    micro_batch_size: int | None = None,
) -> Metrics:
    """Add this process's share of the loss gradient to the parameters and return (sum, count) metrics.

    The loss and its derivative use `scores`. A forward that runs again only carries the gradient back.
    """
    leaves = scores.detach().requires_grad_()  # df/ds_n stops here
    logps = likelihood.combine(leaves, batch.views)
    _, metrics, gradient = loss(logps.detach(), batch)
    (vectors,) = torch.autograd.grad(logps, leaves, gradient)
    metrics |= off_policy_metrics(
        logps.detach(), batch, old=likelihood.combine(batch.old_view_logprobs.detach(), batch.views)
    )
    if scores.grad_fn is not None:  # retained graphs
        scores.backward(vectors)  # frees the graphs; no forward runs
        return metrics
    likelihood.backward(policy, batch.rollout, batch.views, vectors, micro_batch_size=micro_batch_size)
    return metrics
