"""Losses as pure functions on (B, T) tensors: per-token objectives to be maximised, KL terms, aggregation.

log_ratio = logp_current - logp_old, nats. Objectives are per token and unreduced; an aggregation gives each token the
coefficient with which it enters the loss, its denominator counted over the GLOBAL batch.
"""

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
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

    epsilon       how far the ratio may fall below 1 (or rise above it) and keep its gradient
    epsilon_high  how far it may rise above 1; None: epsilon
    delta         bound of the unclipped ratio, above 1 + epsilon_high; None: none
    """
    return _clipped(log_ratio, advantages, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta)


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
    return _clipped(row_mean(log_ratio, mask), advantages, epsilon=epsilon, epsilon_high=epsilon_high, delta=None)


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
    ratio = row_mean(log_ratio, mask).clamp(-MAX_LOG, MAX_LOG).exp()
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
    return log_ratio.detach().clamp(-MAX_LOG, MAX_LOG).exp().clamp(max=max_ratio) * advantages[:, None] * log_ratio


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
    mean = kept.detach().sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, mean + (kept - kept.detach()), 0)


def _clipped(
    log_ratio: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float | None, delta: float | None
) -> Tensor:
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


def entropy_bonus(
    logps: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, group_size: int = 1
) -> Float[Tensor, "B T"]:
    """(-sg(log p) - b) log p: an objective that raises the entropy, in nats, from the sampled tokens alone.

    Over tokens sampled from p, the mean of (-log p - b) grad log p is grad H for every b that does not depend on the
    row (score-function estimate; exact only on-policy). b is the mean of -log p over the tokens of the OTHER
    completions of the same prompt (0 where there are none): without it every sampled token is made likelier, and the
    noise of that lowers the entropy [ours].
    """
    surprise = torch.where(mask, -logps.detach(), 0)
    totals = (rearrange(x.sum(-1), "(p g) -> p g", g=group_size) for x in (surprise, mask))
    total, count = (x.sum(-1, keepdim=True) - x for x in totals)
    return (surprise - rearrange(total / count.clamp(min=1), "p g -> (p g) 1")) * torch.where(mask, logps, 0)


def token(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
    """Every token weighs the same: 1 / (tokens of the global batch) (DAPO [paper])."""
    return mask / max(num_tokens, 1)


def sequence(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
    """Mean over sequences of the mean over each one's tokens (GRPO [paper]). A sequence without tokens adds nothing."""
    return mask / (mask.sum(-1, keepdim=True).clamp(min=1) * max(num_sequences, 1))


def constant(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int, length: int) -> Float[Tensor, "B T"]:
    """1 / (sequences of the global batch * length), whatever the lengths (Dr.GRPO [paper]).

    length  the constant, tokens: usually max_new_tokens
    """
    return mask / (max(num_sequences, 1) * length)


def loss_type(name: str, *, max_completion_length: int | None = None) -> tuple[Callable, Callable]:
    """(surrogate, aggregation) of a loss under TRL's name for it.

    grpo: ppo_clip, sequence. dapo: ppo_clip with epsilon_high 0.28, token. dr_grpo: ppo_clip, constant with
    max_completion_length. cispo: cispo, token. bnpo: ppo_clip, token (TRL divides by the local batch's tokens, here it
    is the global batch's, as for every aggregation). Raises ValueError on another name, or dr_grpo without a length.
    """
    match name:
        case "grpo":
            return partial(ppo_clip, epsilon=0.2), sequence
        case "dapo":
            return partial(ppo_clip, epsilon=0.2, epsilon_high=0.28), token
        case "bnpo":
            return partial(ppo_clip, epsilon=0.2), token
        case "cispo":
            return partial(cispo, max_ratio=5.0), token
        case "dr_grpo":
            if max_completion_length is None:
                raise ValueError("loss_type='dr_grpo' needs max_completion_length, its constant denominator in tokens")
            return partial(ppo_clip, epsilon=0.2), partial(constant, length=max_completion_length)
        case _:
            raise ValueError(f"loss_type={name!r} must be 'grpo', 'dapo', 'dr_grpo', 'bnpo' or 'cispo'")


def policy_loss(
    logps: Float[Tensor, "B T"],
    batch: Batch,
    *,
    surrogate: Callable[..., Tensor],
    aggregate: Callable[..., Tensor],
    beta: float,
    kl: Callable[[Tensor], Tensor],
    entropy: float = 0.0,
) -> tuple[Float[Tensor, ""], dict[str, tuple[Tensor, Tensor]], Float[Tensor, "B T"]]:
    """This process's share of the loss, its metrics as (sum, count), and d loss / d logps.

        loss = -sum_t c_t (w_t J_t - beta KL_t + entropy H_t)
    J is the surrogate, w the corrector's detached weights, c the aggregation's coefficients, H the `entropy_bonus` (of
    which the loss that is returned counts nothing, the gradient everything). The gradient is taken here, once; the
    learner carries it through the model mask by mask. Positions outside `batch.keep` may hold anything, an infinity
    included: they see log-ratio 0 and get gradient 0.

    clip_ratio/*  share of tokens with A != 0 whose policy term has no gradient, all / A < 0 / A > 0 over all of them;
    band/positive, band/negative  share of the tokens with A > 0 / A < 0 that still have one: the band's occupancy.
    """
    logps, keep = logps.detach().requires_grad_(), batch.keep
    coefficient = aggregate(keep, num_tokens=batch.num_tokens, num_sequences=batch.num_sequences)
    log_ratio = torch.where(keep, logps - batch.old, 0)
    objective = surrogate(log_ratio, batch.advantages, keep)
    places = keep.flatten().nonzero()[:, 0]  # found once: on a GPU the host waits to learn how many there are
    kept = lambda x: x.flatten()[places]  # noqa: E731
    loss = -kept(coefficient * batch.weights * objective).sum()
    (gradient,) = torch.autograd.grad(loss, logps)

    # A token is clipped when the policy term has lost its gradient there, whatever the surrogate.
    positive = (batch.advantages > 0)[:, None]
    counted = keep & (batch.advantages != 0)[:, None] & (batch.weights != 0)
    clipped = counted & (gradient == 0)
    count, positives = counted.sum(), (counted & positive).sum()
    metrics = {
        "clip_ratio/region_mean": (clipped.sum(), count),
        "clip_ratio/low_mean": ((clipped & ~positive).sum(), count),
        "clip_ratio/high_mean": ((clipped & positive).sum(), count),
        "band/positive": ((counted & ~clipped & positive).sum(), positives),
        "band/negative": ((counted & ~clipped & ~positive).sum(), count - positives),
        "ratio/mean": (kept(log_ratio.detach()).exp().sum(), keep.sum()),
    }
    if batch.reference is not None:
        penalty = kept(kl(torch.where(keep, batch.reference - logps, 0)))
        term = beta * (kept(coefficient) * penalty).sum()
        loss, gradient = loss + term, gradient + torch.autograd.grad(term, logps)[0]
        metrics["kl"] = (penalty.detach().sum(), keep.sum())
    if entropy:
        bonus = entropy * (coefficient * entropy_bonus(logps, keep, group_size=batch.rollout.group_size)).sum()
        gradient = gradient - torch.autograd.grad(bonus, logps)[0]
        metrics["entropy"] = (-kept(logps.detach()).sum(), keep.sum())
    metrics["loss"] = (loss.detach(), torch.ones_like(loss.detach()))
    return loss.detach(), metrics, gradient
