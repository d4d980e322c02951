"""The learner's part of a step: score a rollout, correct for the mismatch, update the weights.

The update's memory does not grow with the number N of masks. The loss f depends on the scores s_n of N masked forwards:
    grad f = sum_n (df/ds_n) . grad s_n.
df/ds_n is taken once, on detached scores. Then one forward and backward per mask and row chunk carries the vector
through the model. With kept graphs (`keeps_graphs`) no forward runs twice.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.algorithms.mismatch import PREFIX, group_weights, mismatch_metrics, off_policy_metrics, symptom_metrics
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
from dllm_rl.distributed.sharding import in_pace
from dllm_rl.likelihoods.estimators import LikelihoodEstimator, recorded
from dllm_rl.likelihoods.replay import as_noted, as_sampled, blank, routing_counts, routing_metrics
from dllm_rl.likelihoods.scoring import backward_view, row_chunks
from dllm_rl.models.base import Policy, whole
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for
from dllm_rl.samplers.agreement import order_agreement
from dllm_rl.types import Batch, Logprobs, Noise, Rollout


def learned_groups(recipe: Recipe, advantages: Float[Tensor, "P G"]) -> Bool[Tensor, " P"]:
    """Groups that the update learns from: nonzero advantages; all groups with a KL term or an entropy bonus."""
    return (advantages != 0).any(-1) | bool(recipe.beta or recipe.entropy_coeff)


def measured_groups(recipe: Recipe, advantages: Float[Tensor, "P G"], step: int) -> Float[Tensor, " P"]:
    """Weights of groups in the mismatch metrics (`group_weights`): learned groups, `mismatch_sample` of the others."""
    generator = generator_for(recipe.seed, "mismatch sample", step)
    return group_weights(learned_groups(recipe, advantages), recipe.mismatch_sample, generator)


def draw_noise(
    recipe: Recipe,
    rollout: Rollout,
    advantages: Float[Tensor, "P G"],
    groups: Float[Tensor, " P"],
    step: int,
    accelerator: Accelerator,
) -> Noise:
    """The step's masks: groups of weight 0 in `groups` are not scored; rows of `learned_groups` are marked."""
    noise = recipe.likelihood.draw(rollout, generator_for(recipe.seed, "noise", step))
    learned = repeat(learned_groups(recipe, advantages), "p -> (p g)", g=rollout.group_size)
    flat = rearrange(advantages, "p g -> (p g)")
    (mine,), (learned,) = (send(accelerator.device, local(x, accelerator)) for x in (flat, learned))
    noise = replace(recipe.likelihood.with_advantages(noise, mine), learned=learned)
    return only_groups(noise, groups > 0, rollout.group_size, accelerator)


def only_groups(noise: Noise, chosen: Bool[Tensor, " P"], group_size: int, accelerator: Accelerator) -> Noise:
    """The noise with weight 0 for groups that are not chosen."""
    if chosen.all():
        return noise
    return noise.only(*send(accelerator.device, local(repeat(chosen, "p -> (p g)", g=group_size), accelerator)))


def keeps_graphs(recipe: Recipe, policy: Policy, *, views: int, rows: int) -> bool:
    """Whether an update goes back through the forwards that scored: at most `kept_graphs`, each of a micro-batch.
    Not with adapter dropout, which scoring leaves out, nor with sharded weights, whose forwards run `in_pace`."""
    forwards = views * math.ceil(rows / (recipe.micro_batch_size or rows))
    dropout = policy.lora is not None and policy.lora.dropout
    return recipe.shard_size == 1 and forwards <= recipe.kept_graphs and not dropout


def score(
    recipe: Recipe, rollout: Rollout, noise: Noise, *, policy: Policy, rollout_policy: Policy, reference: Policy | None
) -> Logprobs:
    """The rollout's log-probs under every policy, with the same masks. Raises RuntimeError with zero_mismatch if the
    sides differ. An estimator exact for the sampler takes the sampler's recorded log-probs for the rollout policy."""
    likelihood, size, replay = recipe.likelihood, recipe.micro_batch_size, recipe.router_replay
    keep = keeps_graphs(recipe, policy, views=len(noise.weight), rows=len(rollout.tokens))
    note = None if replay is None else blank(policy, rollout, noise)
    anchor = None
    if reference is not None:
        with in_pace(reference):
            anchor = likelihood.logprobs(reference, rollout, noise, micro_batch_size=size)
    sampled = recorded(rollout, noise) if likelihood.exact_for_sampler else None
    if sampled is None and rollout_policy is not policy:
        sampled = likelihood.logprobs(rollout_policy, rollout, noise, micro_batch_size=size, note=note)
    if replay is not None:
        exact = likelihood.exact_for_sampler
        noise = as_sampled(noise, rollout) if exact else as_noted(noise, rollout, note)
    order: dict = {}
    routing = None
    with in_pace(policy):  # the learner comes last: kept graphs and another forward would add up
        if rollout_policy is not policy:
            order = order_agreement(policy, rollout)
            routing = routing_counts(policy, rollout_policy, rollout, noise)
        scores = likelihood.scores(policy, rollout, noise, micro_batch_size=size, keep_graphs=keep)
    old = likelihood.combine(scores.detach(), noise)
    sampled = old if sampled is None else sampled
    logps = Logprobs(
        old=old,
        old_scores=scores,
        rollout=sampled,
        reference=anchor,
        order=order,
        routing=routing,
        noise=None if replay is None else noise,
    )
    if recipe.zero_mismatch:
        check_bitwise_equal(rollout, noise, logps, policy=policy, rollout_policy=rollout_policy)
    return logps


def correct(
    recipe: Recipe,
    rollout: Rollout,
    noise: Noise,
    logps: Logprobs,
    advantages: Float[Tensor, "P G"],
    accelerator: Accelerator,
    *,
    groups: Float[Tensor, " P"],
) -> tuple[Batch, dict[str, float]]:
    """The batch to learn from, with the corrector's weights and keep mask, and mismatch metrics over all processes.

    groups  weights of `measured_groups`, by which `rollout_corr/*` estimates ALL rows. The corrector sees learned rows
            only; their metrics, and the corrector's under verl's names, are `live/*`.

    The loss's denominators count every row. With old_logprobs="rollout" ratios are current / rollout without weights:
    VeXact's bypass, eq. 4. Under mismatch it declines silently, with K1 and K3 rising; recomputation without weights
    fails in stages, with K1 and K3 flat [digest].
    """
    width, group_size, device = rollout.tokens.shape[1], rollout.group_size, rollout.tokens.device
    chosen, flat = learned_groups(recipe, advantages), rearrange(advantages, "p g -> (p g)")
    learned, row_weights = (repeat(x, "p -> (p g)", g=group_size) for x in (chosen, groups))
    mask = noise.scored(rollout.completion_mask)
    lost = reduce_metrics(waited("scoring", accelerator), accelerator)
    parts = (torch.where(mask, logps.old - logps.rollout, 0), mask, rollout.completion_mask, logps.old, rollout.tokens)
    log_mismatch, scored, completion, old, tokens = gather_on_host(parts, accelerator)
    metrics = lost | mismatch_metrics(log_mismatch, completion, old=old, advantages=flat, row_weights=row_weights)
    corrected = scored & learned[:, None]
    log_mismatch = torch.where(corrected, log_mismatch, 0)
    weights, keep, reasons = recipe.corrector.weigh(log_mismatch, flat, corrected)
    metrics |= as_live(reasons)
    if (corrected & log_mismatch.isfinite()).any():
        metrics |= as_live(mismatch_metrics(log_mismatch, corrected, old=old, advantages=flat))
    metrics["live/rollout_rs_masked_fraction"] = 1 - (keep.sum() / corrected.sum().clamp(min=1)).item()
    # Error-token rates need per-token log-probs; ELBO contributions are not, so only repetition is measured.
    exact = recipe.likelihood.exact_for_sampler or recipe.likelihood.attention == ("causal",)
    exact = exact and noise.left is None  # nor are contributions that hold an order's log-probs
    metrics |= {PREFIX + name: value for name, value in reduce_metrics(logps.order, accelerator).items()}
    if logps.routing is not None:
        metrics |= routing_metrics(sum_over(logps.routing, accelerator))
    metrics |= symptom_metrics(tokens, corrected, flat, old=old if exact else None)

    num_tokens, num_sequences = int((keep | (completion & ~corrected)).sum()), len(keep)
    weights, keep = (send(device, local(x, accelerator)[:, :width])[0] for x in (weights, keep))
    return Batch(
        rollout=rollout,
        noise=only_groups(logps.noise or noise, chosen, group_size, accelerator),
        advantages=send(device, local(flat, accelerator))[0],
        old=logps.rollout if recipe.old_logprobs == "rollout" else logps.old,
        old_scores=logps.old_scores,
        weights=weights,
        keep=keep,
        reference=logps.reference,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        behaviour=logps.rollout,
        sum_over=partial(accelerator.reduce, reduction="sum"),
    ), metrics


def as_live(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of the learned rows: `rollout_corr/*` under `live/*`, others under their own names."""
    return {name.replace(PREFIX, "live/"): value for name, value in metrics.items()}


def check_version(rollout: Rollout, policy: Policy, *, stale_steps: int = 0) -> None:
    """Raise RuntimeError if the rollout's weights are more than `stale_steps` updates behind the learner's."""
    behind = policy.version - rollout.weights_version
    if not 0 <= behind <= stale_steps:
        raise RuntimeError(
            f"weights_version={rollout.weights_version} of the rollout is {behind} updates behind the learner's "
            f"{policy.version}, and stale_steps={stale_steps} allows {stale_steps}: call sync_weights before sampling"
        )


Loss = Callable[[Tensor, Batch], tuple[Tensor, Metrics, Tensor]]  # detached log-probs, batch -> loss, metrics, gradient


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    accelerator: Accelerator,
    *,
    loss: Loss,
    likelihood: LikelihoodEstimator,
    learning_rate: float,
    num_iterations: int = 1,
    max_grad_norm: float = 1.0,
    micro_batch_size: int | None = None,
) -> dict[str, float]:
    """Take `num_iterations` optimiser steps on one batch; returns the last step's metrics, and NAME/iteration_I.

    loss              (log-probs (B, T), batch) -> this process's share of the loss, metrics, d loss / d log-probs.
    micro_batch_size  rows per forward, whole groups; None: all rows.
    Before the weights change, raises RuntimeError on a stale rollout, FloatingPointError on a non-finite gradient.
    """
    check_version(batch.rollout, policy)
    gathered = {"learning_rate": learning_rate}
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    keep, size = batch.old_scores.grad_fn is not None, micro_batch_size
    for iteration in range(num_iterations):
        scores = batch.old_scores
        if iteration:
            torch.clear_autocast_cache()  # autocast's bf16 copies are those of the weights before the last step
            with in_pace(policy):
                scores = likelihood.scores(policy, batch.rollout, batch.noise, micro_batch_size=size, keep_graphs=keep)
        optimizer.zero_grad(set_to_none=True)
        metrics = accumulate_gradients(policy, batch, scores, loss=loss, likelihood=likelihood, micro_batch_size=size)
        metrics |= waited("update", accelerator)
        sum_gradients(policy.module, accelerator)
        trained = [p for p in policy.module.parameters() if p.requires_grad]
        norm = whole(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm))
        reduced = reduce_metrics(metrics | {"grad_norm": (norm, torch.ones_like(norm))}, accelerator)
        if not math.isfinite(reduced["grad_norm"]):
            raise FloatingPointError(
                f"gradient norm is {reduced['grad_norm']} at inner iteration {iteration}; the update was not applied"
            )
        if iteration == 0:
            policy.version += 1  # before the weights change: an error in between must not leave them the old version
        optimizer.step()
        kept = {name: value for name, value in reduced.items() if name.startswith(("off_policy/", "grad_norm"))}
        each = {f"{name}/iteration_{iteration}": value for name, value in kept.items()}
        gathered |= reduced | each
    return gathered


def accumulate_gradients(
    policy: Policy,
    batch: Batch,
    scores: Float[Tensor, "N B T"],
    *,
    loss: Loss,
    likelihood: LikelihoodEstimator,
    micro_batch_size: int | None = None,
) -> Metrics:
    """Add this process's share of the loss gradient to the parameters; returns its metrics as (sum, count) pairs.
    `scores` are log-probs of every view, nats. If they have graphs, the backward frees these and no forward runs."""
    leaves = scores.detach().requires_grad_()
    logps = likelihood.combine(leaves, batch.noise)
    _, metrics, gradient = loss(logps.detach(), batch)
    (vectors,) = torch.autograd.grad(logps, leaves, gradient)
    metrics |= off_policy_metrics(logps.detach(), batch, old=likelihood.combine(batch.old_scores.detach(), batch.noise))
    if scores.grad_fn is not None:
        scores.backward(vectors)
        return metrics
    with in_pace(policy, backward=True):
        for chunk in row_chunks(batch.rollout, batch.noise, micro_batch_size):
            part, masks = chunk.of(batch.rollout, batch.noise)
            for n, masked in enumerate(masks.masked):
                # Only positions that move the loss are scored again; with none left in this view, no forward runs.
                vector = vectors[n, chunk.rows][:, chunk.columns]
                back = partial(backward_view, policy, part, masked, vector, packed=likelihood.packed is not None)
                if masks.left is not None:
                    back = partial(back, scored=masks.weight[n] != 0, left=masks.left[n])
                back(routes=masks.routes(n))
    return metrics
