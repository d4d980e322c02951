"""Corrections of the training-inference mismatch, made of three parts that methods combine.

log_mismatch = logp_old - logp_rollout per token (nats), over the GLOBAL batch. The mask marks the corrected rows: those
with an advantage, or all rows with a KL term or an entropy bonus. Batch statistics (AIS's lambda) are of these rows; a
corrector's `rollout_corr/*` are logged as `trained/*`, next to those of all rows. Weights are detached, multiply the
surrogate before any KL term, and are 1 off the mask. A token with a non-finite log_mismatch leaves the keep mask.
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
    """What a corrector may read of the global batch's tokens. Every process has the same, on the host.

    Args:
        log_mismatch: Logp_old - logp_rollout, nats; 0 off the mask.
        mask: Tokens to correct.
        old_logprobs: Under the learner at the start of the update, nats.
        rollout_logprobs: Under the policy that sampled, nats.
        unmask_step: Denoising step that wrote the token (autoregressive: its place); -1 where none did.
        entropy: Of the learner's distribution that the token was drawn from, nats; None unless the corrector's
            `needs_entropy` asks for it, which takes one more forward per view.
    """

    log_mismatch: Float[Tensor, "B T"]
    advantages: Float[Tensor, " B"]
    mask: Bool[Tensor, "B T"]
    old_logprobs: Float[Tensor, "B T"]
    rollout_logprobs: Float[Tensor, "B T"]
    unmask_step: Int[Tensor, "B T"]
    entropy: Float[Tensor, "B T"] | None = None

    def among(self, mask: Bool[Tensor, "B T"]) -> "TokenStats":
        """The same of fewer tokens."""
        return replace(self, mask=mask, log_mismatch=torch.where(mask, self.log_mismatch, 0))


class TokenWeights(NamedTuple):
    """What a corrector says of the tokens: detached weights, 1 off the mask; which stay in the loss; metrics."""

    importance_weights: Float[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]
    metrics: dict[str, float]


WeightFn = Callable[[TokenStats], TokenWeights]


def unit_weights(stats: TokenStats) -> TokenWeights:
    """Every weight 1, every token with a finite ratio in the loss."""
    _, keep, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
    return TokenWeights(torch.ones_like(stats.log_mismatch).detach(), keep, metrics)


def drop_nonfinite(
    log_mismatch: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"], dict[str, float]]:
    """log_mismatch with 0 wherever it is not finite or not marked, the mask without such tokens, and their share."""
    keep = mask & log_mismatch.isfinite()
    lost = 1 - keep.sum().item() / mask.sum().item() if mask.any() else 0.0
    return torch.where(keep, log_mismatch.detach(), 0), keep, {"rollout_corr/nonfinite_fraction": lost}


def per_level(
    log_mismatch: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, level: str, pool: str
) -> Float[Tensor, "B T"]:
    """The log-ratio at token level, or the row's sum (`product`) or mean (`geometric`) over it; 0 off the mask."""
    log_w = torch.where(mask, log_mismatch, 0)
    if level == "token":
        return log_w
    if level != "sequence":
        raise ValueError(f"level={level!r} must be 'token' or 'sequence'")
    total = log_w.double().sum(-1, keepdim=True)  # fp64: sums over long rows round
    if pool == "geometric":
        total = total / mask.sum(-1, keepdim=True).clamp(min=1)
    elif pool != "product":
        raise ValueError(f"pool={pool!r} must be 'product' or 'geometric'")
    return torch.where(mask, total.clamp(-MAX_LOG, MAX_LOG).to(log_w.dtype), 0)


def ratios(
    log_mismatch: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, level: str, pool: str
) -> Float[Tensor, "B T"]:
    """Exp of `per_level`, whose logs stay within +-MAX_LOG."""
    return per_level(log_mismatch, mask, level=level, pool=pool).clamp(-MAX_LOG, MAX_LOG).exp()


def _fraction(event: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> float:
    """Share of the marked tokens at which `event` holds; 0 when none is marked."""
    return (event & mask).sum().item() / max(mask.sum().item(), 1)


@bounded(cap=Bound(at_least=1))
def truncated_weights(
    stats: TokenStats,
    *,
    cap: float = 2.0,
    level: str = "token",
    pool: str = "product",
) -> TokenWeights:
    """Truncated importance weights, w = min(rho, cap) [paper: TIS, fengyao.notion.site/off-policy-rl].

    rho_t = exp(log_mismatch_t) per token; per sequence exp of the sum (`product`) or the mean (`geometric`). `tis`
    explains the keywords.
    """
    log_mismatch, keep, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
    weights = ratios(log_mismatch, keep, level=level, pool=pool)
    metrics["tis/capped_fraction"] = _fraction(weights > cap, keep)  # of raw ratios: a weight at the cap is not capped
    return TokenWeights(torch.where(keep, weights.clamp(max=cap), 1), keep, metrics)


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
    """Masked importance weights, w = rho inside [low, high] and 0 outside [paper: MIS, "When Speed Kills Stability", by
    Liu et al. 2025; IcePop, arXiv 2510.18855]; rho as in `truncated_weights`. `mis` explains the keywords.
    """
    if outside not in ("zero", "drop"):
        raise ValueError(f"outside={outside!r} must be 'zero' or 'drop'")
    log_mismatch, keep, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
    weights = ratios(log_mismatch, keep, level=level, pool=pool)
    oob = (weights < min_ratio) | (weights > max_ratio)
    metrics["rollout_corr/rollout_is_oob_ratio"] = _fraction(oob, keep)
    weights = torch.where(keep, weights.masked_fill(oob, 0), 1)
    return TokenWeights(weights, keep & ~oob if outside == "drop" else keep, metrics)


@bounded(threshold=Bound(at_least=0))
def rejection(
    stats: TokenStats,
    *,
    level: str = "sequence",
    statistic: str = "k3",
    threshold: float = 0.001,
    pool: str = "mean",
) -> TokenWeights:
    """Drop what disagrees too much from the MASK, and so from the loss's denominator; weights stay 1.

    With d = log_mismatch clamped to +-20: k1 = -d, k2 = d^2/2, k3 = exp(d) - 1 - d, nats. |k| is compared, for a
    sequence after pooling. Sources: verl's names, VeXact's default (sequence mean of k3 above 0.001 fits bf16
    kernels; low-bit rollouts need more) [digest]. `reject` explains the keywords.
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
    keep = finite_mask & (k.abs() <= threshold)
    dropped = finite_mask & ~keep
    rows = finite_mask.any(-1).sum().item()
    metrics["rollout_corr/rollout_rs_masked_fraction"] = _fraction(dropped, finite_mask)
    metrics["rollout_corr/rollout_rs_seq_masked_fraction"] = dropped.any(-1).sum().item() / max(rows, 1)
    return TokenWeights(torch.ones_like(d), keep, metrics)


@bounded(tau=Bound(above=0))
def ais_lambda(reliability: float, divergence: float, variation: float, *, tau: float) -> float:
    """Lam = 1 - rho * tau/(D + tau) * 1/(1 + CV): 0 on-policy, towards 1 with the mismatch [ours: the digest of AIS
    that we read does not give the formula].
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
    """AIS (arXiv 2605.13907 [digest]): one lam in [0, 1] for the batch mixes the uncorrected gradient and the TIS one.
        m_t = 1 + lam (min(w_t, cap) - 1),   w_t = exp(log_mismatch_t)
        rho = (sum w)^2 / (B sum w^2) over SEQUENCE weights: reliability [digest]; B counts rows that have a token
        D   = mean |log_mismatch| over tokens, nats: divergence severity [digest]
        CV  = std(w) / mean(w) over TOKEN weights: variance amplification [digest]
    All three are of the corrected rows. Truncation [digest], cap 2 [ours]. No gradient goes through lam or w. `ais`
    explains the keywords.
    """
    log_mismatch, keep, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
    log_w = log_mismatch.clamp(-MAX_LOG, MAX_LOG)
    reliability = 1.0  # without a token lam is what it is on-policy
    divergence = 0.0
    variation = 0.0
    if keep.any():
        w = log_w[keep].double().exp()
        rows = per_level(log_mismatch, keep, level="sequence", pool=pool).double()
        log_rows = torch.where(keep, rows, -torch.inf).amax(-1)[keep.any(-1)]
        scaled = (log_rows - log_rows.max()).exp()  # rho does not change with the scale, and no square overflows
        reliability = min(1.0, (scaled.sum().square() / (len(scaled) * scaled.square().sum())).item())
        divergence = log_mismatch[keep].double().abs().mean().item()
        variation = (w.std(correction=0) / w.mean()).item()
    capped = ratios(log_mismatch, keep, level=level, pool=pool).clamp(max=cap)
    lam = min(1.0, max(0.0, lambda_fn(reliability, divergence, variation, tau=tau)))
    weights = torch.lerp(torch.ones_like(capped), capped, lam)  # exact at lam = 0, and at lam = 1
    metrics |= {"ais/rho": reliability, "ais/D": divergence, "ais/CV": variation, "ais/lambda": lam}
    return TokenWeights(torch.where(keep, weights, 1), keep, metrics)


@bounded(max_weight=Bound(at_least=1))
def band_weights(stats: TokenStats, *, max_weight: float = 2.0) -> TokenWeights:
    """TBPO's weight exp(clamp(mean_t log_mismatch, -log c, log c)), one per row (QaRL, arXiv 2604.07853 [digest]; clamp
    in log space [ours]). c is the largest weight, and one over the smallest.
    """
    log_mismatch, keep, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
    log_w = per_level(log_mismatch, keep, level="sequence", pool="geometric")
    bound = math.log(max_weight)
    metrics["tbpo/capped_fraction"] = _fraction(log_w.abs() > bound, keep)
    return TokenWeights(log_w.clamp(-bound, bound).exp(), keep, metrics)


def combine_weights(stats: TokenStats, *, weight_fns: tuple[WeightFn, ...]) -> TokenWeights:
    """The product of the weights and the intersection of the loss masks. A metric that two parts log with different
    values gets the part's number as a suffix.
    """
    weights = torch.ones_like(stats.log_mismatch).detach()
    keep = stats.mask
    metrics: dict[str, float] = {}
    for i, weight_fn in enumerate(weight_fns, start=1):
        part = weight_fn(stats)  # of the whole mask, so that their order does not matter
        weights = weights * part.importance_weights
        keep = keep & part.loss_mask
        for name, value in part.metrics.items():
            metrics[name if metrics.get(name, value) == value else f"{name}_{i}"] = value
    return TokenWeights(weights, keep, metrics)


Surrogate = Callable[..., Tensor]  # (log_ratio, advantages, mask, further ones of losses.SURROGATE_INPUTS)
LossReduction = Callable[..., Tensor]  # (mask, *, num_tokens, num_sequences) -> coefficients


@dataclass(frozen=True)
class Corrector:
    """Args:
        weight_fn: `TokenStats` of the global batch -> `TokenWeights`.
        needs_entropy: Weight_fn reads `TokenStats.entropy`.
        align_forward: The learner's forward runs through the rollout's quantised operands.
        loss: The objective (see `algorithms.losses`) of a method that brings one; None: the recipe's `loss`.
        loss_reduction: How that method averages tokens, where the recipe names no function.
        factory: The function below with its arguments, so that a command line can change a keyword.

    `no_correction`, `tis` and the others below make one. A method of one's own is a function under
    `members.configurable` that returns a Corrector; its keywords are then options, too.
    """

    weight_fn: WeightFn = unit_weights
    loss: Surrogate | None = None
    align_forward: bool = False
    loss_reduction: LossReduction | None = None
    needs_entropy: bool = False
    factory: partial | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:  # a constant is refused here, before a run, and not at the first batch
        check_bound((self.weight_fn, self.loss, self.loss_reduction))

    @property
    def weighs(self) -> bool:
        """Whether it has weights: False where every weight is 1 and every token stays."""
        return function_of(self.weight_fn) is not unit_weights


@configurable
def no_correction() -> Corrector:
    """No correction: weight 1 everywhere."""
    return Corrector()


@configurable
def tis(*, cap: float = 2.0, level: Level = "token", pool: Pool = "product") -> Corrector:
    """Truncated importance sampling; see `truncated_weights`.

    Args:
        cap: Largest weight, at least 1.
        level: What has a ratio of its own: token or sequence.
        pool: Of a sequence's tokens: product or geometric.
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
    """Masked importance sampling; see `masked_weights`.

    Args:
        min_ratio: The range of ratios that count.
        max_ratio: The range of ratios that count.
        level: What has a ratio of its own: token or sequence.
        pool: Of a sequence's tokens: product or geometric.
        outside: Tokens outside the range: zero (weight 0, counted in the loss's denominator) or drop (not counted, as
            in verl's rejection).
    """
    bound = partial(masked_weights, min_ratio=min_ratio, max_ratio=max_ratio, level=level, pool=pool, outside=outside)
    return Corrector(weight_fn=bound)


@configurable
def icepop(*, min_ratio: float = 0.5, max_ratio: float = 5.0, outside: Outside = "zero") -> Corrector:
    """IcePop: masked importance sampling per token, from 0.5 to 5 [paper].

    Args:
        min_ratio: The range of ratios that count.
        max_ratio: The range of ratios that count.
        outside: Tokens outside the range: zero (weight 0, counted in the loss's denominator) or drop (not counted).
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
    """Rejection of tokens or sequences; see `rejection`.

    Args:
        level: What is dropped: token or sequence.
        statistic: K1, k2 or k3.
        threshold: Its largest value that is kept, nats.
        pool: Of a sequence's tokens: mean, sum or max.
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
    """Adaptive importance sampling; see `adaptive_weights`.

    Args:
        cap: Largest weight, at least 1.
        tau: Nats of mean |log_mismatch| at which half the trust is gone, above 0.
        lambda_fn: Function (rho, D, CV, *, tau) -> lam; a result outside [0, 1] is clamped to it.
        pool: Of a sequence's tokens, in rho and in weights of sequences: product or geometric.
        level: Of the weights that are mixed: token, or sequence.
    """
    bound = partial(adaptive_weights, cap=cap, tau=tau, lambda_fn=lambda_fn, pool=pool, level=level)
    return Corrector(weight_fn=bound)


@configurable
def tbpo(
    *, eps_high: float = 4e-4, neg_low: float = 3e-4, neg_high: float = 7e-4, max_weight: float = 2.0
) -> Corrector:
    """Trust-band policy optimisation: `band_weights` with `trust_band`, the mean over sequences [digest].

    The defaults fit long autoregressive responses [digest]; diffusion likelihoods move more and need wider bands.

    Args:
        eps_high: How far the ratio may rise above 1 where the advantage is not negative.
        neg_low: How far it may fall below 1, and rise above it, where the advantage is negative.
        neg_high: How far it may fall below 1, and rise above it, where the advantage is negative.
        max_weight: The largest weight, and one over the smallest; at least 1.
    """
    surrogate = partial(trust_band, eps_high=eps_high, neg_low=neg_low, neg_high=neg_high)
    return Corrector(
        weight_fn=partial(band_weights, max_weight=max_weight), loss=surrogate, loss_reduction=sequence_mean
    )


@configurable
def aligned() -> Corrector:
    """No weights: the learner's forward runs through the rollout's quantised operands."""
    return Corrector(align_forward=True)


@configurable
def qarl(
    *, eps_high: float = 4e-4, neg_low: float = 3e-4, neg_high: float = 7e-4, max_weight: float = 2.0
) -> Corrector:
    """QaRL (arXiv 2604.07853 [digest]): `tbpo` with the aligned forward.

    Args:
        eps_high: How far the ratio may rise above 1 where the advantage is not negative.
        neg_low: How far it may fall below 1, and rise above it, where the advantage is negative.
        neg_high: How far it may fall below 1, and rise above it, where the advantage is negative.
        max_weight: The largest weight, and one over the smallest; at least 1.
    """
    return compose(tbpo(eps_high=eps_high, neg_low=neg_low, neg_high=neg_high, max_weight=max_weight), aligned())


@configurable
def compose(*parts: Corrector | WeightFn) -> Corrector:
    """Combine correctors or bare weight functions: see `combine_weights`. The forward is aligned if any part's is.

    Raises ValueError when two parts bring different objectives. Example: compose(tis(cap=3.0), reject(threshold=0.1))
    """
    correctors = [part if isinstance(part, Corrector) else Corrector(weight_fn=part) for part in parts]
    brought = [part for part in correctors if part.loss is not None] or [
        no_correction()
    ]  # an objective and its reduction
    if len({part.loss for part in brought}) > 1:
        raise ValueError(f"{len(brought)} parts bring an objective; keep one: replace(part, loss=None)")
    fns = tuple(part.weight_fn for part in correctors if part.weighs)
    combined = partial(combine_weights, weight_fns=fns) if fns else unit_weights
    return Corrector(
        weight_fn=fns[0] if len(fns) == 1 else combined,
        loss=brought[0].loss,
        align_forward=any(part.align_forward for part in correctors),
        loss_reduction=brought[0].loss_reduction,
        needs_entropy=any(part.needs_entropy for part in correctors),
    )
