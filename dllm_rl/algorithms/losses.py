"""Losses on (B, T) tensors: surrogates, KL terms, reductions (token coefficients over the GLOBAL batch), their sum.

A surrogate is a per-token objective (B, T) to be maximized, before reduction. Its arguments are log_ratio (B, T),
advantages (B,), mask (B, T) and any of SURROGATE_INPUTS by name. log_ratio = logp_current - logp_old, in nats, 0 off
the mask. A surrogate sees all rows of its process, regardless of micro-batches. SURROGATE_INPUTS:

- old_logprobs: (B, T) log-probs in the denominator of the ratios, in nats; 0 off the mask.
- log_mismatch: (B, T) logp_old - logp_rollout, in nats; 0 off the mask.
- sum_over_processes: Function that sums a tensor over all processes; every process calls it once, with equal shapes.
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
    """Return the SURROGATE_INPUTS that a surrogate requires.

    Raises:
        ValueError: The surrogate requires any other input.
    """
    further = list(inspect.signature(surrogate).parameters.values())[3:]  # after log_ratio, advantages, mask
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
    """Compute min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) per token, r = exp(log_ratio) (PPO, GRPO [paper]).

    Use it as the default `loss`; `gspo` clips one ratio per sequence.

    Args:
        log_ratio: logp_current - logp_old (B, T), in nats.
        advantages: Advantage of each row (B,).
        mask: Tokens in the loss (B, T).
        epsilon: Largest fall of the ratio below 1 that leaves a gradient; also the largest rise, without epsilon_high.
            Default: 0.2.
        epsilon_high: Largest rise of the ratio above 1 that leaves a gradient (DAPO: more than epsilon). None
            (default): epsilon.
        delta: Bound of the unclipped ratio, at least 1 + epsilon_high (two-sided clipping, for A < 0). None (default):
            no bound.

    Returns:
        The objective of each token (B, T).

    Raises:
        ValueError: epsilon or epsilon_high is not above 0, or delta is below 1 + epsilon_high.
    """
    ratio = exp_ratio(log_ratio)
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    if delta is not None:  # for A < 0 the minimum below selects the unclipped ratio
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
    """Apply `ppo_clip` to the row's geometric ratio r = exp(mean_t log_ratio), the mean over the mask (GSPO [paper]).

    Use it if ratios of single tokens are noisy.

    Args:
        log_ratio: logp_current - logp_old (B, T), in nats.
        advantages: Advantage of each row (B,).
        mask: Tokens in the loss (B, T).
        epsilon: Largest fall of the ratio below 1 that leaves a gradient. Default: 3e-4.
        epsilon_high: Largest rise of the ratio above 1 that leaves a gradient. None: epsilon. Default: 4e-4.

    Returns:
        The objective of each token (B, T).

    Raises:
        ValueError: epsilon or epsilon_high is not above 0.
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
    """Compute TBPO's objective r^ A on the row's geometric ratio r = exp(mean_t log_ratio), without PPO's outer
    minimum.

        A >= 0:  r^ = clamp(r, 0, 1 + eps_high)        A < 0:  r^ = clamp(r, 1 - neg_low, 1 + neg_high)

    The gradient is zero outside the band. With `sequence_mean` the sum is the paper's mean over sequences. The
    corrector `tbpo` sets both.

    Args:
        log_ratio: logp_current - logp_old (B, T), in nats.
        advantages: Advantage of each row (B,).
        mask: Tokens in the loss (B, T).
        eps_high: Largest rise of the ratio above 1 if the advantage is not negative. Default: 4e-4.
        neg_low: Largest fall of the ratio below 1 if the advantage is negative. Default: 3e-4.
        neg_high: Largest rise of the ratio above 1 if the advantage is negative. Default: 7e-4.

    Returns:
        The objective of each token (B, T).

    Raises:
        ValueError: A constant is not above 0.

    Source: QaRL, arXiv 2604.07853 [digest].
    """
    ratio = exp_ratio(row_mean(log_ratio, mask))
    up = ratio.clamp(0, 1 + eps_high)  # no outer minimum: PPO's would leave the ratio unbounded for A < 0
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
    """Compute sg(min(r, max_ratio)) A log_ratio: the gradient of log p, weighted by the capped ratio (CISPO [paper]).

    Every token has a gradient. log_ratio replaces logp_current, so that the value is 0 on-policy.

    Args:
        log_ratio: logp_current - logp_old (B, T), in nats.
        advantages: Advantage of each row (B,).
        mask: Tokens in the loss (B, T).
        max_ratio: Largest ratio (TRL's `epsilon_high`), at least 1. Default: 5.

    Returns:
        The objective of each token (B, T).

    Raises:
        ValueError: max_ratio is below 1.
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
    """Compute sg(phi(w)) A log_ratio, phi(w) = e^lam w^k e^(-lam w), where w is the row's ratio (VESPO [paper]).

    phi(1) = 1; phi is largest at w = k / lam and falls to 0 on both sides. VESPO's w is current / rollout, as in this
    library with old_logprobs="rollout"; otherwise w is current / old, and the corrector's weights multiply phi(w)
    [ours].

    Args:
        log_ratio: logp_current - logp_old (B, T), in nats.
        advantages: Advantage of each row (B,).
        mask: Tokens in the loss (B, T).
        k_pos: k if the advantage is not negative, above 0. Default: 2.
        lam_pos: lam if the advantage is not negative, above 0. Default: 3.
        k_neg: k if the advantage is negative, above 0. Default: 3.
        lam_neg: lam if the advantage is negative, above 0. Default: 2.

    Returns:
        The objective of each token (B, T).

    Raises:
        ValueError: A constant is not above 0.

    Source: VESPO, arXiv 2602.10693 [paper].
    """
    # Detached: phi weights the gradient of log p and has no gradient.
    log_w = torch.where(mask, log_ratio.detach(), 0).sum(-1, keepdim=True).clamp(-MAX_LOG, MAX_LOG)
    positive = (advantages >= 0)[:, None]
    k = torch.where(positive, k_pos, k_neg)
    lam = torch.where(positive, lam_pos, lam_neg)
    return (lam + k * log_w - lam * log_w.exp()).exp() * advantages[:, None] * log_ratio


def reinforce(
    log_ratio: Float[Tensor, "B T"], advantages: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Compute A log_ratio: the plain policy gradient A grad log p, without a ratio and without a clip.

    Use it for one update per rollout.
    """
    return advantages[:, None] * log_ratio


def row_mean(log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Return the mean of log_ratio over the row's mask, at every position of the mask; 0 elsewhere and for an empty
    row.

    The gradient of each position goes only to its log_ratio.
    """
    kept = torch.where(mask, log_ratio, 0)
    mean = kept.detach().sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    # With coefficients that are constant in a row, these gradients add up to the gradient of the mean, without the
    # rounding of a sum over T and its division [ours].
    return torch.where(mask, mean + (kept - kept.detach()), 0)


def exp_ratio(log_ratio: Tensor) -> Tensor:
    """Return exp(log_ratio), with log_ratio clamped to +-MAX_LOG."""
    return log_ratio.clamp(-MAX_LOG, MAX_LOG).exp()


def kl_k1(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Compute k1 = -d, d = logp_reference - logp_current: unbiased for KL(current || reference), per token, in nats.

    In a loss the mean of its gradient is 0 on-policy, like the mean gradient of any log-prob [ours].
    """
    return -log_ratio


def kl_k2(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Compute k2 = d^2 / 2, d = logp_reference - logp_current, in nats.

    On-policy its gradient is the gradient of the KL. It is stable for ELBO ratios (ESPO [paper]).
    """
    return log_ratio.square() / 2


def kl_k3(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Compute k3 = exp(d) - 1 - d, d = logp_reference - logp_current, in nats: unbiased and never negative (GRPO
    [paper]).
    """
    return (
        torch.expm1(log_ratio.clamp(-MAX_LOG, MAX_LOG)) - log_ratio
    )  # this term is not clamped: a gradient remains beyond MAX_LOG


def entropy_bonus(
    logps: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, group_size: int = 1
) -> Float[Tensor, "B T"]:
    """Compute (-sg(log p) - b) log p: an objective that raises the entropy, in nats, from the sampled tokens only.

    The mean gradient is grad H for every b that does not depend on the row (score function; exact only on-policy). b is
    the mean of -log p over the prompt's OTHER completions, or 0 without others. Without b the noise lowers the entropy
    [ours].
    """
    surprise = torch.where(mask, -logps.detach(), 0)
    total = rearrange(surprise.sum(-1), "(p g) -> p g", g=group_size)
    count = rearrange(mask.sum(-1), "(p g) -> p g", g=group_size)
    others = total.sum(-1, keepdim=True) - total  # including the row would make the baseline depend on it
    baseline = others / (count.sum(-1, keepdim=True) - count).clamp(min=1)
    return (surprise - rearrange(baseline, "p g -> (p g) 1")) * torch.where(mask, logps, 0)


def token_mean(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
    """Weight every token equally: 1 / (tokens of the global batch) (DAPO [paper]).

    Use it if long completions should count more than short ones.
    """
    return mask / max(num_tokens, 1)


def sequence_mean(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
    """Average over sequences the mean over each sequence's tokens (GRPO [paper]).

    A sequence without tokens adds nothing, but is counted.
    """
    return mask / (mask.sum(-1, keepdim=True).clamp(min=1) * max(num_sequences, 1))  # all rows count, also empty ones


@bounded(length=Bound(at_least=1))
def fixed_length_mean(
    mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int, length: int
) -> Float[Tensor, "B T"]:
    """Divide by a constant: 1 / (sequences of the global batch * length), for any lengths (Dr.GRPO [paper]).

    Use it if a token's weight should not depend on the length of its completion.

    Args:
        mask: Tokens in the loss (B, T).
        num_tokens: Tokens of the global batch. It is not used.
        num_sequences: Sequences of the global batch.
        length: Constant length in tokens, at least 1; usually max_new_tokens.

    Returns:
        The coefficient of each token (B, T).

    Raises:
        ValueError: length is below 1.
    """
    return mask / (max(num_sequences, 1) * length)


def further_inputs(surrogate: Callable[..., Tensor], batch: Batch) -> dict[str, Any]:
    """Return the values of the SURROGATE_INPUTS that a surrogate requires, by name."""
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
    """Compute this process's share of the loss, its metrics, and d loss / d logps.

    Call it to compute a loss outside of `train`; training calls it for every update.

        loss = -sum_t c_t (w_t J_t - beta KL_t + entropy H_t)

    J is the surrogate, w the corrector's weights, c the reduction's coefficients, H the `entropy_bonus`. The returned
    loss leaves H out; the gradient includes H.

    Args:
        logps: Current log-probs (B, T), in nats.
        batch: Data of the update: old log-probs, advantages, weights, loss mask and counts.
        surrogate: Per-token objective, such as `ppo_clip`.
        loss_reduction: Averaging of tokens, such as `token_mean`.
        beta: Coefficient of the KL term; used if the batch has reference log-probs.
        kl: Estimator of the KL term, such as `kl_k3`.
        entropy: Coefficient of the entropy bonus. Default: 0.
        unbiased_kl: Multiply KL_t by r_t = exp(logp - logp_rollout), which is differentiated too: with k3 the mean then
            has the gradient of KL(current || reference) (DeepSeek-V3.2, arXiv 2512.02556, eq. 7 [digest]). Default:
            False.

    Returns:
        The loss, detached. The metrics as (sum, count); clip_ratio/{region,low,high}_mean are the share of tokens with
        A != 0 whose policy term has no gradient (all, A < 0, A > 0), band/{positive,negative} the share of tokens with
        A > 0, A < 0 whose policy term has a gradient. The gradient (B, T).

    Raises:
        ValueError: The surrogate or unbiased_kl needs the rollout's log-probs, and the batch has none.
    """
    keep = batch.loss_mask
    logps = logps.detach().requires_grad_()
    coefficient = loss_reduction(keep, num_tokens=batch.num_tokens, num_sequences=batch.num_sequences)
    log_ratio = torch.where(keep, logps - batch.old_logprobs, 0)  # off the mask even infinities have no gradient
    objective = surrogate(log_ratio, batch.advantages, keep, **further_inputs(surrogate, batch))
    places = keep.flatten().nonzero()[:, 0]  # computed once: on a GPU the host waits for their number

    def kept(values: Tensor) -> Tensor:
        return values.flatten()[places]

    loss = -kept(coefficient * batch.importance_weights * objective).sum()
    (gradient,) = torch.autograd.grad(loss, logps)

    positive = (batch.advantages > 0)[:, None]
    counted = (
        keep & (batch.advantages != 0)[:, None] & (batch.importance_weights != 0)
    )  # the other tokens never have a gradient
    clipped = counted & (gradient == 0)  # for any surrogate
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
