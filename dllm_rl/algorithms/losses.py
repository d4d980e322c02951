"""Losses on (B, T) tensors: surrogates, KL terms, reductions (token coefficients over the GLOBAL batch), their sum.

A surrogate is a per-token objective (B, T) to be maximised, unreduced. It takes (log_ratio (B, T), advantages (B,),
mask (B, T)) and any of SURROGATE_INPUTS by name. log_ratio = logp_current - logp_old, nats, 0 off the mask. A surrogate
sees all rows of its process, whatever the micro-batches.

old_logprobs  (B, T) log-probs that ratios are taken against, nats; 0 off the mask
log_mismatch  (B, T) logp_old - logp_rollout, nats; 0 off the mask
sum_over_processes  sums a tensor over all processes; every process calls it once, with the same shape
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.bounds import Bound, bounded
from dllm_rl.renamed import refuse_renamed
from dllm_rl.types import Batch

MAX_LOG = 20.0  # log-ratios are clamped to +-20 before exp
SURROGATE_INPUTS = ("old_logprobs", "log_mismatch", "sum_over_processes")


def surrogate_inputs(surrogate: Callable) -> frozenset[str]:
    """Which of SURROGATE_INPUTS a surrogate takes. Raises ValueError when it wants anything else."""
    further = list(inspect.signature(surrogate).parameters.values())[3:]  # behind log_ratio, advantages, mask
    refuse_renamed((p.name for p in further if p.default is p.empty), "surrogate")
    for p in further:
        if p.name not in SURROGATE_INPUTS and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise ValueError(
                f"the surrogate takes {p.name!r}, which is not one of {', '.join(SURROGATE_INPUTS)}; bind it with "
                "functools.partial"
            )
    return frozenset(p.name for p in further if p.name in SURROGATE_INPUTS and p.default is p.empty)


def _delta_is_above_the_clip(keywords: dict[str, Any]) -> None:
    epsilon, high, delta = (keywords[name] for name in ("epsilon", "epsilon_high", "delta"))
    least = 1 + (epsilon if high is None else high)
    if delta is not None and delta < least - 1e-6:  # a sum of decimals may be rounded
        raise ValueError(
            f"delta={delta} must be at least 1 + {'epsilon' if high is None else 'epsilon_high'}={least:g}: a smaller "
            "one would clip ratios of positive advantages too"
        )


@bounded(_delta_is_above_the_clip, epsilon=Bound(above=0), epsilon_high=Bound(above=0), delta=Bound(at_least=1))
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

    Args:
        epsilon: How far the ratio may fall below 1 (or rise above it) and keep its gradient.
        epsilon_high: How far it may rise above 1 (DAPO: higher than epsilon); None: epsilon.
        delta: Bound of the unclipped ratio, at least 1 + epsilon_high (two-sided clipping, for A < 0); None: none.
    """
    ratio = exp_ratio(log_ratio)
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    if delta is not None:  # the minimum below takes the unclipped ratio where A < 0
        ratio = ratio.clamp(max=delta)
    return torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])


@bounded(epsilon=Bound(above=0), epsilon_high=Bound(above=0))
def gspo(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    epsilon: float = 3e-4,
    epsilon_high: float | None = 4e-4,
) -> Float[Tensor, "B T"]:
    """ppo_clip on the row's geometric ratio r = exp(mean_t log_ratio), the mean over the mask (GSPO [paper]).

    Args:
        epsilon: How far the ratio may fall below 1, and rise above it, and keep its gradient.
        epsilon_high: How far the ratio may fall below 1, and rise above it, and keep its gradient.
    """
    return ppo_clip(row_mean(log_ratio, mask), advantages, mask, epsilon=epsilon, epsilon_high=epsilon_high)


@bounded(eps_high=Bound(above=0), neg_low=Bound(above=0), neg_high=Bound(above=0))
def trust_band(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    eps_high: float = 4e-4,
    neg_low: float = 3e-4,
    neg_high: float = 7e-4,
) -> Float[Tensor, "B T"]:
    """TBPO's objective r^ A on the row's geometric ratio r = exp(mean_t log_ratio), without PPO's outer minimum.
        A >= 0:  r^ = clamp(r, 0, 1 + eps_high)        A < 0:  r^ = clamp(r, 1 - neg_low, 1 + neg_high)
    The gradient is zero outside the band. With `sequence_mean` the sum is the paper's mean over sequences. Source:
    QaRL, arXiv 2604.07853 [digest].

    Args:
        eps_high: How far the ratio may rise above 1 where the advantage is not negative.
        neg_low: How far it may fall below 1, and rise above it, where the advantage is negative.
        neg_high: How far it may fall below 1, and rise above it, where the advantage is negative.
    """
    ratio = exp_ratio(row_mean(log_ratio, mask))
    up = ratio.clamp(0, 1 + eps_high)  # no outer minimum, as PPO's would leave the ratio unbounded for A < 0
    down = ratio.clamp(1 - neg_low, 1 + neg_high)
    advantages = advantages[:, None]
    return torch.where(advantages >= 0, up, down) * advantages


@bounded(max_ratio=Bound(at_least=1))
def cispo(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    max_ratio: float = 5.0,
) -> Float[Tensor, "B T"]:
    """sg(min(r, max_ratio)) A log_ratio: the gradient of log p, weighted by the capped ratio (CISPO [paper]).

    Every token keeps a gradient. log_ratio replaces logp_current, so the value is 0 on-policy.

    Args:
        max_ratio: Bound on the ratio itself (TRL's `epsilon_high`).
    """
    return exp_ratio(log_ratio.detach()).clamp(max=max_ratio) * advantages[:, None] * log_ratio


@bounded(k_pos=Bound(above=0), lam_pos=Bound(above=0), k_neg=Bound(above=0), lam_neg=Bound(above=0))
def vespo(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    k_pos: float = 2.0,
    lam_pos: float = 3.0,
    k_neg: float = 3.0,
    lam_neg: float = 2.0,
) -> Float[Tensor, "B T"]:
    """sg(phi(w)) A log_ratio, phi(w) = e^lam w^k e^(-lam w), w the row's ratio (VESPO, arXiv 2602.10693 [paper]).

    phi(1) = 1; phi is largest at w = k / lam and falls to 0 on both sides. VESPO's w is current / rollout, as here with
    old_logprobs="rollout"; otherwise w is current / old, and the corrector's weights multiply phi(w) [ours].

    Args:
        k_pos: Where the advantage is >= 0; above 0.
        lam_pos: Where the advantage is >= 0; above 0.
        k_neg: Where it is negative.
        lam_neg: Where it is negative.
    """
    # Detached: phi weighs the gradient of log p, and has none itself.
    log_w = torch.where(mask, log_ratio.detach(), 0).sum(-1, keepdim=True).clamp(-MAX_LOG, MAX_LOG)
    positive = (advantages >= 0)[:, None]
    k = torch.where(positive, k_pos, k_neg)
    lam = torch.where(positive, lam_pos, lam_neg)
    return (lam + k * log_w - lam * log_w.exp()).exp() * advantages[:, None] * log_ratio


def reinforce(
    log_ratio: Float[Tensor, "B T"], advantages: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """A log_ratio: the plain policy gradient A grad log p, without ratio and clip."""
    return advantages[:, None] * log_ratio


def row_mean(log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The mean of log_ratio over the row's mask, at every position of the mask; 0 elsewhere and for an empty row. Each
    position's gradient goes to its own log_ratio alone.
    """
    kept = torch.where(mask, log_ratio, 0)
    mean = kept.detach().sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    # With coefficients constant in a row these gradients add up to the mean's own, without the rounding of a sum over T
    # and its division [ours].
    return torch.where(mask, mean + (kept - kept.detach()), 0)


def exp_ratio(log_ratio: Tensor) -> Tensor:
    """The ratio, its log clamped to +-MAX_LOG."""
    return log_ratio.clamp(-MAX_LOG, MAX_LOG).exp()


def kl_k1(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """k1 = -d, d = logp_reference - logp_current: unbiased for KL(current || reference), per token, nats.

    In a loss its mean gradient is 0 on-policy, as that of any log-prob is [ours].
    """
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


def token_mean(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
    """Every token weighs the same: 1 / (tokens of the global batch) (DAPO [paper])."""
    return mask / max(num_tokens, 1)


def sequence_mean(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
    """Mean over sequences of the mean over each one's tokens (GRPO [paper]). A sequence without tokens adds nothing."""
    return mask / (mask.sum(-1, keepdim=True).clamp(min=1) * max(num_sequences, 1))  # all rows count, also empty ones


@bounded(length=Bound(at_least=1))
def fixed_length_mean(
    mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int, length: int
) -> Float[Tensor, "B T"]:
    """1 / (sequences of the global batch * length), whatever the lengths (Dr.GRPO [paper]).

    Args:
        length: The constant, tokens: usually max_new_tokens.
    """
    return mask / (max(num_sequences, 1) * length)


def further_inputs(surrogate: Callable[..., Tensor], batch: Batch) -> dict[str, Any]:
    """The inputs of SURROGATE_INPUTS that a surrogate takes, by name."""
    wanted = surrogate_inputs(surrogate)
    found: dict[str, Any] = {}
    if "old_logprobs" in wanted:
        found["old_logprobs"] = torch.where(batch.loss_mask, batch.old_logprobs, 0)
    if "log_mismatch" in wanted:
        found["log_mismatch"] = torch.where(
            batch.loss_mask, batch.old_logprobs - _rollout_logprobs(batch, "a surrogate"), 0
        )
    if "sum_over_processes" in wanted:
        found["sum_over_processes"] = batch.sum_over_processes
    return found


def _rollout_logprobs(batch: Batch, wanted_by: str) -> Float[Tensor, "B T"]:
    if batch.rollout_logprobs is None:
        raise ValueError(f"{wanted_by} takes the rollout's log-probs, and batch.rollout_logprobs is None: give them")
    return batch.rollout_logprobs


def policy_loss(
    logps: Float[Tensor, "B T"],
    batch: Batch,
    *,
    surrogate: Callable[..., Tensor],
    loss_reduction: Callable[..., Tensor],
    beta: float,
    kl: Callable[[Tensor], Tensor],
    entropy: float = 0.0,
    unbiased_kl: bool = False,
) -> tuple[Float[Tensor, ""], dict[str, tuple[Tensor, Tensor]], Float[Tensor, "B T"]]:
    """This process's share of the loss, its metrics as (sum, count), and d loss / d logps.
        loss = -sum_t c_t (w_t J_t - beta KL_t + entropy H_t)
    J is the surrogate, w the corrector's weights, c the reduction's coefficients, H the `entropy_bonus`. The returned
    loss leaves H out; the gradient includes H.

    Args:
        unbiased_kl: Multiply KL_t by r_t = exp(logp - logp_rollout), differentiated too: with k3 the mean then has the
            gradient of KL(current || reference) (DeepSeek-V3.2, arXiv 2512.02556, eq. 7 [digest]).

    clip_ratio/*  share of tokens with A != 0 whose policy term has no gradient: all, A < 0, A > 0
    band/positive, band/negative  share of tokens with A > 0, A < 0 whose policy term has a gradient
    """
    keep = batch.loss_mask
    logps = logps.detach().requires_grad_()
    coefficient = loss_reduction(keep, num_tokens=batch.num_tokens, num_sequences=batch.num_sequences)
    log_ratio = torch.where(keep, logps - batch.old_logprobs, 0)  # off the mask even infinities have no gradient
    objective = surrogate(log_ratio, batch.advantages, keep, **further_inputs(surrogate, batch))
    places = keep.flatten().nonzero()[:, 0]  # found once: on a GPU the host waits to learn how many there are

    def kept(values: Tensor) -> Tensor:
        return values.flatten()[places]

    loss = -kept(coefficient * batch.importance_weights * objective).sum()
    (gradient,) = torch.autograd.grad(loss, logps)

    positive = (batch.advantages > 0)[:, None]
    counted = (
        keep & (batch.advantages != 0)[:, None] & (batch.importance_weights != 0)
    )  # others have no gradient to lose
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
    if batch.reference_logprobs is not None:
        divergence = kl(torch.where(keep, batch.reference_logprobs - logps, 0))
        if unbiased_kl:
            ratio = torch.where(keep, logps - _rollout_logprobs(batch, "unbiased_kl=True"), 0)
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
