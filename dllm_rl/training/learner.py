"""One optimiser update on one Batch, in memory that does not grow with the number of masks.

The loss is a function f of the log-prob estimates l (B, T), and l combines the scores s_n of N masked forwards. So
    grad f = sum_n (df/ds_n) . grad s_n:
df/dl is taken once, on detached l, pulled back to the scores, and then one forward and backward per mask and row chunk
carries that vector through the model. It is exact. At the first inner iteration the current scores ARE the old ones,
and no forward is spent to find them.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from dllm_rl.algorithms.losses import policy_loss
from dllm_rl.algorithms.mismatch import mismatch_metrics, symptom_metrics
from dllm_rl.diagnostics.batch_invariance import zero_mismatch
from dllm_rl.distributed import Metrics, local, reduce_metrics, sum_gradients
from dllm_rl.likelihoods.estimators import LikelihoodEstimator
from dllm_rl.likelihoods.scoring import backward_view, row_chunks
from dllm_rl.models.base import Policy
from dllm_rl.quantization.aligned import aligned
from dllm_rl.recipe import Recipe
from dllm_rl.rng import row_seeds, stream
from dllm_rl.types import Batch, Noise, Rollout


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, accelerator: Accelerator, batch: Batch, recipe, step: int
) -> dict[str, float]:
    """`recipe.num_iterations` optimiser steps on one batch; returns metrics of the last, gradient norms of all.

    Raises FloatingPointError on a gradient that is not finite, before the weights are touched.
    """
    gathered: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = gathered["learning_rate"] = recipe.learning_rate * recipe.lr_schedule(step, recipe.num_steps)
    for iteration in range(recipe.num_iterations):
        scores = batch.old_scores
        if iteration:
            torch.clear_autocast_cache()  # autocast's bf16 copies are those of the weights before the last step
            scores = recipe.likelihood.scores(
                policy, batch.rollout, batch.noise, micro_batch_size=recipe.micro_batch_size
            )
        optimizer.zero_grad(set_to_none=True)
        metrics = accumulate_gradients(policy, batch, scores, recipe)
        sum_gradients(policy.module, accelerator)
        norm = torch.nn.utils.clip_grad_norm_(policy.module.parameters(), recipe.max_grad_norm)
        if not norm.isfinite():
            raise FloatingPointError(
                f"gradient norm is {norm.item()} at inner iteration {iteration}; the update was not applied"
            )
        optimizer.step()
        gathered |= reduce_metrics(metrics, accelerator)
        gathered[f"grad_norm/iteration_{iteration}"] = gathered["grad_norm"] = norm.item()
    policy.version += 1
    return gathered


def accumulate_gradients(policy: Policy, batch: Batch, scores: Tensor, recipe) -> Metrics:
    """Add this process's share of the loss gradient to the parameters; returns its metrics as (sum, count) pairs."""
    estimator: LikelihoodEstimator = recipe.likelihood
    leaves = scores.detach().requires_grad_()
    logps = estimator.combine(leaves, batch.noise)
    _, metrics, gradient = policy_loss(
        logps.detach(),
        batch,
        surrogate=recipe.corrector.surrogate,
        aggregate=recipe.aggregate,
        beta=recipe.beta,
        kl=recipe.kl,
        entropy=recipe.entropy_coeff,
    )
    (vectors,) = torch.autograd.grad(logps, leaves, gradient)
    rollout, group = batch.rollout, batch.rollout.group_size
    for rows in row_chunks(len(rollout.tokens), recipe.micro_batch_size, group, rollout.tokens.device):
        part, masks = rollout.rows(rows), batch.noise.rows(rows)
        for n in range(len(masks.masked)):
            # Only positions that move the loss are scored again; with none left in this view, no forward is run.
            backward_view(policy, part, masks.masked[n], vectors[n, rows], packed=estimator.packed is not None)
    return metrics


def draw_noise(recipe: Recipe, step: int, rollout: Rollout, advantages: Tensor, accelerator: Accelerator) -> Noise:
    """The step's masks; the generator is taken past the seeds of the rows that processes before this one hold."""
    generator = stream(recipe.seed, "noise", step)
    row_seeds(generator, accelerator.process_index * len(rollout.tokens))
    return recipe.likelihood.given(recipe.likelihood.draw(rollout, generator), local(advantages.flatten(), accelerator))


def forward_of(recipe: Recipe, policy: Policy, rollout_policy: Policy) -> AbstractContextManager:
    """With align_forward the learner's forward runs through the rollout's quantised operands."""
    align = recipe.corrector.align_forward and rollout_policy is not policy
    return aligned(policy, rollout_policy) if align else nullcontext()


@contextmanager
def arithmetic(recipe: Recipe, accelerator: Accelerator) -> Iterator[None]:
    """bf16 autocast where asked for; with zero_mismatch a row's result does not depend on its batch."""
    with accelerator.autocast(), zero_mismatch() if recipe.zero_mismatch else nullcontext():
        yield


def live_rows(advantages: Tensor, recipe: Recipe, accelerator: Accelerator) -> Tensor:
    """Indices of this process's rows in groups with a nonzero advantage: the others move nothing.

    With a KL term or an entropy bonus, or when no group is left, all rows count (mismatch is measured at every step).
    """
    live = (advantages != 0).any(-1)
    if recipe.beta or recipe.entropy_coeff or not live.any():
        live = torch.ones_like(live)
    return local(live.repeat_interleave(recipe.num_generations), accelerator).nonzero()[:, 0]


def scored(recipe: Recipe, policy: Policy, part: Rollout, noise: Noise) -> tuple[Tensor, Tensor]:
    """Log-prob contributions (R, T) of the live rows and their scores (N, R, T), nats."""
    scores = recipe.likelihood.scores(policy, part, noise, micro_batch_size=recipe.micro_batch_size)
    return recipe.likelihood.combine(scores, noise), scores


def behaviour(recipe: Recipe, policy, rollout_policy, part: Rollout, noise: Noise, old: Tensor) -> Tensor:
    """The rollout policy's side of the ratio (R, T) in the live rows, nats.

    An estimator that replays the sampler step by step would only compute again what the sampler recorded.
    """
    if recipe.likelihood.replays:
        return part.logprobs
    return old if rollout_policy is policy else scored(recipe, rollout_policy, part, noise)[0]


def weigh(
    recipe: Recipe,
    accelerator: Accelerator,
    rollout: Rollout,
    live: Tensor,
    advantages: Tensor,
    old: Tensor,
    behind: Tensor,
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Mismatch metrics over the live rows of all processes, and this process's weights and keep mask (B, T)."""
    width, flat = rollout.tokens.shape[1], advantages.flatten()
    everywhere = []  # every process gathers as many rows, those that are not live as zeros
    for part in (old - behind, rollout.completion_mask[live], old, rollout.tokens[live]):
        rows = torch.zeros(rollout.tokens.shape, dtype=part.dtype, device=part.device)
        rows[live] = part
        everywhere.append(rows)
    padded = [accelerator.pad_across_processes(x, dim=1) for x in everywhere]
    log_mismatch, mask, old, tokens = (accelerator.gather(x) for x in padded)
    weights, keep, reasons = recipe.corrector.weigh(log_mismatch, flat, mask)
    metrics = mismatch_metrics(log_mismatch, mask, old=old, advantages=flat) | reasons
    # Of an estimate that is no log-probability of single tokens, repetition is all that can be said.
    exact = recipe.likelihood.replays or recipe.likelihood.attention == ("causal",)
    metrics |= symptom_metrics(tokens, mask, flat, old=old if exact else None)
    metrics["rollout_corr/rollout_rs_masked_fraction"] = 1 - (keep.sum() / mask.sum()).item()
    return metrics, local(weights, accelerator)[:, :width], local(keep, accelerator)[:, :width]


def live_batch(accelerator, rollout, part, noise, live, advantages, old, old_scores, weights, keep, anchor) -> Batch:
    """The live rows as a Batch; the loss's denominators count all rows, the live and the others."""
    others = torch.ones(len(rollout.tokens), dtype=torch.bool, device=old.device)
    others[live] = False
    tokens = keep[live].sum() + rollout.completion_mask[others].sum()
    counts = torch.stack([tokens, torch.tensor(len(others), device=old.device)])
    num_tokens, num_sequences = accelerator.reduce(counts, reduction="sum").tolist()
    return Batch(
        rollout=part,
        noise=noise,
        advantages=local(advantages.flatten(), accelerator)[live],
        old=old,
        old_scores=old_scores,
        weights=weights[live],
        keep=keep[live],
        reference=anchor,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
    )
