"""Take one training step on collected samples, and update the learner's weights.

A view is one choice of masked positions for every row of the batch, scored by one forward. A set of views (`Views`) has
N views, and features that change how a view is computed (`ViewFeature`). An update uses one set. Memory does not grow
with N: if s_n are the log-probs under view n, the gradient of a loss f is grad f = sum_n (df/ds_n) . grad s_n, and the
sum is computed one forward at a time.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from dllm_rl.algorithms.mismatch import off_policy_metrics
from dllm_rl.algorithms.optimizers import set_learning_rate
from dllm_rl.distributed.collectives import (
    SumsAndCounts,
    reduce_metrics,
    sum_gradients,
    sum_over,
    wait_metrics_of,
)
from dllm_rl.likelihoods.estimators import LikelihoodEstimator
from dllm_rl.models.base import Policy, gather_if_sharded, trainable_parameters
from dllm_rl.step.context import StepContext, StepFeature
from dllm_rl.step.correct import make_batches
from dllm_rl.step.samples import Samples, StepResult
from dllm_rl.step.score import score_samples
from dllm_rl.step.settings import UpdateSettings
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Batch

MEASURED_ROWS = 16  # rows of each process that `update_direction` measures
MEASURED_VIEWS = 4


def train_step(
    context: StepContext,
    samples: Samples,
    step: int,
    optimizer: torch.optim.Optimizer,
    done: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> StepResult:
    """Train on a step's samples: score them, correct for the mismatch, and update the weights.

    `done` is called with the metrics so far as soon as the weights are those of the completed update, before what
    another process that ends could still interrupt.
    """
    with context.log.stage("scoring"), context.arithmetic(learner=True):
        scored = score_samples(context, samples, step)
    with context.log.stage("update"), context.arithmetic(learner=True):
        batches, mismatch = make_batches(context, scored)
        batches = [batches[k % len(batches)] for k in range(context.settings.num_iterations)]
        settings = context.settings.update_settings(step)
        late = settings.max_staleness + sum(feature.max_staleness for feature in context.features)
        if batches:
            settings = replace(settings, max_staleness=late)
            is_taken = partial(is_update_taken, context)
            update_metrics = update(context.policy, optimizer, batches, context.accelerator, settings, is_taken)
        else:  # only features train
            context.policy.weights_version += 1
            update_metrics = {"learning_rate": settings.learning_rate}
        if context.corrector_state is not None:
            context.corrector_state = context.next_corrector_state
        for feature in context.features:
            feature.learn(context, optimizer)
        done(mismatch | update_metrics)
        if batches and settings.measure:
            torch.clear_autocast_cache()
            direction = update_direction(
                context.policy, batches[0], context.accelerator, settings.likelihood, settings.micro_batch_size
            )
            update_metrics |= direction
    return StepResult(scored.samples, scored.logps[0], mismatch | update_metrics)


def is_update_taken(context: StepContext, metrics: dict[str, float]) -> bool:
    """Return whether no feature skips the optimizer's step, in any process: all take a step, or none. All features are
    asked.
    """
    asked = [feature for feature in context.features if type(feature).before_update is not StepFeature.before_update]
    skips = [not feature.before_update(context, dict(metrics)) for feature in asked]
    return not asked or not sum_over(torch.tensor(sum(skips)), context.accelerator)


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


# Detached log-probs, batch -> loss, metrics, gradient.
BatchLoss = Callable[[Tensor, Batch], tuple[Tensor, SumsAndCounts, Tensor]]


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    accelerator: Accelerator,
    settings: UpdateSettings,
    is_taken: Callable[[dict[str, float]], bool] = lambda metrics: True,
) -> dict[str, float]:
    """Take one optimizer step per batch. All batches belong to the same rollout. A forward has at most
    `micro_batch_size` rows. `is_taken` is called with the metrics between a backward and its optimizer step, which it
    skips if it returns False.

    Returns:
        The last iteration's metrics; and grad_norm and off_policy/* of every iteration as NAME/iteration_I. If a step
        was skipped, skipped_updates is their number.

    Raises:
        RuntimeError: The rollout's weights are too old or too new (`check_staleness`).
        FloatingPointError: Logits or a gradient norm are not finite. That iteration is not applied; earlier iterations
            are.
    """
    likelihood, learning_rate, micro_batch_size = settings.likelihood, settings.learning_rate, settings.micro_batch_size
    check_staleness(batches[0].rollout, policy, max_staleness=settings.max_staleness)
    set_learning_rate(optimizer, learning_rate)
    view_logprobs = batches[0].old_view_logprobs
    reduced: dict[str, float] = {}
    numbered: dict[str, float] = {}
    for iteration, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)  # frees the gradients' memory before the forward
        policy.module.zero_grad(set_to_none=True)  # of weights that the optimizer does not train
        if iteration:
            torch.clear_autocast_cache()  # its bf16 weights are from before the last optimizer step
            view_logprobs = likelihood.view_logprobs(
                policy, batch.rollout, batch.views, micro_batch_size=micro_batch_size, graphs=batch.graphs
            )
        metrics = forward_backward(
            policy, batch, view_logprobs, loss=settings.loss, likelihood=likelihood, micro_batch_size=micro_batch_size
        )
        metrics |= wait_metrics_of("update", accelerator)
        sum_gradients(policy.module, accelerator)
        parameters = trainable_parameters(policy.module)
        norm = gather_if_sharded(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
        metrics["grad_norm"] = (norm, torch.ones_like(norm))
        reduced = reduce_metrics(metrics, accelerator, shares=("loss",))
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
        if is_taken(reduced):
            optimizer.step()
        else:
            numbered["skipped_updates"] = numbered.get("skipped_updates", 0) + 1
        for name, value in reduced.items():
            if name.startswith(("off_policy/", "grad_norm")):
                numbered[f"{name}/iteration_{iteration}"] = value
    return {"learning_rate": learning_rate} | reduced | numbered


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
        a feature's token advantages, of the tokens'. Below 0, worse answers became more likely. {} if nothing changed.
    """
    is_per_row = batch.advantages.dim() == 1
    row_advantages = batch.advantages if is_per_row else batch.advantages.sum(-1)
    by_advantage = row_advantages.argsort(stable=True)
    is_measured_row = torch.zeros_like(row_advantages, dtype=torch.bool)
    is_measured_row[torch.cat([by_advantage[: MEASURED_ROWS // 2], by_advantage[-(MEASURED_ROWS // 2) :]])] = True
    views = batch.views.restrict_to_rows(is_measured_row & batch.loss_mask.any(-1))
    tokens_per_view = (views.coefficients != 0).sum((-1, -2))
    largest_views = tokens_per_view.topk(min(MEASURED_VIEWS, len(tokens_per_view))).indices
    is_measured_view = torch.zeros_like(tokens_per_view).scatter(0, largest_views, 1)
    views = replace(views, coefficients=views.coefficients * is_measured_view[:, None, None])
    new_view_logprobs = likelihood.view_logprobs(policy, batch.rollout, views, micro_batch_size=micro_batch_size)
    is_scored = (views.coefficients != 0) & batch.loss_mask  # others may be -inf before and after
    change = torch.where(is_scored, new_view_logprobs - batch.old_view_logprobs, 0).double()
    if is_per_row:
        change = change.sum((0, 2))
        advantages = torch.where(is_scored.any(0).any(-1), batch.advantages, 0).double()
    else:
        change = change.sum(0).flatten()
        advantages = torch.where(is_scored.any(0), batch.advantages, 0).double().flatten()
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
    loss: BatchLoss,
    likelihood: LikelihoodEstimator,
    micro_batch_size: int | None = None,
) -> SumsAndCounts:
    """Add this process's share of the loss gradient to the parameters and return (sum, count) metrics.

    The loss and its derivative use `view_logprobs`. `likelihood.backward` then carries the gradient back to the
    parameters: through `batch.graphs`, and through forwards that it runs again.
    """
    view_leaves = view_logprobs.detach().requires_grad_()  # df/ds_n stops here
    logps = likelihood.combine(view_leaves, batch.views)
    _, metrics, loss_gradient = loss(logps.detach(), batch)
    (grad_outputs,) = torch.autograd.grad(logps, view_leaves, loss_gradient)
    if batch.is_scored:
        old_logprobs = likelihood.combine(batch.old_view_logprobs, batch.views)
        metrics |= off_policy_metrics(logps.detach(), batch, old=old_logprobs)
    likelihood.backward(
        policy, batch.rollout, batch.views, grad_outputs, micro_batch_size=micro_batch_size, graphs=batch.graphs
    )
    return metrics
