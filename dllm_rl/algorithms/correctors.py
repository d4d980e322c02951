"""Correctors of the training-inference mismatch: importance weights, a loss mask and, optionally, an objective.

All functions read the GLOBAL batch and log_mismatch = logp_old - logp_rollout per token, in nats. The mask marks the
tokens to correct: those of rows whose advantage is not zero, or of all rows if the recipe has a KL term or an entropy
bonus. Batch statistics, such as the lambda of AIS, and a corrector's metrics cover only these tokens. The learner
therefore logs a corrector's `rollout_corr/NAME` as `trained/NAME`; its own `rollout_corr/*` metrics cover all rows.

Weights are detached, and 1 outside the mask. They multiply the surrogate, but not the KL term. A token with a
non-finite log_mismatch is removed from the loss mask. docs/methods.md explains the tags [paper], [digest] and [ours].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.algorithms.losses import MAX_LOG, sequence_mean, trust_band
from dllm_rl.bounds import Bound, bounded, check_bound
from dllm_rl.members import configurable, function_of

Level = Literal["token", "sequence"]
Pool = Literal["product", "geometric"]
Outside = Literal["zero", "drop"]


@dataclass(frozen=True)
class TokenStats:
    """Input of a corrector's `weight_fn`: statistics of the global batch's tokens.

    Every process has the same copy, on the CPU.

    Args:
        log_mismatch: logp_old - logp_rollout, in nats; 0 outside the mask.
        advantages: Advantage of each row.
        mask: Tokens to correct.
        old_logprobs: Log-probs under the learner at the start of the update, in nats.
        rollout_logprobs: Log-probs under the policy that sampled, in nats.
        unmask_step: Denoising step that wrote the token (autoregressive: its position); -1 outside the completion.
        entropy: Entropy of the learner's distribution at the token, in nats. None (default) unless the
            corrector sets `needs_entropy`, which costs one more forward per view.
    """

    log_mismatch: Float[Tensor, "B T"]
    advantages: Float[Tensor, " B"]
    mask: Bool[Tensor, "B T"]
    old_logprobs: Float[Tensor, "B T"]
    rollout_logprobs: Float[Tensor, "B T"]
    unmask_step: Int[Tensor, "B T"]
    entropy: Float[Tensor, "B T"] | None = None

    def among(self, mask: Bool[Tensor, "B T"]) -> "TokenStats":
        """Return the statistics restricted to `mask`; log_mismatch is 0 outside it."""
        return replace(self, mask=mask, log_mismatch=torch.where(mask, self.log_mismatch, 0))


class TokenWeights(NamedTuple):
    """Result of a corrector for each token.

    Attributes:
        importance_weights: Detached weights; 1 outside the mask.
        loss_mask: Tokens that stay in the loss.
        metrics: Metrics to log, by name.
    """

    importance_weights: Float[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]
    metrics: dict[str, float]


WeightFn = Callable[[TokenStats], TokenWeights]


def unit_weights(stats: TokenStats) -> TokenWeights:
    """Give every token the weight 1. Tokens with a non-finite ratio are removed from the loss."""
    _, finite_mask, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
    return TokenWeights(torch.ones_like(stats.log_mismatch).detach(), finite_mask, metrics)


def drop_nonfinite(
    log_mismatch: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"], dict[str, float]]:
    """Remove tokens whose log_mismatch is not finite from the mask.

    Call it first in a custom `weight_fn`.

    Returns:
        log_mismatch, detached, and 0 where it is not finite or outside the mask; the mask of the finite tokens; the
        metric rollout_corr/nonfinite_fraction, the share of the mask that was removed.
    """
    finite_mask = mask & log_mismatch.isfinite()
    removed_fraction = 1 - finite_mask.sum().item() / mask.sum().item() if mask.any() else 0.0
    metrics = {"rollout_corr/nonfinite_fraction": removed_fraction}
    return torch.where(finite_mask, log_mismatch.detach(), 0), finite_mask, metrics


def pooled_log_ratio(
    log_mismatch: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, level: str, pool: str
) -> Float[Tensor, "B T"]:
    """Return log-ratios of tokens or sequences, in nats, at every token of the mask; 0 outside the mask.

    With level="sequence", every token gets the sum (pool="product") or the mean ("geometric") over its row.
    """
    log_w = torch.where(mask, log_mismatch, 0)
    if level == "token":
        return log_w
    if level != "sequence":
        raise ValueError(f"level={level!r} must be 'token' or 'sequence'")
    total = log_w.double().sum(-1, keepdim=True)  # fp64: sums over long rows are rounded in fp32
    if pool == "geometric":
        total = total / mask.sum(-1, keepdim=True).clamp(min=1)
    elif pool != "product":
        raise ValueError(f"pool={pool!r} must be 'product' or 'geometric'")
    return torch.where(mask, total.clamp(-MAX_LOG, MAX_LOG).to(log_w.dtype), 0)


def pooled_ratio(
    log_mismatch: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, level: str, pool: str
) -> Float[Tensor, "B T"]:
    """Return exp of `pooled_log_ratio`, clamped to +-MAX_LOG before exp."""
    return pooled_log_ratio(log_mismatch, mask, level=level, pool=pool).clamp(-MAX_LOG, MAX_LOG).exp()


def _fraction(event: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> float:
    """Return the share of the mask's tokens at which `event` is true; 0 if the mask is empty."""
    return (event & mask).sum().item() / max(mask.sum().item(), 1)


@bounded(cap=Bound(at_least=1))
def truncated_weights(
    stats: TokenStats,
    *,
    cap: float = 2.0,
    level: str = "token",
    pool: str = "product",
) -> TokenWeights:
    """Compute truncated importance weights, w = min(rho, cap).

    rho_t = exp(log_mismatch_t) per token; per sequence, exp of the sum (`product`) or of the mean (`geometric`). `tis`
    explains the keywords.

    Source: TIS, fengyao.notion.site/off-policy-rl [paper].
    """
    log_mismatch, finite_mask, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
    weights = pooled_ratio(log_mismatch, finite_mask, level=level, pool=pool)
    # Compared before the clamp: a weight equal to cap is not capped.
    metrics["tis/capped_fraction"] = _fraction(weights > cap, finite_mask)
    return TokenWeights(torch.where(finite_mask, weights.clamp(max=cap), 1), finite_mask, metrics)


@bounded(min_ratio=Bound(at_least=0, at_most=1), max_ratio=Bound(at_least=1))
def masked_weights(
    stats: TokenStats,
    *,
    min_ratio: float = 0.5,
    max_ratio: float = 5.0,
    level: str = "token",
    pool: str = "product",
    outside: str = "zero",
) -> TokenWeights:
    """Compute masked importance weights: w = rho inside [min_ratio, max_ratio], and 0 outside.

    rho is the ratio of `truncated_weights`. `mis` explains the keywords; its max_ratio is 2 by default, while the
    default here is IcePop's, 5.

    Sources: MIS, "When Speed Kills Stability" (Liu et al. 2025); IcePop, arXiv 2510.18855 [paper].
    """
    if outside not in ("zero", "drop"):
        raise ValueError(f"outside={outside!r} must be 'zero' or 'drop'")
    log_mismatch, finite_mask, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
    weights = pooled_ratio(log_mismatch, finite_mask, level=level, pool=pool)
    out_of_range = (weights < min_ratio) | (weights > max_ratio)
    # verl's name: is = importance sampling, oob = out of bounds.
    metrics["rollout_corr/rollout_is_oob_ratio"] = _fraction(out_of_range, finite_mask)
    weights = torch.where(finite_mask, weights.masked_fill(out_of_range, 0), 1)
    loss_mask = finite_mask & ~out_of_range if outside == "drop" else finite_mask
    return TokenWeights(weights, loss_mask, metrics)


@bounded(threshold=Bound(at_least=0))
def rejection(
    stats: TokenStats,
    *,
    level: str = "sequence",
    statistic: str = "k3",
    threshold: float = 0.001,
    pool: str = "mean",
) -> TokenWeights:
    """Remove tokens or sequences with a large mismatch from the loss mask, and thereby from the loss's denominator.

    Weights stay 1. With d = log_mismatch clamped to +-20: k1 = -d, k2 = d^2/2, k3 = exp(d) - 1 - d, in nats. A token
    is removed if its |k| exceeds the threshold; a sequence is removed if its pooled |k| does. `reject` explains the
    keywords.

    Sources: the names are verl's. The default threshold is VeXact's [digest], for bf16 kernels: it rejects a sequence
    whose mean k3 exceeds 0.001. Low-bit rollouts need a larger threshold.
    """
    d, finite_mask, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
    d = d.clamp(-MAX_LOG, MAX_LOG)  # exp(d) overflows fp32 at 89
    match statistic:
        case "k1":
            k = -d
        case "k2":
            k = d.square() / 2
        case "k3":
            k = torch.expm1(d) - d  # exp(d) - 1 would cancel near 0, where nearly all tokens are
        case _:
            raise ValueError(f"statistic={statistic!r} must be 'k1', 'k2' or 'k3'")
    if level == "sequence":
        match pool:
            case "mean":
                k = k.sum(-1, keepdim=True) / finite_mask.sum(-1, keepdim=True).clamp(min=1)
            case "sum":
                k = k.sum(-1, keepdim=True)
            case "max":
                k = k.abs().amax(-1, keepdim=True)
            case _:
                raise ValueError(f"pool={pool!r} must be 'mean', 'sum' or 'max'")
    elif level != "token":
        raise ValueError(f"level={level!r} must be 'token' or 'sequence'")
    loss_mask = finite_mask & (k.abs() <= threshold)
    rejected = finite_mask & ~loss_mask
    num_rows = finite_mask.any(-1).sum().item()
    # verl's names: rs = rejection sampling.
    metrics["rollout_corr/rollout_rs_masked_fraction"] = _fraction(rejected, finite_mask)
    metrics["rollout_corr/rollout_rs_seq_masked_fraction"] = rejected.any(-1).sum().item() / max(num_rows, 1)
    return TokenWeights(torch.ones_like(d), loss_mask, metrics)


@bounded(tau=Bound(above=0))
def ais_lambda(reliability: float, divergence: float, variation: float, *, tau: float) -> float:
    """Compute lambda = 1 - ESS * tau/(D + tau) * 1/(1 + CV): 0 on-policy, and closer to 1 the larger the mismatch.

    The formula is [ours]: we had only a summary of the paper, without a formula.

    Args:
        reliability: Effective sample size of the sequence weights, divided by the number of sequences, in (0, 1]
            (metric `ais/rho`).
        divergence: D, the mean |log_mismatch|, in nats.
        variation: CV, the coefficient of variation of the token weights.
        tau: Value of D at which the factor tau/(D + tau) is 1/2, in nats, above 0.
    """
    return 1 - reliability * (tau / (divergence + tau)) * (1 / (1 + variation))


@bounded(cap=Bound(at_least=1), tau=Bound(above=0))
def adaptive_weights(
    stats: TokenStats,
    *,
    cap: float = 2.0,
    tau: float = 0.05,
    lambda_fn: Callable[..., float] = ais_lambda,
    pool: str = "product",
    level: str = "token",
) -> TokenWeights:
    """Mix the uncorrected gradient and the TIS gradient by one lambda in [0, 1] per batch.

        m_t = 1 + lambda (min(w_t, cap) - 1),   w_t = exp(log_mismatch_t)
        ESS = (sum w)^2 / (B sum w^2) over SEQUENCE weights: reliability [digest]; B counts rows that have a token
        D   = mean |log_mismatch| over tokens, nats: divergence severity [digest]
        CV  = std(w) / mean(w) over TOKEN weights: variance amplification [digest]

    All three statistics cover the corrected rows. Truncation is [digest], cap 2 is [ours]. No gradient goes through
    lambda or w. `ais` explains the keywords.

    Source: AIS, arXiv 2605.13907 [digest].
    """
    log_mismatch, finite_mask, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
    log_w = log_mismatch.clamp(-MAX_LOG, MAX_LOG)
    reliability = 1.0  # without tokens, lambda has its on-policy value
    divergence = 0.0
    variation = 0.0
    if finite_mask.any():
        w = log_w[finite_mask].double().exp()
        row_log_w = pooled_log_ratio(log_mismatch, finite_mask, level="sequence", pool=pool).double()
        # One number per row that has a token.
        row_log_w = torch.where(finite_mask, row_log_w, -torch.inf).amax(-1)[finite_mask.any(-1)]
        row_w = (row_log_w - row_log_w.max()).exp()  # this scaling does not change ESS, and prevents overflow
        reliability = min(1.0, (row_w.sum().square() / (len(row_w) * row_w.square().sum())).item())
        divergence = log_mismatch[finite_mask].double().abs().mean().item()
        variation = (w.std(correction=0) / w.mean()).item()
    capped = pooled_ratio(log_mismatch, finite_mask, level=level, pool=pool).clamp(max=cap)
    lam = min(1.0, max(0.0, lambda_fn(reliability, divergence, variation, tau=tau)))
    weights = torch.lerp(torch.ones_like(capped), capped, lam)  # exact if lambda is 0 or 1
    metrics |= {"ais/rho": reliability, "ais/D": divergence, "ais/CV": variation, "ais/lambda": lam}
    return TokenWeights(torch.where(finite_mask, weights, 1), finite_mask, metrics)


@bounded(max_weight=Bound(at_least=1))
def band_weights(stats: TokenStats, *, max_weight: float = 2.0) -> TokenWeights:
    """Compute TBPO's weight exp(clamp(mean_t log_mismatch, -log c, log c)), one per row.

    c is `max_weight`: the largest weight, and the reciprocal of the smallest. `tbpo` explains the keyword.

    Source: QaRL, arXiv 2604.07853 [digest]; the clamp in log space is [ours].
    """
    log_mismatch, finite_mask, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
    log_w = pooled_log_ratio(log_mismatch, finite_mask, level="sequence", pool="geometric")
    max_log_w = math.log(max_weight)
    metrics["tbpo/capped_fraction"] = _fraction(log_w.abs() > max_log_w, finite_mask)
    return TokenWeights(log_w.clamp(-max_log_w, max_log_w).exp(), finite_mask, metrics)


def combine_weights(stats: TokenStats, *, weight_fns: tuple[WeightFn, ...]) -> TokenWeights:
    """Multiply the weights of several functions, and intersect their loss masks.

    If two functions log different values of one metric, the later value is logged as NAME_K, where K is the function's
    position, from 1.
    """
    weights = torch.ones_like(stats.log_mismatch).detach()
    loss_mask = stats.mask
    metrics: dict[str, float] = {}
    for position, weight_fn in enumerate(weight_fns, start=1):
        result = weight_fn(stats)  # each function sees the full mask, so that their order does not matter
        weights = weights * result.importance_weights
        loss_mask = loss_mask & result.loss_mask
        for name, value in result.metrics.items():
            is_same = metrics.get(name, value) == value
            metrics[name if is_same else f"{name}_{position}"] = value
    return TokenWeights(weights, loss_mask, metrics)


Surrogate = Callable[..., Tensor]  # (log_ratio, advantages, mask, any of losses.SURROGATE_INPUTS)
LossReduction = Callable[..., Tensor]  # (mask, *, num_tokens, num_sequences) -> coefficients


@dataclass(frozen=True)
class Corrector:
    """A correction of the training-inference mismatch: weights, a loss mask and, optionally, an objective.

    `no_correction`, `tis` and the functions below each make one. For a custom corrector, write a function that returns
    a Corrector and decorate it with `members.configurable`; its keywords are then options of the command line.

    Args:
        weight_fn: Function from the global batch's `TokenStats` to `TokenWeights`. Default: unit weights.
        loss: Objective (see `algorithms.losses`) that replaces the recipe's `loss`. None (default): the recipe's.
        align_forward: Whether the learner's forward computes with the rollout's quantized operands. Default: False.
        loss_reduction: Averaging of tokens that is used if the recipe's `loss_reduction` is None. Default: None.
        needs_entropy: Whether `weight_fn` reads `TokenStats.entropy`. Default: False.

    Attributes:
        factory: Function that made the corrector, with its arguments, so that a command line can change a keyword. Set
            by `members.configurable`.

    Raises:
        ValueError: An argument bound by `functools.partial` in weight_fn, loss or loss_reduction is out of its range.
    """

    weight_fn: WeightFn = unit_weights
    loss: Surrogate | None = None
    align_forward: bool = False
    loss_reduction: LossReduction | None = None
    needs_entropy: bool = False
    factory: partial | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:  # raises when the corrector is made, not at the first batch
        check_bound((self.weight_fn, self.loss, self.loss_reduction))

    @property
    def has_weight_fn(self) -> bool:
        """Whether `weight_fn` was set, so that it may change weights or the loss mask."""
        return function_of(self.weight_fn) is not unit_weights


@configurable
def no_correction() -> Corrector:
    """Make the corrector without a correction: every weight is 1.

    Use it if the rollout has the learner's precision, or as a baseline. Tokens with a non-finite ratio are still
    removed from the loss.
    """
    return Corrector()


@configurable
def tis(*, cap: float = 2.0, level: Level = "token", pool: Pool = "product") -> Corrector:
    """Make the truncated importance sampling corrector; see `truncated_weights`.

    Use it where docs/mismatch.md advises a correction: every token stays in the loss, and the cap bounds the
    variance.

    Args:
        cap: Largest weight, at least 1. Default: 2.
        level: Whether each "token" (default) or each "sequence" has one ratio.
        pool: How token ratios become the ratio of a sequence: "product" (default) or "geometric" (mean).

    Returns:
        A corrector. It logs tis/capped_fraction.

    Raises:
        ValueError: cap is below 1. An unknown level or pool raises at the first batch.
    """
    return Corrector(weight_fn=partial(truncated_weights, cap=cap, level=level, pool=pool))


@configurable
def mis(
    *,
    min_ratio: float = 0.5,
    max_ratio: float = 2.0,
    level: Level = "token",
    pool: Pool = "product",
    outside: Outside = "zero",
) -> Corrector:
    """Make the masked importance sampling corrector; see `masked_weights`.

    Use it instead of `tis` if tokens with an extreme ratio should not contribute a gradient.

    Args:
        min_ratio: Smallest ratio that contributes, in [0, 1]. Default: 0.5.
        max_ratio: Largest ratio that contributes, at least 1. Default: 2.
        level: Whether each "token" (default) or each "sequence" has one ratio.
        pool: How token ratios become the ratio of a sequence: "product" (default) or "geometric" (mean).
        outside: Treatment of tokens outside the range: "zero" (default; weight 0, counted in the loss's denominator) or
            "drop" (not counted, as in verl's rejection).

    Returns:
        A corrector. It logs rollout_corr/rollout_is_oob_ratio, the share outside the range.

    Raises:
        ValueError: A ratio is out of its range. An unknown level, pool or outside raises at the first batch.
    """
    weight_fn = partial(
        masked_weights, min_ratio=min_ratio, max_ratio=max_ratio, level=level, pool=pool, outside=outside
    )
    return Corrector(weight_fn=weight_fn)


@configurable
def icepop(*, min_ratio: float = 0.5, max_ratio: float = 5.0, outside: Outside = "zero") -> Corrector:
    """Make the IcePop corrector: masked importance sampling per token, from 0.5 to 5 [paper].

    It is `mis` with another range and no sequence level.

    Args:
        min_ratio: Smallest ratio that contributes, in [0, 1]. Default: 0.5.
        max_ratio: Largest ratio that contributes, at least 1. Default: 5.
        outside: Treatment of tokens outside the range: "zero" (default; weight 0, counted in the loss's denominator) or
            "drop" (not counted).
    """
    return mis(min_ratio=min_ratio, max_ratio=max_ratio, level="token", outside=outside)


@configurable
def reject(
    *,
    level: Level = "sequence",
    statistic: Literal["k1", "k2", "k3"] = "k3",
    threshold: float = 0.001,
    pool: Literal["mean", "sum", "max"] = "mean",
) -> Corrector:
    """Make the corrector that rejects tokens or sequences with a large mismatch; see `rejection`.

    Use it by itself, or combine it with importance weights by `compose`.

    Args:
        level: Unit that is rejected: "token" or "sequence" (default).
        statistic: Estimator of the mismatch: "k1", "k2" or "k3" (default).
        threshold: Largest statistic that is accepted, in nats, at least 0. Default: 0.001.
        pool: How token statistics become the statistic of a sequence: "mean" (default), "sum" or "max".

    Returns:
        A corrector. It logs rollout_corr/rollout_rs_masked_fraction and rollout_rs_seq_masked_fraction.

    Raises:
        ValueError: threshold is negative. An unknown level, statistic or pool raises at the first batch.
    """
    return Corrector(weight_fn=partial(rejection, level=level, statistic=statistic, threshold=threshold, pool=pool))


@configurable
def ais(
    *,
    cap: float = 2.0,
    tau: float = 0.05,
    lambda_fn: Callable[..., float] = ais_lambda,
    pool: Pool = "product",
    level: Level = "token",
) -> Corrector:
    """Make the adaptive importance sampling corrector; see `adaptive_weights`.

    Use it if the mismatch changes during a run: the weights lie between 1 and the weights of `tis`, depending on the
    mismatch of the batch.

    Args:
        cap: Largest weight, at least 1. Default: 2.
        tau: Scale of the mean |log_mismatch|, in nats, above 0: at this value the factor tau/(D + tau) is 1/2. Default:
            0.05.
        lambda_fn: Function (ESS, D, CV, *, tau) -> lambda; a result outside [0, 1] is clamped. Default: `ais_lambda`.
        pool: How token ratios become the ratio of a sequence, in ESS and in sequence weights: "product" (default) or
            "geometric" (mean).
        level: Whether each "token" (default) or each "sequence" has one weight.

    Returns:
        A corrector. It logs ais/rho, ais/D, ais/CV and ais/lambda.

    Raises:
        ValueError: cap or tau is out of its range. An unknown level or pool raises at the first batch.

    Source: AIS, arXiv 2605.13907 [digest].
    """
    weight_fn = partial(adaptive_weights, cap=cap, tau=tau, lambda_fn=lambda_fn, pool=pool, level=level)
    return Corrector(weight_fn=weight_fn)


@configurable
def tbpo(
    *, eps_high: float = 4e-4, neg_low: float = 3e-4, neg_high: float = 7e-4, max_weight: float = 2.0
) -> Corrector:
    """Make the trust-band policy optimization corrector: `band_weights`, `trust_band` and `sequence_mean` [digest].

    The defaults fit long autoregressive responses [digest]; diffusion likelihoods move more and need wider bands.

    Args:
        eps_high: Clamp the ratio (current / old) at 1 + eps_high if the advantage is not negative. Default: 4e-4.
        neg_low: Clamp the ratio from below at 1 - neg_low if the advantage is negative. Default: 3e-4.
        neg_high: Clamp the ratio from above at 1 + neg_high if the advantage is negative. Default: 7e-4.
        max_weight: Largest weight, and the reciprocal of the smallest; at least 1. Default: 2.

    Returns:
        A corrector with an objective and a reduction. It logs tbpo/capped_fraction.

    Raises:
        ValueError: An argument is out of its range.

    Source: QaRL, arXiv 2604.07853 [digest].
    """
    return Corrector(
        weight_fn=partial(band_weights, max_weight=max_weight),
        loss=partial(trust_band, eps_high=eps_high, neg_low=neg_low, neg_high=neg_high),
        loss_reduction=sequence_mean,
    )


@configurable
def aligned() -> Corrector:
    """Make the corrector that aligns the learner's forward: it computes with the rollout's quantized operands.

    Use it to remove the mismatch instead of correcting it. It has no importance weights; `compose` can add them.
    """
    return Corrector(align_forward=True)


@configurable
def qarl(
    *, eps_high: float = 4e-4, neg_low: float = 3e-4, neg_high: float = 7e-4, max_weight: float = 2.0
) -> Corrector:
    """Make the QaRL corrector: `tbpo` with the aligned forward.

    Args:
        eps_high: Clamp the ratio (current / old) at 1 + eps_high if the advantage is not negative. Default: 4e-4.
        neg_low: Clamp the ratio from below at 1 - neg_low if the advantage is negative. Default: 3e-4.
        neg_high: Clamp the ratio from above at 1 + neg_high if the advantage is negative. Default: 7e-4.
        max_weight: Largest weight, and the reciprocal of the smallest; at least 1. Default: 2.

    Returns:
        A corrector with an objective and a reduction.

    Raises:
        ValueError: An argument is out of its range.

    Source: QaRL, arXiv 2604.07853 [digest].
    """
    return compose(tbpo(eps_high=eps_high, neg_low=neg_low, neg_high=neg_high, max_weight=max_weight), aligned())


@configurable
def compose(*parts: Corrector | WeightFn) -> Corrector:
    """Combine correctors or weight functions; see `combine_weights`.

    The learner's forward is aligned if any part aligns it. Example: compose(tis(cap=3.0), reject(threshold=0.1)).

    Args:
        *parts: Correctors, or functions `TokenStats` -> `TokenWeights`.

    Returns:
        One corrector.

    Raises:
        ValueError: Two parts have different objectives.
    """
    correctors = [part if isinstance(part, Corrector) else Corrector(weight_fn=part) for part in parts]
    with_loss = [corrector for corrector in correctors if corrector.loss is not None]
    if len({corrector.loss for corrector in with_loss}) > 1:
        raise ValueError(
            f"{len(with_loss)} parts have a loss, but only one may: pass the others as replace(part, loss=None)"
        )
    # The part with an objective also sets the reduction; reductions of parts without an objective are ignored.
    loss_source = with_loss[0] if with_loss else no_correction()
    weight_fns = tuple(corrector.weight_fn for corrector in correctors if corrector.has_weight_fn)
    if len(weight_fns) > 1:
        weight_fn: WeightFn = partial(combine_weights, weight_fns=weight_fns)
    else:
        weight_fn = weight_fns[0] if weight_fns else unit_weights
    return Corrector(
        weight_fn=weight_fn,
        loss=loss_source.loss,
        align_forward=any(corrector.align_forward for corrector in correctors),
        loss_reduction=loss_source.loss_reduction,
        needs_entropy=any(corrector.needs_entropy for corrector in correctors),
    )
