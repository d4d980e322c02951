"""Metrics of the disagreement between rollout policy and learner on the sampled tokens (training-inference mismatch).

log_mismatch = logp_old - logp_rollout per token, in nats; rho = exp(log_mismatch). Names follow verl. Functions expect
the mask from BEFORE any rejection and the GLOBAL batch. Tokens whose log_mismatch is not finite are left out and
counted.

Only the rows that the step learns from and a random sample of the other groups are scored. Each row is weighted by its
inverse sampling fraction (0 if not scored), so that sums over scored rows estimate sums over all rows.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.algorithms.losses import MAX_LOG
from dllm_rl.types import Batch

PREFIX = "rollout_corr/"
STEP_GROUPS = 8  # largest number of step groups of `step_metrics`


@dataclass(frozen=True)
class _Measured:
    log_mismatch: Float[Tensor, "B T"]  # fp64, 0 where not `finite`
    finite: Bool[Tensor, "B T"]  # tokens of scored rows whose ratio is finite
    token_weights: Float[Tensor, " K"]  # one weight per finite token
    row_weights: Float[Tensor, " R"]  # one weight per row with a finite token
    num_tokens: Float[Tensor, ""]  # tokens of ALL rows, minus the estimated non-finite tokens
    num_rows: Float[Tensor, ""]  # ALL rows, minus the estimated rows without a finite token
    lost: Float[Tensor, ""]  # share of non-finite tokens

    @property
    def rows(self) -> Bool[Tensor, " B"]:
        return self.finite.any(-1)

    def per_token(self, values: Float[Tensor, " K"]) -> Float[Tensor, ""]:
        """Return the mean over the tokens of all rows."""
        return (values * self.token_weights).sum() / self.num_tokens  # the exact number, so that the mean is unbiased

    def per_row(self, values: Float[Tensor, " R"]) -> Float[Tensor, ""]:
        return (values * self.row_weights).sum() / self.num_rows

    def row_means(self, values: Float[Tensor, "B T"]) -> Float[Tensor, " R"]:
        """Return each scored row's mean over its finite tokens."""
        return torch.where(self.finite, values, 0).sum(-1)[self.rows] / self.finite.sum(-1)[self.rows]

    def spread(self, values: Float[Tensor, " K"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the weighted mean and mean square over tokens."""
        total = self.token_weights.sum()  # divides both, so that mean^2 / mean square stays in (0, 1]
        return (values * self.token_weights).sum() / total, (values.square() * self.token_weights).sum() / total


def _measured(
    log_mismatch: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], row_weights: Float[Tensor, " B"] | None
) -> _Measured:
    """Prepare the metrics' inputs. Raises ValueError if no scored row has a token with a finite ratio."""
    weights = torch.ones(len(mask), device=mask.device) if row_weights is None else row_weights
    weights = weights.double()
    scored = mask & (weights > 0)[:, None]
    finite = scored & log_mismatch.isfinite()
    if not finite.any():
        raise ValueError("mask marks no token with a finite log_mismatch: there is no mismatch to measure")
    rows = finite.any(-1)
    lost = (weights[:, None] * (scored & ~finite)).sum()
    gone = (weights * (scored.any(-1) & ~rows)).sum()
    return _Measured(
        log_mismatch=torch.where(finite, log_mismatch, 0).double(),
        finite=finite,
        token_weights=weights[:, None].expand(mask.shape)[finite],
        row_weights=weights[rows],
        num_tokens=mask.sum() - lost,
        num_rows=mask.any(-1).sum() - gone,
        lost=lost / mask.sum(),
    )


def mismatch_metrics(
    log_mismatch: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    high: float = 2.0,
    old: Float[Tensor, "B T"] | None = None,
    advantages: Float[Tensor, " B"] | None = None,
    row_weights: Float[Tensor, " B"] | None = None,
) -> dict[str, float]:
    """Compute the `rollout_corr/` metrics over the marked tokens.

    They are exactly 0, or exactly 1, if both policies agree bit for bit, which only zero_mismatch promises: otherwise
    an unquantized rollout agrees with the learner up to rounding. Log-ratios are clamped to +-20 before exp.

    - rollout_is_*: Metrics of the token weights min(rho, high); see `weight_metrics`.
    - ess, rho_max: 1 / mean((rho / mean rho)^2) in (0, 1], and the largest rho (not verl's).
    - kl, k3_kl: mean(-log rho), mean(rho - 1 - log rho), in nats.
    - abs_log_ratio_{mean,max}: Mean and maximum of |log rho|, in nats.
    - log_ppl_{diff,abs_diff,diff_max,diff_min}: Statistics over sequences of the sequence's mean of -log rho.
    - ppl_ratio: Mean over sequences of exp of the sequence's mean of -log rho.
    - chi2_token, chi2_seq: Mean of rho^2 - 1 over tokens, of (prod rho)^2 - 1 over sequences.
    - {training,rollout}_{ppl,log_ppl}: With `old`, mean over sequences of exp(-mean_t logp), and of -mean_t logp.
    - contribution_{positive,negative}: With `advantages`, mean over tokens of -(rho - 1) A, by sign of A (VeXact
      [digest]).
    - nonfinite_fraction, rows: Share of marked tokens that are left out; number of scored rows.

    Args:
        log_mismatch: logp_old - logp_rollout (B, T), in nats.
        mask: Completion tokens of ALL rows (B, T), scored or not.
        high: Cap of the token weights. Default: 2.
        old: Log-probs under the learner (B, T), in nats. None (default): no perplexities.
        advantages: Advantage of each row (B,). None (default): no contributions.
        row_weights: Inverse sampling fraction per row, 0 if not scored (`group_weights`). None (default): all rows are
            scored. Means are unbiased for all rows if ratios are finite; ess, rollout_is_std and eff_sample_size are
            only consistent; extremes cover scored rows only.

    Returns:
        Numbers by name.

    Raises:
        ValueError: No marked token has a finite ratio.
    """
    scored = _measured(log_mismatch, mask, row_weights)
    flat = scored.log_mismatch[scored.finite]
    excess = torch.expm1(flat.clamp(-MAX_LOG, MAX_LOG))  # rho - 1: means around 1 are exact if the policies agree
    rho = flat.clamp(-MAX_LOG, MAX_LOG).exp()
    sums = scored.log_mismatch.sum(-1)[scored.rows]
    log_ppl = -scored.row_means(scored.log_mismatch)
    mean, _ = scored.spread(rho)
    _, square = scored.spread(rho / mean)  # divided first: exactly 1 if the policies agree
    values = {
        "ess": 1 / square,
        "rho_max": rho.max(),
        "kl": -scored.per_token(flat),
        "k3_kl": scored.per_token(excess - flat),
        "abs_log_ratio_mean": scored.per_token(flat.abs()),
        "abs_log_ratio_max": flat.abs().max(),
        "log_ppl_diff": scored.per_row(log_ppl),
        "log_ppl_abs_diff": scored.per_row(log_ppl.abs()),
        "log_ppl_diff_max": log_ppl.max(),
        "log_ppl_diff_min": log_ppl.min(),
        "ppl_ratio": 1 + scored.per_row(log_ppl.clamp(-MAX_LOG, MAX_LOG).exp() - 1),
        "chi2_token": scored.per_token(rho.square() - 1),
        "chi2_seq": scored.per_row((2 * sums.clamp(-MAX_LOG, MAX_LOG)).exp() - 1),
        "nonfinite_fraction": scored.lost,
        "rows": scored.rows.sum(),
    }
    if old is not None:
        training = scored.row_means(old.double())
        for name, log_prob in (("training", training), ("rollout", training + log_ppl)):
            values[f"{name}_ppl"] = scored.per_row((-log_prob).exp())
            values[f"{name}_log_ppl"] = -scored.per_row(log_prob)
    if advantages is not None:
        part = -excess * advantages.double()[:, None].expand(mask.shape)[scored.finite]
        for name, sign in (("positive", advantages > 0), ("negative", advantages < 0)):
            values[f"contribution_{name}"] = scored.per_token(part * sign[:, None].expand(mask.shape)[scored.finite])
    found = {PREFIX + name: v.item() + 0.0 for name, v in values.items()}  # + 0.0: no -0.0
    return _weight_metrics(scored, high) | found


def weight_metrics(
    log_mismatch: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    high: float = 2.0,
    row_weights: Float[Tensor, " B"] | None = None,
) -> dict[str, float]:
    """Compute verl's rollout_is_* metrics for truncated weights w = min(rho, high).

    `row_weights` and errors are the same as in `mismatch_metrics`.

    - mean, std, eff_sample_size, min, max: Statistics of w over tokens: population std, and 1 / mean((w / mean w)^2).
      verl's eff_sample_size clamps weights to [1 / high, high], and is therefore larger.
    - ratio_fraction_{high,low}: Share of tokens with rho > high, < 1/high.
    - seq_{mean,std,min,max,max_deviation}: Statistics over sequences of the row's mean w; sample std; largest |mean w -
      1|.
    - seq_fraction_{high,low}: Share of rows whose mean rho is > high, < 1/high.
    """
    return _weight_metrics(_measured(log_mismatch, mask, row_weights), high)


def _weight_metrics(scored: _Measured, high: float) -> dict[str, float]:
    raw = scored.log_mismatch.clamp(-MAX_LOG, MAX_LOG).exp()
    weights = raw.clamp(max=high)
    seq = scored.row_means(weights)
    raw_seq = scored.row_means(raw)
    flat = weights[scored.finite]
    each = raw[scored.finite]
    mean, _ = scored.spread(flat)
    _, variance = scored.spread(flat - mean)
    centre = 1 + scored.per_row(seq - 1)  # around 1, so that it is exact if the policies agree
    bessel = scored.num_rows / (scored.num_rows - 1).clamp(min=1)  # the deviation of one row is 0
    values = {
        "mean": 1 + scored.per_token(flat - 1),
        "std": variance.sqrt(),
        "min": flat.min(),
        "max": flat.max(),
        "eff_sample_size": 1 / scored.spread(flat / mean)[1],
        "ratio_fraction_high": scored.per_token((each > high).double()),
        "ratio_fraction_low": scored.per_token((each < 1 / high).double()),
        "seq_mean": centre,
        "seq_std": (scored.per_row((seq - centre).square()) * bessel).sqrt(),
        "seq_min": seq.min(),
        "seq_max": seq.max(),
        "seq_max_deviation": (seq - 1).abs().max(),
        "seq_fraction_high": scored.per_row((raw_seq > high).double()),
        "seq_fraction_low": scored.per_row((raw_seq < 1 / high).double()),
    }
    return {f"{PREFIX}rollout_is_{name}": v.item() + 0.0 for name, v in values.items()}


def step_metrics(
    log_mismatch: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], unmask_step: Int[Tensor, "B T"]
) -> dict[str, float]:
    """Compute the largest |log rho| and its 99th percentile, in nats, by the denoising step that wrote the token.

    With more than STEP_GROUPS steps, the steps of the longest completion are divided into STEP_GROUPS equal parts, and
    step_K is part K. The percentile is the smallest value with at least 99 % of the values at or below it. Tokens whose
    ratio is not finite are left out; a step without a token has no metric.
    """
    written = mask & log_mismatch.isfinite() & (unmask_step >= 0)
    sizes = log_mismatch[written].abs().double()
    steps = unmask_step[written]
    if not len(steps):
        return {}
    total = int(steps.max()) + 1
    groups = steps * min(STEP_GROUPS, total) // total
    metrics = {}
    for group in groups.unique().tolist():
        values = sizes[groups == group]
        metrics[f"{PREFIX}abs_log_ratio_max/step_{group}"] = values.max().item()
        percentile = values.kthvalue(math.ceil(0.99 * len(values))).values
        metrics[f"{PREFIX}abs_log_ratio_p99/step_{group}"] = percentile.item()
    return metrics


def off_policy_metrics(
    logps: Float[Tensor, "B T"], batch: Batch, *, old: Float[Tensor, "B T"]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure how far the current log-probs have moved from the data's at one inner update, as (sum, count).

    off_policy/old/*: r = p_current / p_old (start of the update); off_policy/rollout/*: r = p_current / p_rollout.

    - contribution_{positive,negative}: Sum over tokens of -(r - 1) A by sign of A, divided by ALL completion tokens
      (VeXact, eq. 5 [digest]); negative if the update follows the advantages.
    - m2: Mean of (log r)^2 over tokens in the loss, nats^2 (M2PO bounds m2 by 0.04 [digest]).
    - max: Mean over sequences of the largest |log r|, in nats.
    """
    keep = batch.loss_mask
    advantages = batch.advantages[:, None]
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    tokens = batch.rollout.completion_mask.sum()  # all rows: rows without advantage contribute 0
    rows = keep.any(-1).sum()
    for name, base in (("old", old), ("rollout", batch.rollout_logprobs)):
        if base is None:  # the rollout's log-probs are unknown
            continue
        log_ratio = torch.where(keep, logps - base, 0).double()
        part = -torch.expm1(log_ratio.clamp(-MAX_LOG, MAX_LOG)) * advantages
        metrics |= {
            f"off_policy/{name}/contribution_positive": (torch.where(advantages > 0, part, 0).sum(), tokens),
            f"off_policy/{name}/contribution_negative": (torch.where(advantages < 0, part, 0).sum(), tokens),
            f"off_policy/{name}/m2": (log_ratio.square().sum(), keep.sum()),
            f"off_policy/{name}/max": (log_ratio.abs().amax(-1).sum(), rows),
        }
    return metrics


def symptom_metrics(
    tokens: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    *,
    old: Float[Tensor, "B T"] | None = None,
) -> dict[str, float]:
    """Compute QaRL's early-warning metrics [digest], separately over the tokens with A > 0 and with A < 0.

    - symptoms/error_tokens_*: Share of tokens with p_learner < 1e-4; `old` must hold log-probs of single tokens
      (trajectory, causal), not of an ELBO.
    - symptoms/repetition_*: Share of tokens in a trigram that occurred earlier in the completion; trigrams may overlap.
    """
    error = None if old is None else mask & (old < math.log(1e-4))
    repeated = repeats(tokens, mask)
    metrics = {}
    for name, sign in (("positive", advantages > 0), ("negative", advantages < 0)):
        counted = mask & sign[:, None]
        total = max(counted.sum().item(), 1)
        if error is not None:
            metrics[f"symptoms/error_tokens_{name}"] = (error & counted).sum().item() / total
        metrics[f"symptoms/repetition_{name}"] = (repeated & counted).sum().item() / total
    return metrics


def repeats(tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Return the marked tokens inside a trigram that started earlier in the same row."""
    found = torch.zeros(mask.shape, dtype=torch.bool)
    for row, (ids, marked) in enumerate(zip(tokens.cpu(), mask.cpu(), strict=True)):
        places = marked.nonzero()[:, 0]
        words = ids[marked].tolist()
        seen = set[tuple[int, ...]]()
        for start in range(len(words) - 2):
            gram = tuple(words[start : start + 3])
            if gram in seen:
                found[row, places[start : start + 3]] = True
            seen.add(gram)
    return found.to(mask.device)
