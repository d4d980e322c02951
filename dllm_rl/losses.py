"""Losses as pure functions on (B, T) tensors: per-token objectives to be maximised, KL terms, aggregation.

log_ratio = logp_current - logp_old, nats. Objectives are per token and unreduced; an aggregation gives each token the
coefficient with which it enters the loss, its denominator counted over the GLOBAL batch.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.types import Batch

MAX_LOG = 20.0  # log-ratios are clamped to +-20 before exp


def ppo_clip(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Float[Tensor, "B T"]:
    """min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) per token, r = exp(log_ratio) (PPO, GRPO [paper]).

    epsilon_high defaults to epsilon (DAPO sets it higher); delta, if given, bounds r from above in the unclipped term
    (two-sided clipping, for negative advantages).
    """
    ratio = log_ratio.clamp(-MAX_LOG, MAX_LOG).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])


def kl_k1(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """k1 = -d, d = logp_reference - logp_current: unbiased for KL(current || reference), per token, nats."""
    return -log_ratio


def kl_k2(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """k2 = d^2 / 2: its gradient is the KL's on-policy; stable for ELBO ratios (ESPO [paper])."""
    return log_ratio.square() / 2


def kl_k3(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """k3 = exp(d) - 1 - d: unbiased, never negative (GRPO [paper])."""
    return torch.expm1(log_ratio.clamp(-MAX_LOG, MAX_LOG)) - log_ratio


def token(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
    """Every token weighs the same: 1 / (tokens of the global batch) (DAPO [paper])."""
    return mask / num_tokens


def sequence(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
    """Mean over sequences of the mean over each one's tokens (GRPO [paper]). A sequence without tokens adds nothing."""
    return mask / (mask.sum(-1, keepdim=True).clamp(min=1) * num_sequences)


def constant(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int, length: int) -> Float[Tensor, "B T"]:
    """1 / (sequences of the global batch * length), whatever the lengths (Dr.GRPO [paper]); length is in tokens."""
    return mask / (num_sequences * length)


def policy_loss(
    logps: Float[Tensor, "B T"], batch: Batch, *, surrogate, aggregate, beta: float, kl
) -> tuple[Float[Tensor, ""], dict[str, tuple[Tensor, Tensor]], Float[Tensor, "B T"]]:
    """This process's share of the loss  -sum_t c_t (w_t J_t - beta KL_t), its metrics as (sum, count), and d loss / d logps.

    J is the surrogate, w the corrector's detached weights, c the aggregation's coefficients. The gradient is taken here,
    once; the learner carries it through the model mask by mask.
    """
    logps = logps.detach().requires_grad_()
    coefficient = aggregate(batch.keep, num_tokens=batch.num_tokens, num_sequences=batch.num_sequences)
    objective = surrogate(logps - batch.old, batch.advantages, batch.keep)
    loss = -(coefficient * batch.weights * objective)[batch.keep].sum()
    (gradient,) = torch.autograd.grad(loss, logps)

    # A token is clipped when the policy term has lost its gradient there, whatever the surrogate.
    positive = (batch.advantages > 0)[:, None]
    counted = batch.keep & (batch.advantages != 0)[:, None] & (batch.weights != 0)
    clipped = counted & (gradient == 0)
    count = counted.sum()
    metrics = {
        "clip_ratio/region_mean": (clipped.sum(), count),
        "clip_ratio/low_mean": ((clipped & ~positive).sum(), count),
        "clip_ratio/high_mean": ((clipped & positive).sum(), count),
        "ratio/mean": ((logps.detach() - batch.old)[batch.keep].exp().sum(), batch.keep.sum()),
    }
    if batch.reference is not None:
        penalty = kl(batch.reference - logps)[batch.keep]
        term = beta * (coefficient[batch.keep] * penalty).sum()
        loss, gradient = loss + term, gradient + torch.autograd.grad(term, logps)[0]
        metrics["kl"] = (penalty.detach().sum(), batch.keep.sum())
    metrics["loss"] = (loss.detach(), torch.ones(()))
    return loss.detach(), metrics, gradient
