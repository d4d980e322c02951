"""Surrogates: per-token objectives (B, T) to be maximised, unreduced.

log_ratio = logp_current - logp_old, nats, 0 off the mask. A surrogate takes (log_ratio (B, T), advantages (B,), mask
(B, T)) and any of OFFERED by name. It sees all rows of its process, whatever the micro-batches.

old           (B, T) log-probs that ratios are taken against, nats; 0 off the mask
log_mismatch  (B, T) logp_old - logp_rollout, nats; 0 off the mask
sum_over      sums a tensor over all processes; every process calls it once, with the same shape
"""

import inspect
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.bounds import Bound, bounded

MAX_LOG = 20.0  # log-ratios are clamped to +-20 before exp
OFFERED = ("old", "log_mismatch", "sum_over")


def surrogate_inputs(surrogate: Callable) -> frozenset[str]:
    """Which of OFFERED a surrogate takes. Raises ValueError when it wants anything else."""
    further = list(inspect.signature(surrogate).parameters.values())[3:]  # behind log_ratio, advantages, mask
    for p in further:
        if p.name not in OFFERED and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise ValueError(
                f"the surrogate takes {p.name!r}, which is not one of {', '.join(OFFERED)}; bind it with "
                "functools.partial"
            )
    return frozenset(p.name for p in further if p.name in OFFERED and p.default is p.empty)


@bounded(epsilon=Bound(above=0), epsilon_high=Bound(above=0), delta=Bound(at_least=1))
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

    epsilon       how far the ratio may fall below 1 (or rise above it) and keep its gradient
    epsilon_high  how far it may rise above 1 (DAPO: higher than epsilon); None: epsilon
    delta         bound of the unclipped ratio, above 1 + epsilon_high (two-sided clipping, for A < 0); None: none
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

    epsilon, epsilon_high  how far the ratio may fall below 1, and rise above it, and keep its gradient
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
    The gradient is zero outside the band. With `sequence` the sum is the paper's mean over sequences. Source: QaRL,
    arXiv 2604.07853 [digest].
    eps_high           how far the ratio may rise above 1 where the advantage is not negative
    neg_low, neg_high  how far it may fall below 1, and rise above it, where the advantage is negative
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
    max_ratio  bound on the ratio itself (TRL's `epsilon_high`)
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
    k_pos, lam_pos  where the advantage is >= 0; above 0
    k_neg, lam_neg  where it is negative
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
    position's gradient goes to its own log_ratio alone."""
    kept = torch.where(mask, log_ratio, 0)
    mean = kept.detach().sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    # With coefficients constant in a row these gradients add up to the mean's own, without the rounding of a sum over T
    # and its division [ours].
    return torch.where(mask, mean + (kept - kept.detach()), 0)


def exp_ratio(log_ratio: Tensor) -> Tensor:
    """The ratio, its log clamped to +-MAX_LOG."""
    return log_ratio.clamp(-MAX_LOG, MAX_LOG).exp()
