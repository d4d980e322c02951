"""Correctors of the training-inference mismatch: importance weights, a loss mask and, optionally, an objective.

All functions read the GLOBAL batch and log_mismatch = logp_old - logp_rollout per token, in nats. The mask marks the
tokens to correct: those of groups whose advantages are not all zero, or of all rows if the recipe has a KL term, an
entropy bonus or advantages of tokens. Batch statistics, such as the lambda of AIS, and a corrector's metrics cover only
these tokens. The learner therefore logs a corrector's `rollout_corr/NAME` as `trained/NAME`; its own `rollout_corr/*`
metrics cover all rows.

Weights are detached, and 1 outside the mask. They multiply the surrogate, but not the KL term. A token with a
non-finite log_mismatch is removed from the loss mask. docs/papers.md explains the tags [paper], [digest] and [ours].
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.algorithms.losses import (
    MAX_LOG,
    WIDTH,
    Loss,
    LossReduction,
    SequenceMean,
    TrustBand,
    exp_ratio,
    mean_over_tokens,
)
from dllm_rl.records import Record, describe, option

Level = Literal["token", "sequence"]
Pool = Literal["product", "geometric"]
Outside = Literal["zero", "drop"]


@dataclass(frozen=True)
class TokenStats:
    """Input of a corrector's `weights`: statistics of the global batch's tokens.

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
        inverse_chances: 1 / the chance with which the token's denoising step was drawn. `mask` then has the drawn
            tokens alone, each of which stands for so many. None (default): nothing was drawn.
        state: What the corrector keeps from one call to the next: it may write JSON values into this dict, which is
            empty at first. A run's checkpoints store it, and a resume continues with it.
    """

    log_mismatch: Float[Tensor, "B T"]
    advantages: Float[Tensor, " B"]
    mask: Bool[Tensor, "B T"]
    old_logprobs: Float[Tensor, "B T"]
    rollout_logprobs: Float[Tensor, "B T"]
    unmask_step: Int[Tensor, "B T"]
    entropy: Float[Tensor, "B T"] | None = None
    inverse_chances: Float[Tensor, "B T"] | None = None
    state: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def among(self, mask: Bool[Tensor, "B T"]) -> "TokenStats":
        """Return the statistics restricted to `mask`; log_mismatch is 0 outside it."""
        return replace(self, mask=mask, log_mismatch=torch.where(mask, self.log_mismatch, 0))

    def copied(self) -> "TokenStats":
        """Return a copy, for a corrector that may write into its tensors. `state` is the same dict."""
        copies: dict[str, Any] = {name: x.clone() for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **copies)


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


def drop_nonfinite(
    log_mismatch: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"], dict[str, float]]:
    """Remove tokens whose log_mismatch is not finite from the mask.

    Call it first in the `weights` of a custom corrector.

    Returns:
        log_mismatch, detached, and 0 where it is not finite or outside the mask; the mask of the finite tokens; the
        metric rollout_corr/nonfinite_fraction, the share of the mask that was removed.
    """
    finite_mask = mask & log_mismatch.isfinite()
    removed_fraction = 1 - finite_mask.sum().item() / mask.sum().item() if mask.any() else 0.0
    metrics = {"rollout_corr/nonfinite_fraction": removed_fraction}
    return torch.where(finite_mask, log_mismatch.detach(), 0), finite_mask, metrics


def pooled_log_ratio(
    log_mismatch: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    level: str,
    pool: str,
    inverse_chances: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """Return log-ratios of tokens or sequences, in nats, at every token of the mask; 0 outside the mask.

    With level="sequence", every token gets the sum (pool="product") or the mean ("geometric") over its row. With
    `inverse_chances`, the mean is weighted by them; a sum over all tokens cannot be told from those of some steps.
    """
    log_w = torch.where(mask, log_mismatch, 0)
    if level == "token":
        return log_w
    if level != "sequence":
        raise ValueError(f"level={level!r} must be 'token' or 'sequence'")
    # fp64: sums over long rows are rounded in fp32
    if pool == "geometric":
        total = mean_over_tokens(log_w.double(), mask, inverse_chances)
    elif pool == "product":
        assert inverse_chances is None, "`Corrector.takes_drawn_steps` excludes products"
        total = log_w.double().sum(-1, keepdim=True)
    else:
        raise ValueError(f"pool={pool!r} must be 'product' or 'geometric'")
    return torch.where(mask, total.clamp(-MAX_LOG, MAX_LOG).to(log_w.dtype), 0)


def _fraction(event: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"], chances: Tensor | None = None) -> float:
    """Return the share of the mask's tokens at which `event` is true; 0 if the mask is empty. `chances`: the tokens'
    inverse chances.
    """
    weights = mask if chances is None else torch.where(mask, chances, 0)
    return torch.where(event, weights, 0).sum().item() / max(weights.sum().item(), 1)


class Corrector(Record):
    """A correction of the training-inference mismatch: weights, a loss mask and, optionally, an objective.

    Subclass it for a custom corrector: write its settings as fields and override `weights`; `check_corrector` tests it.
    The subclass is then an option of the command line, as `--corrector my_module.MyCorrector`. Where a corrector is
    expected, a plain function from `TokenStats` to `TokenWeights` is one too. What it keeps from step to step is in
    `TokenStats.state`.

    The properties may be overridden, by a class attribute or a field, as in `TBPO` and `FunctionCorrector`.
    """

    @property
    def loss(self) -> Loss | None:
        """Objective (see `algorithms.losses`) that replaces the recipe's `loss`. None: the recipe's."""
        return None

    @property
    def loss_reduction(self) -> LossReduction | None:
        """Averaging of tokens that is used if the recipe's `loss_reduction` is None."""
        return None

    @property
    def align_forward(self) -> bool:
        """Whether the learner's forward computes with the rollout's quantized operands."""
        return False

    @property
    def needs_entropy(self) -> bool:
        """Whether `weights` reads `TokenStats.entropy`."""
        return False

    def weights(self, stats: TokenStats) -> TokenWeights:
        """Compute the weights and the loss mask of the global batch. Default: weight 1 for every token.

        Tokens with a non-finite ratio are removed from the loss.
        """
        _, finite_mask, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
        return TokenWeights(torch.ones_like(stats.log_mismatch).detach(), finite_mask, metrics)

    @property
    def has_weights(self) -> bool:
        """Whether the corrector may change weights or the loss mask."""
        return type(self).weights is not Corrector.weights

    @property
    def takes_drawn_steps(self) -> bool:
        """Whether `weights` is right where only some of a row's tokens are scored (`Trajectory.variance_growth`).

        Default: whether it treats each token by itself, which is tested on numbers, and drops none, because nobody
        knows which of the other tokens it would drop. A corrector that weights its means by
        `TokenStats.inverse_chances` overrides it.
        """
        return _is_per_token(self)

    @property
    def only_masks(self) -> bool:
        """Whether every weight is 1, so that only the loss mask may change."""
        return not self.has_weights

    @classmethod
    def convert(cls, value: Any) -> "Corrector | None":
        return FunctionCorrector(function=value) if callable(value) and not isinstance(value, Record) else None


def _is_per_token(corrector: Corrector) -> bool:
    """Return whether a token alone gets the weight that it gets among others, and none is dropped."""
    log_mismatch = torch.linspace(-2.5, 2.0, 12, dtype=torch.float64).view(4, 3)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    steps, old, entropy = torch.arange(3).expand(4, 3), log_mismatch - 3, log_mismatch + 3
    stats = [torch.ones_like(steps, dtype=torch.bool), old, old - log_mismatch, steps, entropy]
    together = corrector.weights(TokenStats(log_mismatch, advantages, *stats))

    def alone(row: int, token: int) -> TokenWeights:
        at, here = slice(token, token + 1), slice(row, row + 1)
        return corrector.weights(TokenStats(log_mismatch[here, at], advantages[here], *(x[here, at] for x in stats)))

    apart = [alone(row, token) for row in range(4) for token in range(3)]
    weights = torch.cat([each.importance_weights.flatten() for each in apart])
    is_equal = torch.allclose(together.importance_weights.flatten(), weights)
    return is_equal and all(bool(each.loss_mask.all()) for each in (together, *apart))


def check_weights(corrector: Corrector, weights: object, mask: Bool[Tensor, "B T"]) -> None:
    """Raise ValueError unless a corrector returned weights and a loss mask for each token."""
    found = f"a {type(weights).__name__}"
    if isinstance(weights, TokenWeights):
        importance_weights, loss_mask = weights.importance_weights, weights.loss_mask
        shapes = [tuple(getattr(part, "shape", ())) for part in (importance_weights, loss_mask)]
        if shapes == [tuple(mask.shape)] * 2 and loss_mask.dtype == torch.bool:
            _check_values(corrector, importance_weights, loss_mask, mask)
            return
        found = f"weights of shape {shapes[0]} and a loss mask of shape {shapes[1]}, {getattr(loss_mask, 'dtype', '')}"
    raise ValueError(
        f"corrector={describe(corrector)} returned {found}; return TokenWeights(importance_weights, loss_mask, "
        f"metrics), both of shape (B, T) = {tuple(mask.shape)}, the mask of booleans"
    )


def check_state(corrector: Corrector, state: dict[str, Any]) -> None:
    """Raise ValueError unless a resume would read the same state from a checkpoint."""
    try:
        is_kept = json.loads(json.dumps(state, allow_nan=False)) == state
    except (TypeError, ValueError):  # a tensor; NaN
        is_kept = False
    if not is_kept:
        raise ValueError(
            f"corrector={describe(corrector)} wrote {state!r} into stats.state, which a checkpoint does not keep: "
            "write finite numbers, texts, lists, and dicts whose keys are texts (of a tensor, x.item() or x.tolist())"
        )


def _check_values(corrector: Corrector, weights: Tensor, loss_mask: Tensor, mask: Bool[Tensor, "B T"]) -> None:
    """Raise ValueError for a loss mask with tokens outside `mask`, or for weights in it that are not weights."""
    trained = weights[loss_mask]
    if wrong := trained[~(trained.isfinite() & (trained >= 0))].tolist():
        raise ValueError(
            f"corrector={describe(corrector)} returned the weight {wrong[0]}; weights must be finite and at least 0: "
            "leave such a token out of the loss mask (drop_nonfinite does, for ratios that are not finite)"
        )
    if (loss_mask & ~mask).any():
        raise ValueError(
            f"corrector={describe(corrector)} returned a loss mask with tokens that are not in stats.mask; return "
            "stats.mask, or a part of it"
        )


class NoCorrection(Corrector):
    """No correction: every weight is 1.

    Use it if the rollout has the learner's precision, or as a baseline. Tokens with a non-finite ratio are still
    removed from the loss.
    """


class FunctionCorrector(Corrector):
    """A corrector made of a function and, optionally, an objective.

    Use it for a corrector without settings, or to give another corrector's weights a loss:
    FunctionCorrector(function=TIS().weights, loss=my_loss).

    Args:
        function: Function from the global batch's `TokenStats` to `TokenWeights`. None (default): weight 1.
        loss: Objective that replaces the recipe's. None (default): the recipe's.
        loss_reduction: Averaging of tokens that is used if the recipe's is None. Default: None.
        align_forward: Whether the learner's forward computes with the rollout's quantized operands. Default: False.
        needs_entropy: Whether `function` reads `TokenStats.entropy`. Default: False.
    """

    function: Callable[[TokenStats], Any] | None = None
    loss: Loss | None = None
    loss_reduction: LossReduction | None = None
    align_forward: bool = False
    needs_entropy: bool = False

    @property
    def has_weights(self) -> bool:
        return self.function is not None

    def weights(self, stats: TokenStats) -> TokenWeights:
        return super().weights(stats) if self.function is None else self.function(stats)


def _pools_means(corrector: "TIS | MIS") -> bool:
    """Return whether the weights are of tokens, or of means over a row's tokens and not of sums."""
    return corrector.level == "token" or corrector.pool == "geometric"


class TIS(Corrector):
    """Truncated importance sampling: w = min(rho, cap).

    rho_t = exp(log_mismatch_t) per token; per sequence, exp of the sum ("product") or of the mean ("geometric"). Use it
    where docs/mismatch.md advises a correction: every token stays in the loss, and the cap bounds the variance. It logs
    tis/capped_fraction.

    Args:
        cap: Largest weight, at least 1. Default: 2.
        level: Whether each "token" (default) or each "sequence" has one ratio.
        pool: How token ratios become the ratio of a sequence: "product" (default) or "geometric" (mean).

    Source: TIS, fengyao.notion.site/off-policy-rl [paper].
    """

    cap: float = option(default=2.0, at_least=1)
    level: Level = "token"
    pool: Pool = "product"

    @property
    def takes_drawn_steps(self) -> bool:
        return _pools_means(self)

    def weights(self, stats: TokenStats) -> TokenWeights:
        log_mismatch, finite_mask, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
        chances = stats.inverse_chances
        weights = exp_ratio(
            pooled_log_ratio(log_mismatch, finite_mask, level=self.level, pool=self.pool, inverse_chances=chances)
        )
        # Compared before the clamp: a weight equal to cap is not capped.
        metrics["tis/capped_fraction"] = _fraction(weights > self.cap, finite_mask, chances)
        return TokenWeights(torch.where(finite_mask, weights.clamp(max=self.cap), 1), finite_mask, metrics)


class MIS(Corrector):
    """Masked importance sampling: w = rho inside [min_ratio, max_ratio], and 0 outside.

    rho is the ratio of `TIS`. Use it instead of `TIS` if tokens with an extreme ratio should not contribute a gradient.
    It logs trained/rollout_is_oob_ratio, the share outside the range.

    Args:
        min_ratio: Smallest ratio that contributes, in [0, 1]. Default: 0.5.
        max_ratio: Largest ratio that contributes, at least 1. Default: 2.
        level: Whether each "token" (default) or each "sequence" has one ratio.
        pool: How token ratios become the ratio of a sequence: "product" (default) or "geometric" (mean).
        outside: Treatment of tokens outside the range: "zero" (default; weight 0, counted in the loss's denominator) or
            "drop" (not counted, as in verl's rejection).

    Source: MIS, "When Speed Kills Stability" (Liu et al. 2025) [paper].
    """

    min_ratio: float = option(default=0.5, at_least=0, at_most=1)
    max_ratio: float = option(default=2.0, at_least=1)
    level: Level = "token"
    pool: Pool = "product"
    outside: Outside = "zero"

    @property
    def takes_drawn_steps(self) -> bool:
        return _pools_means(self) and self.outside == "zero"

    def weights(self, stats: TokenStats) -> TokenWeights:
        log_mismatch, finite_mask, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
        chances = stats.inverse_chances
        weights = exp_ratio(
            pooled_log_ratio(log_mismatch, finite_mask, level=self.level, pool=self.pool, inverse_chances=chances)
        )
        out_of_range = (weights < self.min_ratio) | (weights > self.max_ratio)
        # verl's name: is = importance sampling, oob = out of bounds.
        metrics["rollout_corr/rollout_is_oob_ratio"] = _fraction(out_of_range, finite_mask, chances)
        weights = torch.where(finite_mask, weights.masked_fill(out_of_range, 0), 1)
        loss_mask = finite_mask & ~out_of_range if self.outside == "drop" else finite_mask
        return TokenWeights(weights, loss_mask, metrics)


class IcePop(MIS):
    """IcePop: masked importance sampling with a range from 0.5 to 5.

    It is `MIS` with another default range.

    Args:
        min_ratio: Smallest ratio that contributes, in [0, 1]. Default: 0.5.
        max_ratio: Largest ratio that contributes, at least 1. Default: 5.
        level: Whether each "token" (default) or each "sequence" has one ratio.
        pool: How token ratios become the ratio of a sequence: "product" (default) or "geometric" (mean).
        outside: Treatment of tokens outside the range: "zero" (default; weight 0, counted in the loss's denominator) or
            "drop" (not counted).

    Source: IcePop, arXiv 2510.18855 [paper].
    """

    max_ratio: float = option(default=5.0, at_least=1)


class Reject(Corrector):
    """Remove tokens or sequences with a large mismatch from the loss mask, and thereby from the loss's denominator.

    Weights stay 1. With d = log_mismatch clamped to +-20: k1 = -d, k2 = d^2/2, k3 = exp(d) - 1 - d, in nats. A token
    is removed if its |k| exceeds the threshold; a sequence is removed if its pooled |k| does. Use it by itself, or
    combine it with importance weights by `Compose`. It logs trained/rollout_rs_masked_fraction and
    trained/rollout_rs_seq_masked_fraction.

    Args:
        level: Unit that is rejected: "token" or "sequence" (default).
        statistic: Estimator of the mismatch: "k1", "k2" or "k3" (default).
        threshold: Largest statistic that is accepted, in nats, at least 0. Low-bit rollouts need a larger one than the
            default, 0.001.
        pool: How token statistics become the statistic of a sequence: "mean" (default), "sum" or "max".

    Sources: the names are verl's. The default threshold is VeXact's [digest], for bf16 kernels: it rejects a sequence
    whose mean k3 exceeds 0.001.
    """

    level: Level = "sequence"
    statistic: Literal["k1", "k2", "k3"] = "k3"
    threshold: float = option(default=0.001, at_least=0)
    pool: Literal["mean", "sum", "max"] = "mean"

    takes_drawn_steps = False  # what it drops, the loss's denominator does not count

    @property
    def only_masks(self) -> bool:
        return type(self).weights is Reject.weights

    def weights(self, stats: TokenStats) -> TokenWeights:
        d, finite_mask, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
        d = d.clamp(-MAX_LOG, MAX_LOG)  # exp(d) overflows fp32 at 89
        match self.statistic:
            case "k1":
                k = -d
            case "k2":
                k = d.square() / 2
            case "k3":
                k = torch.expm1(d) - d  # exp(d) - 1 would cancel near 0, where nearly all tokens are
        if self.level == "sequence":
            match self.pool:
                case "mean":
                    k = k.sum(-1, keepdim=True) / finite_mask.sum(-1, keepdim=True).clamp(min=1)
                case "sum":
                    k = k.sum(-1, keepdim=True)
                case "max":
                    k = k.abs().amax(-1, keepdim=True)
        loss_mask = finite_mask & (k.abs() <= self.threshold)
        rejected = finite_mask & ~loss_mask
        num_rows = finite_mask.any(-1).sum().item()
        # verl's names: rs = rejection sampling.
        metrics["rollout_corr/rollout_rs_masked_fraction"] = _fraction(rejected, finite_mask)
        metrics["rollout_corr/rollout_rs_seq_masked_fraction"] = rejected.any(-1).sum().item() / max(num_rows, 1)
        return TokenWeights(torch.ones_like(d), loss_mask, metrics)


def ais_lambda(reliability: float, divergence: float, variation: float, *, tau: float) -> float:
    """Compute lambda = 1 - ESS * tau/(D + tau) * 1/(1 + CV): 0 on-policy, and closer to 1 the larger the mismatch.

    The formula is [ours]: we had only a summary of the paper, without a formula.

    Args:
        reliability: Effective sample size of the sequence weights, divided by the number of sequences, in (0, 1]
            (metric `ais/ess`).
        divergence: D, the mean |log_mismatch|, in nats.
        variation: CV, the coefficient of variation of the token weights.
        tau: Value of D at which the factor tau/(D + tau) is 1/2, in nats, above 0.
    """
    return 1 - reliability * (tau / (divergence + tau)) * (1 / (1 + variation))


class AIS(Corrector):
    """Adaptive importance sampling: mix the uncorrected gradient and that of `TIS` by one lambda in [0, 1] per batch.

        m_t = 1 + lambda (min(w_t, cap) - 1),   w_t = exp(log_mismatch_t)
        ESS = (sum w)^2 / (B sum w^2) over SEQUENCE weights: reliability [digest]; B counts rows that have a token
        D   = mean |log_mismatch| over tokens, nats: divergence severity [digest]
        CV  = std(w) / mean(w) over TOKEN weights: variance amplification [digest]

    All three statistics cover the corrected rows. Truncation is [digest], cap 2 is [ours]. No gradient goes through
    lambda or w. Use it if the mismatch changes during a run. It logs ais/ess, ais/D, ais/CV and ais/lambda.

    Args:
        cap: Largest weight, at least 1. Default: 2.
        tau: Scale of the mean |log_mismatch|, in nats, above 0: at this value the factor tau/(D + tau) is 1/2. Default:
            0.05.
        lambda_fn: Function (ESS, D, CV, *, tau) -> lambda; a result outside [0, 1] is clamped. Default: `ais_lambda`.
        pool: How token ratios become the ratio of a sequence, in ESS and in sequence weights: "product" (default) or
            "geometric" (mean).
        level: Whether each "token" (default) or each "sequence" has one weight.

    Source: AIS, arXiv 2605.13907 [digest]; the formula of lambda is [ours].
    """

    cap: float = option(default=2.0, at_least=1)
    tau: float = option(default=0.05, above=0)
    lambda_fn: Callable[..., float] = ais_lambda
    pool: Pool = "product"
    level: Level = "token"

    @property
    def takes_drawn_steps(self) -> bool:
        return self.pool == "geometric"  # the ESS is of sequences at every level

    def weights(self, stats: TokenStats) -> TokenWeights:
        log_mismatch, finite_mask, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
        chances = stats.inverse_chances
        log_w = log_mismatch.clamp(-MAX_LOG, MAX_LOG)
        reliability = 1.0  # without tokens, lambda has its on-policy value
        divergence = 0.0
        variation = 0.0
        if finite_mask.any():
            w = log_w[finite_mask].double().exp()
            counts = torch.ones_like(w) if chances is None else chances[finite_mask].double()
            row_log_w = pooled_log_ratio(
                log_mismatch, finite_mask, level="sequence", pool=self.pool, inverse_chances=chances
            ).double()
            # One number per row that has a token.
            row_log_w = torch.where(finite_mask, row_log_w, -torch.inf).amax(-1)[finite_mask.any(-1)]
            row_w = (row_log_w - row_log_w.max()).exp()  # this scaling does not change ESS, and prevents overflow
            reliability = min(1.0, (row_w.sum().square() / (len(row_w) * row_w.square().sum())).item())
            divergence = ((counts * log_mismatch[finite_mask].double().abs()).sum() / counts.sum()).item()
            mean = (counts * w).sum() / counts.sum()
            variation = (((counts * (w - mean).square()).sum() / counts.sum()).sqrt() / mean).item()
        capped = exp_ratio(
            pooled_log_ratio(log_mismatch, finite_mask, level=self.level, pool=self.pool, inverse_chances=chances)
        ).clamp(max=self.cap)
        lam = min(1.0, max(0.0, self.lambda_fn(reliability, divergence, variation, tau=self.tau)))
        weights = torch.lerp(torch.ones_like(capped), capped, lam)  # exact if lambda is 0 or 1
        metrics |= {"ais/ess": reliability, "ais/D": divergence, "ais/CV": variation, "ais/lambda": lam}
        return TokenWeights(torch.where(finite_mask, weights, 1), finite_mask, metrics)


class TBPO(Corrector):
    """Trust-band policy optimization: one weight per row, with the objective `TrustBand` and `SequenceMean` [digest].

    The weight is exp(clamp(mean_t log_mismatch, -log c, log c)), where c is `max_weight`; the clamp in log space is
    [ours]. The defaults fit long autoregressive responses [digest]; diffusion likelihoods move more and need wider
    bands. It logs tbpo/capped_fraction.

    Args:
        eps_high: Clamp the ratio (current / old) at 1 + eps_high if the advantage is not negative. Default: 4e-4.
        neg_low: Clamp the ratio from below at 1 - neg_low if the advantage is negative. Default: 3e-4.
        neg_high: Clamp the ratio from above at 1 + neg_high if the advantage is negative. Default: 7e-4.
        max_weight: Largest weight, and the reciprocal of the smallest; at least 1. Default: 2.

    Source: QaRL, arXiv 2604.07853 [digest].
    """

    eps_high: float = option(default=4e-4, at_least=WIDTH)
    neg_low: float = option(default=3e-4, at_least=WIDTH)
    neg_high: float = option(default=7e-4, at_least=WIDTH)
    max_weight: float = option(default=2.0, at_least=1)

    @property
    def loss(self) -> Loss:
        return TrustBand(eps_high=self.eps_high, neg_low=self.neg_low, neg_high=self.neg_high)

    loss_reduction = SequenceMean()
    takes_drawn_steps = True

    def weights(self, stats: TokenStats) -> TokenWeights:
        log_mismatch, finite_mask, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
        chances = stats.inverse_chances
        log_w = pooled_log_ratio(log_mismatch, finite_mask, level="sequence", pool="geometric", inverse_chances=chances)
        max_log_w = math.log(self.max_weight)
        metrics["tbpo/capped_fraction"] = _fraction(log_w.abs() > max_log_w, finite_mask, chances)
        return TokenWeights(log_w.clamp(-max_log_w, max_log_w).exp(), finite_mask, metrics)


class Aligned(Corrector):
    """Align the learner's forward: it computes with the rollout's quantized operands.

    Use it if you want the quantized model itself to become better: it gives the gradient of that model, not that of the
    full-precision model. It has no importance weights; `Compose` can add them.
    """

    align_forward = True


class QaRL(TBPO):
    """QaRL: `TBPO` with the aligned forward.

    Args:
        eps_high: Clamp the ratio (current / old) at 1 + eps_high if the advantage is not negative. Default: 4e-4.
        neg_low: Clamp the ratio from below at 1 - neg_low if the advantage is negative. Default: 3e-4.
        neg_high: Clamp the ratio from above at 1 + neg_high if the advantage is negative. Default: 7e-4.
        max_weight: Largest weight, and the reciprocal of the smallest; at least 1. Default: 2.

    Source: QaRL, arXiv 2604.07853 [digest].
    """

    align_forward = True


class Compose(Corrector):
    """Combine correctors: multiply their weights, and intersect their loss masks.

    The learner's forward is aligned if any part aligns it. If two parts log different values of one metric, the later
    value is logged as NAME_K, where K is the part's position, from 1.

    Args:
        parts: Correctors, or functions `TokenStats` -> `TokenWeights`; at most one objective among them.

    Example:
            Compose(parts=(TIS(cap=3.0), Reject(threshold=0.1)))
    """

    parts: tuple[Corrector, ...]

    def check(self) -> None:
        losses = [part.loss for part in self.parts if part.loss is not None]
        if any(loss != losses[0] for loss in losses):
            raise ValueError(f"{len(losses)} parts have a loss, but only one may: leave the others out")

    def _with_loss(self) -> Corrector:
        return next((part for part in self.parts if part.loss is not None), NoCorrection())

    @property
    def loss(self) -> Loss | None:
        return self._with_loss().loss

    @property
    def loss_reduction(self) -> LossReduction | None:
        """That of the part with an objective; those of parts without one are ignored."""
        return self._with_loss().loss_reduction

    @property
    def align_forward(self) -> bool:
        return any(part.align_forward for part in self.parts)

    @property
    def needs_entropy(self) -> bool:
        return any(part.needs_entropy for part in self.parts)

    @property
    def has_weights(self) -> bool:
        return any(part.has_weights for part in self.parts)

    @property
    def only_masks(self) -> bool:
        return all(part.only_masks for part in self.parts)

    @property
    def takes_drawn_steps(self) -> bool:
        return all(part.takes_drawn_steps for part in self.parts)

    def weights(self, stats: TokenStats) -> TokenWeights:
        with_weights = [(k, part) for k, part in enumerate(self.parts, start=1) if part.has_weights]
        if len(with_weights) < 2:
            _, only = (with_weights or [(1, NoCorrection())])[0]
            return only.weights(stats)
        weights = torch.ones_like(stats.log_mismatch).detach()
        loss_mask = stats.mask
        metrics: dict[str, float] = {}
        for position, part in with_weights:
            key = f"{position} {type(part).__name__}"
            state = stats.state.get(key, {})
            # Each sees the full mask, so that their order does not matter.
            result = part.weights(replace(stats.copied(), state=state))
            if state:
                stats.state[key] = state
            check_weights(part, result, stats.mask)
            weights = weights * result.importance_weights
            loss_mask = loss_mask & result.loss_mask
            for name, value in result.metrics.items():
                is_same = metrics.get(name, value) == value
                metrics[name if is_same else f"{name}_{position}"] = value
        return TokenWeights(weights, loss_mask, metrics)
