"""Losses on (B, T) tensors: KL terms, aggregations (token coefficients over the GLOBAL batch), the policy loss."""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.algorithms.surrogates import MAX_LOG, surrogate_inputs
from dllm_rl.bounds import Bound, bounded
from dllm_rl.types import Batch


def kl_k1(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """k1 = -d, d = logp_reference - logp_current: unbiased for KL(current || reference), per token, nats."""
    return -log_ratio


def kl_k2(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """k2 = d^2 / 2: its gradient is the KL's on-policy; stable for ELBO ratios (ESPO [paper])."""
    return log_ratio.square() / 2


def kl_k3(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """k3 = exp(d) - 1 - d: unbiased, never negative (GRPO [paper])."""
    return torch.expm1(log_ratio.clamp(-MAX_LOG, MAX_LOG)) - log_ratio  # unclamped, it keeps a gradient beyond


def entropy_bonus(
    logps: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, group_size: int = 1
) -> Float[Tensor, "B T"]:
    """(-sg(log p) - b) log p: an objective that raises the entropy, in nats, from the sampled tokens alone.

    The mean gradient is grad H for every b that does not depend on the row (score function; exact only on-policy). b is
    the mean of -log p over the prompt's OTHER completions, or 0. Without b the noise lowers the entropy [ours].
    """
    surprise = torch.where(mask, -logps.detach(), 0)
    total = rearrange(surprise.sum(-1), "(p g) -> p g", g=group_size)
    count = rearrange(mask.sum(-1), "(p g) -> p g", g=group_size)
    others = total.sum(-1, keepdim=True) - total  # a row's own tokens would make the baseline depend on the row
    baseline = others / (count.sum(-1, keepdim=True) - count).clamp(min=1)
    return (surprise - rearrange(baseline, "p g -> (p g) 1")) * torch.where(mask, logps, 0)


def token(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
    """Every token weighs the same: 1 / (tokens of the global batch) (DAPO [paper])."""
    return mask / max(num_tokens, 1)


def sequence(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
    """Mean over sequences of the mean over each one's tokens (GRPO [paper]). A sequence without tokens adds nothing."""
    return mask / (mask.sum(-1, keepdim=True).clamp(min=1) * max(num_sequences, 1))  # all rows count, also empty ones


@bounded(length=Bound(at_least=1))
def constant(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int, length: int) -> Float[Tensor, "B T"]:
    """1 / (sequences of the global batch * length), whatever the lengths (Dr.GRPO [paper]).

    length  the constant, tokens: usually max_new_tokens
    """
    return mask / (max(num_sequences, 1) * length)


def further_inputs(surrogate: Callable[..., Tensor], batch: Batch) -> dict[str, Any]:
    """The inputs of OFFERED that a surrogate takes, by name."""
    wanted = surrogate_inputs(surrogate)
    found: dict[str, Any] = {}
    if "old" in wanted:
        found["old"] = torch.where(batch.keep, batch.old, 0)
    if "log_mismatch" in wanted:
        found["log_mismatch"] = torch.where(batch.keep, batch.old - _behaviour(batch, "a surrogate"), 0)
    if "sum_over" in wanted:
        found["sum_over"] = batch.sum_over
    return found


def _behaviour(batch: Batch, wanted_by: str) -> Float[Tensor, "B T"]:
    if batch.behaviour is None:
        raise ValueError(f"{wanted_by} takes the rollout's log-probs, and batch.behaviour is None: give them")
    return batch.behaviour


def policy_loss(
    logps: Float[Tensor, "B T"],
    batch: Batch,
    *,
    surrogate: Callable[..., Tensor],
    aggregate: Callable[..., Tensor],
    beta: float,
    kl: Callable[[Tensor], Tensor],
    entropy: float = 0.0,
    unbiased_kl: bool = False,
) -> tuple[Float[Tensor, ""], dict[str, tuple[Tensor, Tensor]], Float[Tensor, "B T"]]:
    """This process's share of the loss, its metrics as (sum, count), and d loss / d logps.
        loss = -sum_t c_t (w_t J_t - beta KL_t + entropy H_t)
    J is the surrogate, w the corrector's weights, c the aggregation's coefficients, H the `entropy_bonus`. The returned
    loss leaves H out; the gradient includes H.
    unbiased_kl  multiply KL_t by r_t = exp(logp - logp_rollout), differentiated too: with k3 the mean then has
                 the gradient of KL(current || reference) (DeepSeek-V3.2, arXiv 2512.02556, eq. 7 [digest])

    clip_ratio/*  share of tokens with A != 0 whose policy term has no gradient: all, A < 0, A > 0
    band/positive, band/negative  share of tokens with A > 0, A < 0 whose policy term has a gradient
    """
    keep = batch.keep
    logps = logps.detach().requires_grad_()
    coefficient = aggregate(keep, num_tokens=batch.num_tokens, num_sequences=batch.num_sequences)
    log_ratio = torch.where(keep, logps - batch.old, 0)  # off the mask even infinities have no gradient
    objective = surrogate(log_ratio, batch.advantages, keep, **further_inputs(surrogate, batch))
    places = keep.flatten().nonzero()[:, 0]  # found once: on a GPU the host waits to learn how many there are

    def kept(values: Tensor) -> Tensor:
        return values.flatten()[places]

    loss = -kept(coefficient * batch.weights * objective).sum()
    (gradient,) = torch.autograd.grad(loss, logps)

    positive = (batch.advantages > 0)[:, None]
    counted = keep & (batch.advantages != 0)[:, None] & (batch.weights != 0)  # others have no gradient to lose
    clipped = counted & (gradient == 0)  # whatever the surrogate
    count = counted.sum()
    positives = (counted & positive).sum()
    metrics = {
        "clip_ratio/region_mean": (clipped.sum(), count),
        "clip_ratio/low_mean": ((clipped & ~positive).sum(), count),
        "clip_ratio/high_mean": ((clipped & positive).sum(), count),
        "band/positive": ((counted & ~clipped & positive).sum(), positives),
        "band/negative": ((counted & ~clipped & ~positive).sum(), count - positives),
        "ratio/mean": (kept(log_ratio.detach()).exp().sum(), keep.sum()),
    }
    if batch.reference is not None:
        divergence = kl(torch.where(keep, batch.reference - logps, 0))
        if unbiased_kl:
            ratio = torch.where(keep, logps - _behaviour(batch, "unbiased_kl=True"), 0)
            divergence = divergence * ratio.clamp(-MAX_LOG, MAX_LOG).exp()
        penalty = kept(divergence)
        term = beta * (kept(coefficient) * penalty).sum()
        loss = loss + term
        gradient = gradient + torch.autograd.grad(term, logps)[0]
        metrics["kl"] = (penalty.detach().sum(), keep.sum())
    if entropy:
        bonus = entropy * (coefficient * entropy_bonus(logps, keep, group_size=batch.rollout.group_size)).sum()
        gradient = gradient - torch.autograd.grad(bonus, logps)[0]
        metrics["entropy"] = (-kept(logps.detach()).sum(), keep.sum())
    metrics["loss"] = (loss.detach(), torch.ones_like(loss.detach()))  # a share, which reduce_metrics sums
    return loss.detach(), metrics, gradient
