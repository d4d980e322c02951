"""The loss of an update: surrogates, KL terms, reductions, and `policy_loss`, which adds them up.

A surrogate is a per-token objective (B, T) to be maximized. Its arguments are log_ratio (B, T), advantages (B,), mask
(B, T) and any of SURROGATE_INPUTS by name. log_ratio = logp_current - logp_old, in nats; 0 outside the mask. A
surrogate sees all rows of its process, regardless of micro-batches. SURROGATE_INPUTS:

- old_logprobs: (B, T) log-probs in the denominator of the ratios, in nats; 0 outside the mask.
- log_mismatch: (B, T) logp_old - logp_rollout, in nats; 0 outside the mask.
- sum_over_processes: Function that sums a tensor over all processes; every process calls it once, with equal shapes.

A reduction returns the coefficient of each token (B, T) in the loss; the counts in its arguments cover the GLOBAL
batch. docs/methods.md explains the tags [paper], [digest] and [ours].
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.bounds import Bound, bounded
from dllm_rl.types import Batch

MAX_LOG = 20.0  # log-ratios are clamped to +-20 before exp
# The width of a band around the ratio 1. A narrower one would be closed in float32, and the gradient lost at ratio 1.
WIDTH = Bound(at_least=1e-6)
SURROGATE_INPUTS = ("old_logprobs", "log_mismatch", "sum_over_processes")


def surrogate_inputs(surrogate: Callable) -> frozenset[str]:
    """Return the SURROGATE_INPUTS that a surrogate requires.

    Raises:
        ValueError: The surrogate requires another input.
    """
    parameters = list(inspect.signature(surrogate).parameters.values())[3:]  # after log_ratio, advantages, mask
    required = [p for p in parameters if p.default is p.empty]
    for p in required:
        if p.name not in SURROGATE_INPUTS and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise ValueError(
                f"the surrogate takes {p.name!r}, which is not one of {', '.join(SURROGATE_INPUTS)}; bind it with "
                "functools.partial"
            )
    return frozenset(p.name for p in required if p.name in SURROGATE_INPUTS)


def _check_delta(keywords: dict[str, Any]) -> None:
    """Raise ValueError if `delta` of `ppo_clip` is below the upper clip."""
    delta = keywords["delta"]
    upper_name = "epsilon" if keywords["epsilon_high"] is None else "epsilon_high"
    min_delta = 1 + keywords[upper_name]
    if delta is not None and delta < min_delta - 1e-6:  # a sum of decimals may be rounded
        raise ValueError(
            f"delta={delta} must be at least 1 + {upper_name}={min_delta:g}: a smaller one would clip ratios of "
            "positive advantages too"
        )


@bounded(_check_delta, epsilon=WIDTH, epsilon_high=WIDTH, delta=Bound(at_least=1))
def ppo_clip(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Float[Tensor, "B T"]:
    """Compute min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) per token, with r = exp(log_ratio).

    This is the default `loss`. Source: PPO, GRPO [paper].

    Args:
        log_ratio: logp_current - logp_old (B, T), in nats.
        advantages: Advantage of each row (B,).
        mask: Tokens in the loss (B, T).
        epsilon: Lower clip: the ratio is clipped at 1 - epsilon. Default: 0.2.
        epsilon_high: Upper clip: the ratio is clipped at 1 + epsilon_high (DAPO: larger than epsilon). None (default):
            epsilon.
        delta: Upper limit of the ratio in r A (two-sided clipping), at least 1 + epsilon_high. It matters for A < 0,
            where the ratio is otherwise unlimited. None (default): no limit.

    Returns:
        The objective of each token (B, T).

    Raises:
        ValueError: epsilon or epsilon_high is below 1e-6, or delta is below 1 + epsilon_high.
    """
    ratio = exp_ratio(log_ratio)
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    if delta is not None:  # for A < 0 the minimum below selects the unclipped ratio
        ratio = ratio.clamp(max=delta)
    return torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])


@bounded(epsilon=WIDTH, epsilon_high=WIDTH)
def gspo(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    epsilon: float = 3e-4,
    epsilon_high: float | None = 4e-4,
) -> Float[Tensor, "B T"]:
    """Apply `ppo_clip` to one ratio per row, r = exp(mean_t log_ratio), the mean over the mask.

    Use it if ratios of single tokens are noisy. Source: GSPO [paper].

    Args:
        log_ratio: logp_current - logp_old (B, T), in nats.
        advantages: Advantage of each row (B,).
        mask: Tokens in the loss (B, T).
        epsilon: Lower clip: the ratio is clipped at 1 - epsilon. Default: 3e-4.
        epsilon_high: Upper clip: the ratio is clipped at 1 + epsilon_high. None: epsilon. Default: 4e-4.

    Returns:
        The objective of each token (B, T).

    Raises:
        ValueError: epsilon or epsilon_high is below 1e-6.
    """
    return ppo_clip(row_mean(log_ratio, mask), advantages, mask, epsilon=epsilon, epsilon_high=epsilon_high)


@bounded(eps_high=WIDTH, neg_low=WIDTH, neg_high=WIDTH)
def trust_band(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    eps_high: float = 4e-4,
    neg_low: float = 3e-4,
    neg_high: float = 7e-4,
) -> Float[Tensor, "B T"]:
    """Compute TBPO's objective r^ A, where r^ is the row's ratio r = exp(mean_t log_ratio), clamped to a band.

        A >= 0:  r^ = clamp(r, 0, 1 + eps_high)        A < 0:  r^ = clamp(r, 1 - neg_low, 1 + neg_high)

    The gradient is zero outside the band. There is no outer minimum as in PPO, which would leave the ratio unbounded
    for A < 0. The paper averages over sequences, as `sequence_mean` does; the corrector `tbpo` sets this objective and
    this reduction.

    Args:
        log_ratio: logp_current - logp_old (B, T), in nats.
        advantages: Advantage of each row (B,).
        mask: Tokens in the loss (B, T).
        eps_high: Clamp the ratio at 1 + eps_high if the advantage is not negative. Default: 4e-4.
        neg_low: Clamp the ratio from below at 1 - neg_low if the advantage is negative. Default: 3e-4.
        neg_high: Clamp the ratio from above at 1 + neg_high if the advantage is negative. Default: 7e-4.

    Returns:
        The objective of each token (B, T).

    Raises:
        ValueError: An argument is below 1e-6.

    Source: QaRL, arXiv 2604.07853 [digest].
    """
    ratio = exp_ratio(row_mean(log_ratio, mask))
    for_nonnegative = ratio.clamp(0, 1 + eps_high)
    for_negative = ratio.clamp(1 - neg_low, 1 + neg_high)
    advantages = advantages[:, None]
    return torch.where(advantages >= 0, for_nonnegative, for_negative) * advantages


@bounded(max_ratio=Bound(at_least=1))
def cispo(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    max_ratio: float = 5.0,
) -> Float[Tensor, "B T"]:
    """Compute sg(min(r, max_ratio)) A log_ratio: a policy gradient weighted by the capped ratio (sg: stop-gradient).

    Use it if every token should have a gradient. The paper multiplies by logp_current; log_ratio has the same gradient,
    and makes the value 0 on-policy. Source: CISPO [paper].

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


def _check_phi(keywords: dict[str, Any]) -> None:
    """Raise ValueError if the largest weight phi of `vespo` exceeds e^MAX_LOG, for log w in +-MAX_LOG."""
    for sign in ("pos", "neg"):
        k, lam = keywords[f"k_{sign}"], keywords[f"lam_{sign}"]
        log_w = min(max(math.log(k) - math.log(lam), -MAX_LOG), MAX_LOG)
        log_phi = lam + k * log_w - lam * math.exp(log_w)
        if log_phi > MAX_LOG:
            raise ValueError(
                f"k_{sign}={k} and lam_{sign}={lam} give weights up to e^{log_phi:.3g}, more than "
                f"e^{MAX_LOG:g}: choose smaller ones, closer to each other"
            )


@bounded(_check_phi, k_pos=Bound(above=0), lam_pos=Bound(above=0), k_neg=Bound(above=0), lam_neg=Bound(above=0))
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
    """Compute sg(phi(w)) A log_ratio, where w is the row's ratio and phi(w) = e^lam w^k e^(-lam w) (sg: stop-gradient).

    phi(1) = 1; phi is largest at w = k / lam and falls to 0 on both sides. VESPO's w is p_current / p_rollout, as in
    this library with old_logprobs="rollout". Otherwise w is p_current / p_old, and the corrector's weights multiply
    phi(w) [ours].

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
        ValueError: An argument is not above 0, or the largest phi exceeds e^20.

    Source: VESPO, arXiv 2602.10693 [paper].
    """
    # Detached: phi is only a weight of the gradient of log p.
    log_w = torch.where(mask, log_ratio.detach(), 0).sum(-1, keepdim=True).clamp(-MAX_LOG, MAX_LOG)
    positive = (advantages >= 0)[:, None]
    k = torch.where(positive, k_pos, k_neg)
    lam = torch.where(positive, lam_pos, lam_neg)
    return (lam + k * log_w - lam * log_w.exp()).exp() * advantages[:, None] * log_ratio


def reinforce(
    log_ratio: Float[Tensor, "B T"], advantages: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Compute A log_ratio, whose gradient is the plain policy gradient A grad log p, without a ratio or a clip.

    Nothing bounds the change over several updates per rollout. The old policy is scored all the same, for metrics.
    """
    return advantages[:, None] * log_ratio


def row_mean(log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Return the row's mean of log_ratio over the mask, at every position of the mask; 0 outside the mask.

    The gradient is not that of a mean: each position of the result passes its gradient to its own log_ratio only.
    """
    masked_ratio = torch.where(mask, log_ratio, 0)
    mean = masked_ratio.detach().sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    # If the loss's coefficients are constant in a row, these gradients add up to the gradient of the mean, without the
    # rounding of a sum over T and its division [ours].
    return torch.where(mask, mean + (masked_ratio - masked_ratio.detach()), 0)


def exp_ratio(log_ratio: Tensor) -> Tensor:
    """Return exp(log_ratio), with log_ratio clamped to +-MAX_LOG."""
    return log_ratio.clamp(-MAX_LOG, MAX_LOG).exp()


def kl_k1(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Compute k1 = -d, with d = logp_reference - logp_current, in nats: unbiased for KL(current || reference).

    In a loss use `kl_k2` or `kl_k3`: on-policy, the expected gradient of k1 is 0, like that of any log-prob [ours].
    """
    return -log_ratio


def kl_k2(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Compute k2 = d^2 / 2, with d = logp_reference - logp_current, in nats.

    Use it if log-probs are ELBOs, for which it is stable (ESPO [paper]). On-policy its expected gradient is that of
    KL(current || reference) of each token given the tokens before it; how a token changes the KL of later tokens is
    left out.
    """
    return log_ratio.square() / 2


def kl_k3(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Compute k3 = exp(d) - 1 - d, with d = logp_reference - logp_current, in nats.

    It is the default: unbiased for KL(current || reference), and never negative. Source: GRPO [paper].
    """
    # The second term is not clamped, so that a gradient remains beyond MAX_LOG.
    return torch.expm1(log_ratio.clamp(-MAX_LOG, MAX_LOG)) - log_ratio


def bias_corrected_kl(
    log_ratio: Float[Tensor, "B T"],
    *,
    kl: Callable[[Tensor], Tensor],
    rollout_log_ratio: Float[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """Multiply a KL estimate by p_current / p_rollout, and differentiate this ratio too.

    Pass `partial(bias_corrected_kl, kl=kl_k3)` as the `kl` of `policy_loss`. The expected gradient is then that of
    KL(current || reference) of each token given the tokens before it, even if other weights made the rollouts. For a
    row of one token this is the gradient of the row's KL. For longer rows, how a token changes the KL of later tokens
    is left out, and the tokens before are as frequent as in the rollouts. In an enumerated example of two tokens
    (tests/algorithms/test_losses.py) the gradient differs from that of the row's KL by 0.12 of its norm on-policy and
    by 0.57 off-policy [ours]. Source: DeepSeek-V3.2, arXiv 2512.02556, eq. 7 [digest].

    Args:
        log_ratio: logp_reference - logp_current (B, T), in nats.
        kl: Estimator of the KL term, such as `kl_k3`.
        rollout_log_ratio: logp_current - logp_rollout (B, T), in nats; `policy_loss` passes it.

    Returns:
        The corrected estimate of each token (B, T), in nats.
    """
    return kl(log_ratio) * rollout_log_ratio.clamp(-MAX_LOG, MAX_LOG).exp()


def entropy_bonus(
    logps: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, group_size: int = 1
) -> Float[Tensor, "B T"]:
    """Compute (-sg(log p) - b) log p: an objective that raises the entropy H, in nats, from the sampled tokens only.

    sg is stop-gradient, and H the entropy of a token given the tokens before it. b is a baseline: the mean of -log p
    over the tokens of the prompt's OTHER completions, or 0 without others. For every b that does not depend on the row,
    the expected gradient is the gradient of H (score function; exact only on-policy); how a token changes the entropy
    of later tokens is left out. Without b, the noise of the gradient lowers the entropy [ours].
    """
    surprise = torch.where(mask, -logps.detach(), 0)
    total = rearrange(surprise.sum(-1), "(p g) -> p g", g=group_size)
    count = rearrange(mask.sum(-1), "(p g) -> p g", g=group_size)
    others_total = total.sum(-1, keepdim=True) - total  # including the row would make the baseline depend on it
    others_count = count.sum(-1, keepdim=True) - count
    baseline = others_total / others_count.clamp(min=1)
    return (surprise - rearrange(baseline, "p g -> (p g) 1")) * torch.where(mask, logps, 0)


def token_mean(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
    """Weight every token equally, by 1 / (tokens of the global batch).

    Use it if long completions should count more than short ones. Source: DAPO [paper].
    """
    return mask / max(num_tokens, 1)


def sequence_mean(mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
    """Average over each sequence's tokens, then over sequences.

    Use it if every completion should count the same. A sequence without tokens adds nothing, but is counted. Source:
    GRPO [paper].
    """
    return mask / (mask.sum(-1, keepdim=True).clamp(min=1) * max(num_sequences, 1))


@bounded(length=Bound(at_least=1))
def fixed_length_mean(
    mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int, length: int
) -> Float[Tensor, "B T"]:
    """Weight every token by the constant 1 / (sequences of the global batch * length).

    Use it if a token's weight should not depend on the length of any completion. Source: Dr.GRPO [paper].

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


def surrogate_keywords(surrogate: Callable[..., Tensor], batch: Batch) -> dict[str, Tensor | Callable]:
    """Return the values of the SURROGATE_INPUTS that a surrogate requires, by name."""
    names = surrogate_inputs(surrogate)
    keywords: dict[str, Tensor | Callable] = {}
    if "old_logprobs" in names:
        keywords["old_logprobs"] = torch.where(batch.loss_mask, batch.old_logprobs, 0)
    if "log_mismatch" in names:
        log_mismatch = batch.old_logprobs - _rollout_logprobs(batch, "a surrogate")
        keywords["log_mismatch"] = torch.where(batch.loss_mask, log_mismatch, 0)
    if "sum_over_processes" in names:
        keywords["sum_over_processes"] = batch.sum_over_processes
    return keywords


def apply_per_token(
    surrogate: Callable[..., Tensor],
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    **keywords: Any,
) -> Float[Tensor, "B T"]:
    """Call a surrogate with an advantage per token instead of per row, by making every token a row.

    The surrogate must treat each token by itself (`is_per_token`).
    """
    flat_keywords = {name: x.reshape(-1, 1) if isinstance(x, Tensor) else x for name, x in keywords.items()}
    objective = surrogate(log_ratio.reshape(-1, 1), advantages.flatten(), mask.reshape(-1, 1), **flat_keywords)
    return objective.view_as(log_ratio)


def is_per_token(surrogate: Callable[..., Tensor]) -> bool:
    """Return whether a surrogate treats each token by itself, so that each token may have a different advantage.

    This is tested on numbers: rows of three tokens and rows of one token must give the same objective.
    """
    log_ratio = torch.linspace(-0.9, 0.7, 12, dtype=torch.float64).view(4, 3)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    mask = torch.ones(4, 3, dtype=torch.bool)
    inputs = {"old_logprobs": log_ratio - 1, "log_mismatch": log_ratio / 3, "sum_over_processes": lambda total: total}
    keywords = {name: inputs[name] for name in surrogate_inputs(surrogate)}
    row_objective = surrogate(log_ratio, advantages, mask, **keywords)
    token_objective = apply_per_token(surrogate, log_ratio, advantages[:, None].expand(4, 3), mask, **keywords)
    return bool(torch.allclose(row_objective.expand(4, 3), token_objective))


def _rollout_logprobs(batch: Batch, consumer: str) -> Float[Tensor, "B T"]:
    """Return the rollout's log-probs, which `consumer` needs. Raise ValueError if the batch has none."""
    if batch.rollout_logprobs is None:
        raise ValueError(f"{consumer} needs the rollout's log-probs, but batch.rollout_logprobs is None: set it")
    return batch.rollout_logprobs


def policy_loss(
    logps: Float[Tensor, "B T"],
    batch: Batch,
    *,
    surrogate: Callable[..., Tensor],
    loss_reduction: Callable[..., Tensor],
    beta: float,
    kl: Callable[..., Tensor],
    entropy: float = 0.0,
) -> tuple[Float[Tensor, ""], dict[str, tuple[Tensor, Tensor]], Float[Tensor, "B T"]]:
    """Compute this process's share of the loss, its metrics, and d loss / d logps.

    Call it to compute a loss outside of `train`; training calls it for every update.

        loss = -sum_t c_t (w_t J_t - beta KL_t + entropy H_t)

    J is the surrogate, w the corrector's weights, c the reduction's coefficients, H the `entropy_bonus`. The returned
    loss does not include H; the returned gradient does.

    Args:
        logps: Current log-probs (B, T), in nats.
        batch: Data of the update: old log-probs, advantages, weights, loss mask and counts.
        surrogate: Per-token objective, such as `ppo_clip`.
        loss_reduction: Averaging of tokens, such as `token_mean`.
        beta: Coefficient of the KL term; used if the batch has reference log-probs.
        kl: Estimator of the KL term, such as `kl_k3`, or `bias_corrected_kl` with an estimator bound.
        entropy: Coefficient of the entropy bonus. Default: 0.

    Returns:
        The loss, detached; the metrics, each as (sum, count); the gradient (B, T).
        clip_ratio/{region,low,high}_mean: shares of all tokens whose policy term has no gradient: for any A, for A < 0,
        and for A > 0.
        band/{positive,negative}: share of the tokens with A > 0, and with A < 0, whose policy term has a gradient.
        Neither counts tokens with A = 0 or with weight 0.

    Raises:
        ValueError: The surrogate or the KL term needs the rollout's log-probs, and the batch has none.
    """
    loss_mask = batch.loss_mask
    logps = logps.detach().requires_grad_()
    coefficient = loss_reduction(loss_mask, num_tokens=batch.num_tokens, num_sequences=batch.num_sequences)
    # Not multiplied by the mask: infinities outside the mask would have a NaN gradient.
    log_ratio = torch.where(loss_mask, logps - batch.old_logprobs, 0)
    keywords = surrogate_keywords(surrogate, batch)
    if batch.token_advantages is None:
        advantages = batch.advantages[:, None]
        objective = surrogate(log_ratio, batch.advantages, loss_mask, **keywords)
    else:
        advantages = batch.token_advantages
        objective = apply_per_token(surrogate, log_ratio, advantages, loss_mask, **keywords)
    flat_index = loss_mask.flatten().nonzero()[:, 0]  # computed only once, because `nonzero` waits for the GPU

    def at_tokens(values: Tensor) -> Tensor:
        return values.flatten()[flat_index]

    loss = -at_tokens(coefficient * batch.importance_weights * objective).sum()
    (gradient,) = torch.autograd.grad(loss, logps)

    positive = advantages > 0
    # Tokens with a zero advantage or a zero weight never have a gradient, clipped or not.
    counted = loss_mask & (advantages != 0) & (batch.importance_weights != 0)
    clipped = counted & (gradient == 0)  # holds for every surrogate, however it clips
    count = counted.sum()
    num_positive = (counted & positive).sum()
    metrics = {
        "clip_ratio/region_mean": (clipped.sum(), count),
        "clip_ratio/low_mean": ((clipped & ~positive).sum(), count),
        "clip_ratio/high_mean": ((clipped & positive).sum(), count),
        "band/positive": ((counted & ~clipped & positive).sum(), num_positive),
        "band/negative": ((counted & ~clipped & ~positive).sum(), count - num_positive),
        "ratio/mean": (at_tokens(log_ratio.detach()).exp().sum(), loss_mask.sum()),
    }
    if batch.reference_logprobs is not None:
        kl_keywords = {}
        if isinstance(kl, partial) and kl.func is bias_corrected_kl:
            rollout_log_ratio = logps - _rollout_logprobs(batch, "bias_corrected_kl")
            kl_keywords["rollout_log_ratio"] = torch.where(loss_mask, rollout_log_ratio, 0)
        penalty = at_tokens(kl(torch.where(loss_mask, batch.reference_logprobs - logps, 0), **kl_keywords))
        kl_term = beta * (at_tokens(coefficient) * penalty).sum()
        loss = loss + kl_term
        gradient = gradient + torch.autograd.grad(kl_term, logps)[0]
        metrics["kl"] = (penalty.detach().sum(), loss_mask.sum())
    if entropy:
        bonus = entropy * (coefficient * entropy_bonus(logps, loss_mask, group_size=batch.rollout.group_size)).sum()
        gradient = gradient - torch.autograd.grad(bonus, logps)[0]
        metrics["entropy"] = (-at_tokens(logps.detach()).sum(), loss_mask.sum())
    # This process's share of the loss; `reduce_metrics` adds up the shares.
    metrics["loss"] = (loss.detach(), torch.ones_like(loss.detach()))
    return loss.detach(), metrics, gradient
