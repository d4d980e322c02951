"""One optimiser update on one Batch, in memory that does not grow with the number of masks.

The loss is a function f of the log-prob estimates l (B, T), and l combines the scores s_n of N masked forwards. So
    grad f = sum_n (df/ds_n) . grad s_n:
df/dl is taken once, on detached l, pulled back to the scores, and then one forward and backward per mask and row chunk
carries that vector through the model. It is exact. At the first inner iteration the current scores ARE the old ones,
and no forward is spent to find them.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

from dllm_rl.algorithms.losses import policy_loss
from dllm_rl.distributed import Metrics, reduce_metrics, sum_gradients
from dllm_rl.likelihoods.estimators import LikelihoodEstimator
from dllm_rl.likelihoods.scoring import backward_view, row_chunks
from dllm_rl.models.base import Policy
from dllm_rl.types import Batch


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
