"""Surrogates as pure functions on (B, T) tensors: per-token objectives to be maximised, unreduced.

log_ratio = logp_current - logp_old, nats, 0 off the mask. A surrogate takes (log_ratio (B, T), advantages (B,),
mask (B, T)) and, by the names of its further parameters, any of OFFERED:

    old           (B, T)  log-probs that ratios are taken against, nats; 0 off the mask
    log_mismatch  (B, T)  logp_old - logp_rollout, nats; 0 off the mask
    sum_over      sums a tensor over all processes: what a statistic of the global batch is made with. Every process
                  calls it, once and with a tensor of the same shape. The rows that a surrogate sees are all those of
                  its process, at the current weights, whatever the micro-batches of the forward are
"""

import inspect
import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_LOG = 20.0  # log-ratios are clamped to +-20 before exp
OFFERED = ("old", "log_mismatch", "sum_over")


def surrogate_inputs(surrogate: Callable) -> frozenset[str]:
    """Which of OFFERED a surrogate takes. Raises ValueError when it wants anything else."""
    further = list(inspect.signature(surrogate).parameters.values())[3:]
    for p in further:
        if p.name not in OFFERED and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise ValueError(
                f"the surrogate takes {p.name!r}, which is not one of {', '.join(OFFERED)}; bind it with "
                "functools.partial"
            )
    return frozenset(p.name for p in further if p.name in OFFERED and p.default is p.empty)


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

    epsilon       how far the ratio may fall below 1 (or rise above it) and keep its gradient
    epsilon_high  how far it may rise above 1; None: epsilon
    delta         bound of the unclipped ratio, above 1 + epsilon_high; None: none
    """
    return _clipped(_exp(log_ratio), advantages, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta)


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
    return _clipped(_exp(row_mean(log_ratio, mask)), advantages, epsilon=epsilon, epsilon_high=epsilon_high, delta=None)


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
    Outside the band the gradient is exactly zero; with PPO's minimum a negative row with r > 1 + neg_high would keep an
    unbounded one. Source: QaRL, arXiv 2604.07853; objective and constants [digest]. With the aggregation `sequence` the
    sum is the paper's mean over sequences.

    eps_high  how far the ratio may rise above 1 where the advantage is not negative
    neg_low, neg_high  how far it may fall below 1, and rise above it, where the advantage is negative
    """
    ratio = _exp(row_mean(log_ratio, mask))
    up = ratio.clamp(0, 1 + eps_high)
    down = ratio.clamp(1 - neg_low, 1 + neg_high)
    advantages = advantages[:, None]
    return torch.where(advantages >= 0, up, down) * advantages


def cispo(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    max_ratio: float = 5.0,
) -> Float[Tensor, "B T"]:
    """sg(min(r, max_ratio)) A log_ratio: the gradient of log p, weighted by the capped ratio (CISPO [paper]).

    max_ratio  bound on the ratio
    Every token keeps a gradient. log_ratio stands for logp_current: the two differ by a constant, so the value is 0
    on-policy. max_ratio is TRL's `epsilon_high`, a bound on r itself.
    """
    return _exp(log_ratio.detach()).clamp(max=max_ratio) * advantages[:, None] * log_ratio


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
    """sg(phi(w)) A log_ratio, phi(w) = e^lam w^k e^(-lam w), w the product of the row's ratios (VESPO, arXiv
    2602.10693, its authors' code [paper]).

    phi(1) = 1; phi is largest at w = k / lam and falls to 0 on both sides, so that no clip is needed. log_ratio stands
    for logp_current, as in `cispo`. VESPO's w is current / rollout: with old_logprobs="rollout" it is the same here;
    otherwise w is current / old, and a corrector's weights multiply phi(w) in place of w [ours].

    k_pos, lam_pos  where the advantage is >= 0; above 0
    k_neg, lam_neg  where it is negative
    """
    log_w = torch.where(mask, log_ratio.detach(), 0).sum(-1, keepdim=True).clamp(-MAX_LOG, MAX_LOG)
    positive = (advantages >= 0)[:, None]
    k, lam = torch.where(positive, k_pos, k_neg), torch.where(positive, lam_pos, lam_neg)
    return (lam + k * log_w - lam * log_w.exp()).exp() * advantages[:, None] * log_ratio


def dppo_tv(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    old: Float[Tensor, "B T"],
    *,
    delta: float = 0.2,
    delta_high: float | None = None,
    max_ratio: float = 20.0,
) -> Float[Tensor, "B T"]:
    """sg(min(r, max_ratio)) A grad log p where the token's PROBABILITY has not moved too far, no gradient elsewhere.

        A > 0: p - p_old <= delta_high        A <= 0: p - p_old >= -delta
    |p - p_old| is the total variation between "this token" and "any other": a rare token may change its ratio by much,
    a likely one may not. The value is min(r, max_ratio) A inside, 0 outside. For log-probs of tokens (trajectory with
    every step, causal): contributions of a bound are no probabilities. DPPO-Binary-TV, arXiv 2602.04879, its authors'
    code [paper]; there p_old is the rollout's: with old_logprobs="rollout" it is here.

    delta       how far a probability may have fallen (or risen) and keep its gradient
    delta_high  how far it may have risen; None: delta
    max_ratio   bound on the ratio
    """
    shift = (log_ratio.detach() + old).exp() - old.exp()
    up, down = shift <= (delta if delta_high is None else delta_high), shift >= -delta
    inside = torch.where((advantages > 0)[:, None], up, down)
    weight = _exp(log_ratio.detach()).clamp(max=max_ratio)
    return torch.where(inside, _carried(weight, advantages, log_ratio), 0)


def bgpo(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = 3.0,
) -> Float[Tensor, "B T"]:
    """ppo_clip on the row's ratio as BGPO bounds it: r = 1 + D where A > 0, exp(D) elsewhere, D = mean_t log_ratio.

    1 + D <= exp(D), so that r A is never above exp(D) A; on-policy both have the same value and gradient. Linearity is
    there so that masks can be taken one at a time, which the constant-memory update does for any loss: what is left is
    how off-policy rows count. Where A < 0, BGPO takes the mean over masks of exp of each one's D, and this the exp of
    their mean, which that bounds [ours]; with one mask they are the same. For the aggregation `sequence`. Source:
    arXiv 2510.11683, its abstract [paper]; 1 + D, the division by the length and the clips in a third party's code
    [digest].

    epsilon, epsilon_high  how far the ratio may fall below 1, and rise above it (None: alike), and keep its gradient
    delta         bound of the unclipped ratio, above 1 + epsilon_high; None: none
    """
    mean = row_mean(log_ratio, mask)
    ratio = torch.where((advantages > 0)[:, None], 1 + mean, _exp(mean))
    return _clipped(ratio, advantages, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta)


def ebpo(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Float[Tensor, "B T"]:
    """ppo_clip on the ratio of the row's whole estimate, r = exp(sum_t log_ratio), not normalised by its length.

    EBPO's objective (LLaDA2.1, arXiv 2602.08676, eq. 4 and 5 [paper]), whose log-ratio is a weighted sum over masks and
    blocks of a block-wise ELBO: what an estimator's contributions add up to. For the aggregation `sequence`. The ranges
    are not published; ratios of sums move with the length, and 0.2 is [ours].

    epsilon, epsilon_high  how far the ratio may fall below 1, and rise above it (None: alike), and keep its gradient
    """
    ratio = _exp(row_sum(log_ratio, mask))
    return _clipped(ratio, advantages, epsilon=epsilon, epsilon_high=epsilon_high, delta=None)


def gdsd(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    psi: float = 0.04,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Float[Tensor, "B T"]:
    """-(clamp(D, log(1 - epsilon), log(1 + epsilon_high)) / L - psi A)^2 / (2 psi), D = sum_t log_ratio, L tokens.

    A regression of the log-ratio on the advantage: its gradient is (A - D / (L psi)) grad mean_t log p inside the range
    and exactly 0 outside, so that a row comes to rest at D = L psi A. GDSD (arXiv 2605.29398), its authors' code
    [paper] with one mask (several are averaged before the square here [ours]), divided by 2 psi so that on-policy the
    gradient is A grad log p [ours]. The variant GDSD-TLC, on logits less their mean over the vocabulary, needs more
    than log-probs of tokens and is not here. For the aggregation `sequence`.

    psi      nats a token that an advantage of 1 asks for, above 0
    epsilon, epsilon_high  how far exp(D) may fall below 1, and rise above it (None: alike), and keep its gradient
    """
    low, high = math.log1p(-epsilon), math.log1p(epsilon if epsilon_high is None else epsilon_high)
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    moved = row_sum(log_ratio, mask).clamp(low, high) / length
    return -(moved - psi * advantages[:, None]).square() / (2 * psi)


def stable_drl(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    sum_over: Callable[[Tensor], Tensor],
    *,
    max_ratio: float = 5.0,
) -> Float[Tensor, "B T"]:
    """sg(w) A grad log p, w = min(r, max_ratio) over its mean in the global batch, r the row's exp(mean_t log_ratio).

    The ratio is clipped whatever the sign of A, and weights that add up to the number of rows keep the update among
    those of its rows, however noisy the ratios are. The value is w A. The mean is over the rows that have a token, of
    all processes, at the current weights. For the aggregation `sequence`. StableDRL (arXiv 2603.06743), its authors'
    code [paper]: clipped from above alone; there each process normalises by itself, the global batch is [digest].

    max_ratio  bound on the row's ratio, before it is normalised
    """
    rows = mask.any(-1, keepdim=True)
    ratio = _exp(_mean(log_ratio, mask)).clamp(max=max_ratio)
    total, count = sum_over(torch.stack([torch.where(rows, ratio, 0).double().sum(), rows.sum().double()]))
    weight = ratio * (count / total.clamp(min=1e-30)).to(ratio)
    return _carried(weight, advantages, log_ratio)


def sequence_masked(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    log_mismatch: Float[Tensor, "B T"],
    *,
    bound: float = 0.5,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Float[Tensor, "B T"]:
    """ppo_clip without the rows that the policy has left: 0 where A < 0 and mean_t (logp_rollout - logp) > bound.

    logp is the current one, so that both what quantisation and what the updates since the rollout have moved counts:
    the mean is -mean_t (log_ratio + log_mismatch). Denominators stay. Off-policy sequence masking of DeepSeek-V3.2
    (arXiv 2512.02556, eq. 9), read in TRL's code [digest]; the paper's KL term: use_bias_correction_kl.

    bound  the largest mean, nats a token, that a row with a negative advantage may have
    epsilon, epsilon_high, delta  of `ppo_clip`
    """
    behind = -_mean(log_ratio + log_mismatch, mask)
    dropped = (advantages < 0)[:, None] & (behind > bound)
    kept = ppo_clip(log_ratio, advantages, mask, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta)
    return torch.where(dropped, 0, kept)


def reinforce(
    log_ratio: Float[Tensor, "B T"], advantages: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """A log_ratio: the plain policy gradient A grad log p, without ratio and clip.

    log_ratio stands for logp_current, as in `cispo`."""
    return advantages[:, None] * log_ratio


def row_mean(log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The mean of log_ratio over the row's mask, at every position of the mask; 0 elsewhere and for an empty row.

    Each position's gradient goes to its own log_ratio alone. Summed with coefficients and weights that are constant in
    a row, as every aggregation's and every sequence weight's are, this is the mean's own gradient, free of the rounding
    of a sum over T and its division [ours].
    """
    kept = torch.where(mask, log_ratio, 0)
    return torch.where(mask, _mean(log_ratio, mask) + (kept - kept.detach()), 0)


def row_sum(log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The sum of log_ratio over the row's mask, at every position of the mask; 0 elsewhere. Gradients as in `row_mean`,
    of which it is L times."""
    return row_mean(log_ratio, mask) * mask.sum(-1, keepdim=True)


def _mean(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """The mean over the row's mask, without a gradient; 0 for an empty row."""
    return torch.where(mask, x.detach(), 0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def _carried(weight: Tensor, advantages: Tensor, log_ratio: Tensor) -> Tensor:
    """The value w A, with the gradient w A grad log p; w is detached."""
    return weight * advantages[:, None] * (1 + log_ratio - log_ratio.detach())


def _clipped(
    ratio: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float | None, delta: float | None
) -> Tensor:
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG, MAX_LOG).exp()
