"""Metrics of the training-inference mismatch: how much rollout policy and learner disagree on sampled tokens.

log_mismatch = logp_old - logp_rollout per token, in nats; rho = exp(log_mismatch). Names follow verl. Functions expect
the GLOBAL batch, and the mask from BEFORE any rejection. Tokens whose log_mismatch is not finite are left out and
counted.

To save forwards, a training step scores only the rows that it trains on, and a random sample of the other groups. Each
row is weighted by its inverse sampling fraction (0 if not scored), so that sums over scored rows estimate sums over all
rows. If the likelihood draws denoising steps, a token is also weighted by the inverse chance of its step.
docs/papers.md explains the tag [digest].
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.algorithms.losses import MAX_LOG
from dllm_rl.types.scoring import Batch

PREFIX = "rollout_corr/"
STEP_GROUPS = 8  # largest number of step groups of `step_metrics`


@dataclass(frozen=True)
class _ScoredTokens:
    """The scored tokens with a finite ratio, and the weights of their means."""

    log_mismatch: Float[Tensor, "B T"]  # fp64, 0 where not `finite`
    finite: Bool[Tensor, "B T"]  # tokens of scored rows whose ratio is finite
    rows: Bool[Tensor, " B"]  # rows with a finite token
    inverse_chances: Float[Tensor, "B T"] | None  # of the tokens' steps; None: all steps are scored
    token_weights: Float[Tensor, " K"]  # one weight per finite token
    row_weights: Float[Tensor, " R"]  # one weight per row with a finite token
    num_tokens: Float[Tensor, ""]  # tokens of ALL rows, minus the estimated non-finite tokens
    num_rows: Float[Tensor, ""]  # ALL rows, minus the estimated rows without a finite token
    nonfinite_fraction: Float[Tensor, ""]  # estimated share of tokens whose ratio is not finite

    def per_token(self, values: Float[Tensor, " K"]) -> Float[Tensor, ""]:
        """Estimate the mean over the tokens of all rows."""
        # Divided by the exact number, not by the sum of the weights, so that the mean is unbiased.
        return (values * self.token_weights).sum() / self.num_tokens

    def per_row(self, values: Float[Tensor, " R"]) -> Float[Tensor, ""]:
        """Estimate the mean over all rows."""
        return (values * self.row_weights).sum() / self.num_rows

    def row_means(self, values: Float[Tensor, "B T"]) -> Float[Tensor, " R"]:
        """Return each scored row's mean over its finite tokens."""
        return torch.where(self.finite, values, 0).sum(-1)[self.rows] / self.finite.sum(-1)[self.rows]

    def weighted_moments(self, values: Float[Tensor, " K"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the weighted mean and the weighted mean square over scored tokens."""
        # Both are divided by the sum of the weights, so that mean^2 / mean square stays in (0, 1].
        total = self.token_weights.sum()
        return (values * self.token_weights).sum() / total, (values.square() * self.token_weights).sum() / total


def _select_scored(
    log_mismatch: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    row_weights: Float[Tensor, " B"] | None,
    inverse_chances: Float[Tensor, "B T"] | None,
) -> _ScoredTokens:
    """Select the scored tokens with a finite ratio. Raise ValueError if there are none."""
    weights = torch.ones(len(mask), device=mask.device) if row_weights is None else row_weights
    weights = weights.double()
    token_weights = weights[:, None].expand(mask.shape)
    if inverse_chances is not None:
        token_weights = token_weights * inverse_chances
    scored = mask & (token_weights > 0)
    finite = scored & log_mismatch.isfinite()
    if not finite.any():
        raise ValueError("mask marks no token with a finite log_mismatch: there is no mismatch to measure")
    has_finite = finite.any(-1)
    num_nonfinite = (token_weights * (scored & ~finite)).sum()
    num_rows_left_out = (weights * (scored.any(-1) & ~has_finite)).sum()
    return _ScoredTokens(
        log_mismatch=torch.where(finite, log_mismatch, 0).double(),
        finite=finite,
        rows=has_finite,
        inverse_chances=inverse_chances,
        token_weights=token_weights[finite],
        row_weights=weights[has_finite],
        num_tokens=mask.sum() - num_nonfinite,
        num_rows=mask.any(-1).sum() - num_rows_left_out,
        nonfinite_fraction=num_nonfinite / mask.sum(),
    )


def mismatch_metrics(
    log_mismatch: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    high: float = 2.0,
    old: Float[Tensor, "B T"] | None = None,
    advantages: Float[Tensor, " B"] | Float[Tensor, "B T"] | None = None,
    row_weights: Float[Tensor, " B"] | None = None,
    inverse_chances: Float[Tensor, "B T"] | None = None,
) -> dict[str, float]:
    """Compute the `rollout_corr/` metrics over the tokens of the mask.

    If both policies agree bit for bit, differences are exactly 0 and ratios exactly 1. Only zero_mismatch guarantees
    this; otherwise an unquantized rollout agrees with the learner up to rounding. Log-ratios are clamped to +-20 before
    exp.

    - rollout_is_{mean,std,min,max}: Statistics over tokens of w = min(rho, high), as in verl; the population std.
    - rollout_is_eff_sample_size: 1 / mean((w / mean w)^2) over tokens.
    - rollout_is_ratio_fraction_{high,low}: Share of tokens with rho > high, and with rho < 1/high.
    - rollout_is_seq_{mean,std,min,max}: Statistics over sequences of the sequence's mean of w; the sample std.
    - rollout_is_seq_max_deviation: Largest |mean of w - 1| of a sequence.
    - rollout_is_seq_fraction_{high,low}: Share of sequences whose mean of rho is > high, and < 1/high.
    - ess, rho_max: 1 / mean((rho / mean rho)^2) in (0, 1], and the largest rho (not verl's).
    - kl, k3_kl: mean(-log rho), mean(rho - 1 - log rho), in nats.
    - abs_log_ratio_{mean,max}: Mean and maximum of |log rho|, in nats.
    - log_ppl_{diff,abs_diff,diff_max,diff_min}: Statistics over sequences of the sequence's mean of -log rho.
    - ppl_ratio: Mean over sequences of exp of the sequence's mean of -log rho.
    - chi2_token, chi2_seq: Mean of rho^2 - 1 over tokens, of (prod rho)^2 - 1 over sequences.
    - {training,rollout}_{ppl,log_ppl}: With `old`, mean over sequences of exp(-mean_t logp), and of -mean_t logp.
    - contribution_{positive,negative}: With `advantages`, mean over tokens of -(rho - 1) A, by sign of A (VeXact
      [digest]).
    - nonfinite_fraction, rows: Share of tokens that are left out; number of scored rows.

    Args:
        log_mismatch: logp_old - logp_rollout (B, T), in nats.
        mask: Completion tokens of ALL rows (B, T), scored or not.
        high: Cap of the token weights. Default: 2.
        old: Log-probs under the learner (B, T), in nats. None (default): no perplexities.
        advantages: Advantage of each row (B,), or of each token (B, T). None (default): no contributions.
        row_weights: Inverse sampling fraction per row, 0 if not scored (`inverse_sampling_weights`). Means are then
            unbiased for all rows if ratios are finite; ess, rollout_is_std and eff_sample_size are only consistent;
            extremes cover scored rows only. None (default): all rows are scored.
        inverse_chances: 1 / the chance that the token's step was drawn, 0 if it was not (B, T). Metrics of sequences
            other than `rows` are then left out, because the drawn steps do not tell them. None (default): all tokens
            of the scored rows are scored.

    Returns:
        Metrics by name.

    Raises:
        ValueError: No token of the mask has a finite ratio.
    """
    scored = _select_scored(log_mismatch, mask, row_weights, inverse_chances)
    log_rho = scored.log_mismatch[scored.finite]
    excess = torch.expm1(log_rho.clamp(-MAX_LOG, MAX_LOG))  # rho - 1: means around 1 are exact if the policies agree
    rho = log_rho.clamp(-MAX_LOG, MAX_LOG).exp()
    mean, _ = scored.weighted_moments(rho)
    _, mean_square = scored.weighted_moments(rho / mean)  # divided first: exactly 1 if the policies agree
    values = {
        "ess": 1 / mean_square,
        "rho_max": rho.max(),
        "kl": -scored.per_token(log_rho),
        "k3_kl": scored.per_token(excess - log_rho),
        "abs_log_ratio_mean": scored.per_token(log_rho.abs()),
        "abs_log_ratio_max": log_rho.abs().max(),
        "chi2_token": scored.per_token(rho.square() - 1),
        "nonfinite_fraction": scored.nonfinite_fraction,
        "rows": scored.rows.sum(),
    }
    if inverse_chances is None:
        values |= _sequence_metrics(scored, old)
    if advantages is not None:
        token_advantages = advantage_of_tokens(advantages, mask)[scored.finite]
        contribution = -excess * token_advantages.double()
        for name, has_sign in (("positive", token_advantages > 0), ("negative", token_advantages < 0)):
            values[f"contribution_{name}"] = scored.per_token(contribution * has_sign)
    metrics = {PREFIX + name: value.item() + 0.0 for name, value in values.items()}  # -0.0 + 0.0 is 0.0
    return _weight_metrics(scored, high) | metrics


def _sequence_metrics(scored: _ScoredTokens, old: Float[Tensor, "B T"] | None) -> dict[str, Tensor]:
    """Compute the metrics of `mismatch_metrics` that need all tokens of a row, but those of the weights."""
    row_log_rho = scored.log_mismatch.sum(-1)[scored.rows]
    log_ppl_diff = -scored.row_means(scored.log_mismatch)
    values = {
        "log_ppl_diff": scored.per_row(log_ppl_diff),
        "log_ppl_abs_diff": scored.per_row(log_ppl_diff.abs()),
        "log_ppl_diff_max": log_ppl_diff.max(),
        "log_ppl_diff_min": log_ppl_diff.min(),
        "ppl_ratio": 1 + scored.per_row(log_ppl_diff.clamp(-MAX_LOG, MAX_LOG).exp() - 1),
        "chi2_seq": scored.per_row((2 * row_log_rho.clamp(-MAX_LOG, MAX_LOG)).exp() - 1),
    }
    if old is not None:
        training = scored.row_means(old.double())
        for name, mean_logprob in (("training", training), ("rollout", training + log_ppl_diff)):
            values[f"{name}_ppl"] = scored.per_row((-mean_logprob).exp())
            values[f"{name}_log_ppl"] = -scored.per_row(mean_logprob)
    return values


def _weight_metrics(scored: _ScoredTokens, high: float) -> dict[str, float]:
    """Compute the rollout_is_* metrics of `mismatch_metrics`."""
    rho = scored.log_mismatch.clamp(-MAX_LOG, MAX_LOG).exp()
    weights = rho.clamp(max=high)
    token_weight = weights[scored.finite]
    token_rho = rho[scored.finite]
    mean, _ = scored.weighted_moments(token_weight)
    _, variance = scored.weighted_moments(token_weight - mean)
    values = {
        "mean": 1 + scored.per_token(token_weight - 1),
        "std": variance.sqrt(),
        "min": token_weight.min(),
        "max": token_weight.max(),
        "eff_sample_size": 1 / scored.weighted_moments(token_weight / mean)[1],
        "ratio_fraction_high": scored.per_token((token_rho > high).double()),
        "ratio_fraction_low": scored.per_token((token_rho < 1 / high).double()),
    }
    if scored.inverse_chances is None:
        row_mean_weight = scored.row_means(weights)
        row_mean_rho = scored.row_means(rho)
        mean_of_rows = 1 + scored.per_row(row_mean_weight - 1)  # a mean around 1 is exact if the policies agree
        bessel = scored.num_rows / (scored.num_rows - 1).clamp(min=1)  # the std of a single row is 0
        values |= {
            "seq_mean": mean_of_rows,
            "seq_std": (scored.per_row((row_mean_weight - mean_of_rows).square()) * bessel).sqrt(),
            "seq_min": row_mean_weight.min(),
            "seq_max": row_mean_weight.max(),
            "seq_max_deviation": (row_mean_weight - 1).abs().max(),
            "seq_fraction_high": scored.per_row((row_mean_rho > high).double()),
            "seq_fraction_low": scored.per_row((row_mean_rho < 1 / high).double()),
        }
    return {f"{PREFIX}rollout_is_{name}": value.item() + 0.0 for name, value in values.items()}


def step_metrics(
    log_mismatch: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    unmask_step: Int[Tensor, "B T"],
    inverse_chances: Float[Tensor, "B T"] | None = None,
) -> dict[str, float]:
    """Compute the maximum and the 99th percentile of |log rho|, in nats, by the denoising step that wrote the token.

    With more than STEP_GROUPS steps, the steps of the longest completion are divided into STEP_GROUPS equal groups, and
    step_K is group K. The percentile is the smallest value with at least 99 % of the values at or below it. Tokens
    whose ratio is not finite are left out; a group without a token has no metric. A token of a step that was drawn
    counts `inverse_chances` times.
    """
    measured = mask & log_mismatch.isfinite() & (unmask_step >= 0)
    counts = torch.ones_like(log_mismatch) if inverse_chances is None else inverse_chances
    counts = counts[measured].double()
    abs_log_rho = log_mismatch[measured].abs().double()
    steps = unmask_step[measured]
    if not len(steps):
        return {}
    num_steps = int(steps.max()) + 1
    groups = steps * min(STEP_GROUPS, num_steps) // num_steps
    metrics = {}
    for group in groups.unique().tolist():
        values, order = abs_log_rho[groups == group].sort()
        metrics[f"{PREFIX}abs_log_ratio_max/step_{group}"] = values[-1].item()
        below = counts[groups == group][order].cumsum(0)
        metrics[f"{PREFIX}abs_log_ratio_p99/step_{group}"] = values[int((below < 0.99 * below[-1]).sum())].item()
    return metrics


def advantage_of_tokens(
    advantages: Float[Tensor, " B"] | Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Return the advantage of each token: that of its row, unless `advantages` has one per token."""
    return advantages if advantages.dim() == 2 else advantages[:, None].expand(mask.shape)


def off_policy_metrics(
    logps: Float[Tensor, "B T"], batch: Batch, *, old: Float[Tensor, "B T"]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure, at an inner update, how far the current policy has moved. Each metric is a pair (sum, count).

    off_policy/old/* compare with the policy at the start of the update, r = p_current / p_old; off_policy/rollout/*
    with the rollout policy, r = p_current / p_rollout.

    - contribution_{positive,negative}: Sum over tokens of -(r - 1) A by sign of A, divided by ALL completion tokens
      (VeXact, eq. 5 [digest]); negative if the update follows the advantages.
    - m2: Mean of (log r)^2 over tokens in the loss, nats^2 (M2PO bounds m2 by 0.04 [digest]).
    - max: Mean over sequences of the largest |log r|, in nats; not if denoising steps were drawn.
    """
    loss_mask = batch.loss_mask
    counts = loss_mask.double() if batch.inverse_chances is None else loss_mask * batch.inverse_chances.double()
    advantages = advantage_of_tokens(batch.advantages, loss_mask)
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    tokens = batch.rollout.completion_mask.sum()  # all rows: rows without advantage contribute 0
    rows = loss_mask.any(-1).sum()
    for name, base_logprobs in (("old", old), ("rollout", batch.rollout_logprobs)):
        if base_logprobs is None:  # the rollout's log-probs are unknown
            continue
        log_ratio = torch.where(loss_mask, logps - base_logprobs, 0).double()
        contribution = -torch.expm1(log_ratio.clamp(-MAX_LOG, MAX_LOG)) * advantages * counts
        metrics |= {
            f"off_policy/{name}/contribution_positive": (torch.where(advantages > 0, contribution, 0).sum(), tokens),
            f"off_policy/{name}/contribution_negative": (torch.where(advantages < 0, contribution, 0).sum(), tokens),
            f"off_policy/{name}/m2": ((log_ratio.square() * counts).sum(), counts.sum()),
        }
        if batch.inverse_chances is None:
            metrics[f"off_policy/{name}/max"] = (log_ratio.abs().amax(-1).sum(), rows)
    return metrics


def symptom_metrics(
    tokens: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    advantages: Float[Tensor, " B"] | Float[Tensor, "B T"],
    *,
    old: Float[Tensor, "B T"] | None = None,
    inverse_chances: Float[Tensor, "B T"] | None = None,
) -> dict[str, float]:
    """Compute QaRL's early-warning metrics [digest], separately over the tokens with A > 0 and with A < 0.

    - symptoms/error_tokens_*: Share of tokens with p_learner < 1e-4; `old` must hold log-probs of single tokens
      (trajectory, causal), not of an ELBO. Of steps that were drawn, each token counts `inverse_chances` times.
    - symptoms/repetition_*: Share of tokens in a trigram that occurred earlier in the completion; trigrams may overlap.
    """
    counts = mask.double() if inverse_chances is None else mask * inverse_chances.double()
    error = None if old is None else counts * (old < math.log(1e-4))
    repeated = repeated_trigrams(tokens, mask)
    metrics = {}
    advantages = advantage_of_tokens(advantages, mask)
    for name, sign in (("positive", advantages > 0), ("negative", advantages < 0)):
        counted = mask & sign
        total = max(counted.sum().item(), 1)
        if error is not None:
            num_scored = max((counts * counted).sum().item(), 1)
            metrics[f"symptoms/error_tokens_{name}"] = (error * counted).sum().item() / num_scored
        metrics[f"symptoms/repetition_{name}"] = (repeated & counted).sum().item() / total
    return metrics


def repeated_trigrams(tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Return the tokens of the mask that belong to a trigram which has occurred earlier in the same row."""
    is_repeated = torch.zeros_like(mask)
    rows, columns = mask.nonzero(as_tuple=True)
    starts = (rows[:-2] == rows[2:]).nonzero()[:, 0]  # places of the trigrams among the tokens of the mask
    if not len(starts):
        return is_repeated
    ids = tokens[rows, columns]
    number = rows[starts]  # of the row, then of the row and the trigram's first token, then with its second and third
    for offset in range(3):
        number = (number * (ids.max() + 1) + ids[starts + offset]).unique(return_inverse=True)[1]
    number, order = number.sort(stable=True)  # equal trigrams stay in the order of their places
    again = starts[order[1:][number[1:] == number[:-1]]]
    for offset in range(3):
        is_repeated[rows[again + offset], columns[again + offset]] = True
    return is_repeated
