"""How far the rollout policy and the learner disagree on the sampled tokens (training-inference mismatch).

log_mismatch = logp_old - logp_rollout per token, nats; rho = exp(log_mismatch). Names follow verl. Functions take the
mask from BEFORE any rejection and the GLOBAL batch. Tokens whose log_mismatch is not finite are left out and counted.

Only the rows that the step learns from and a random sample of the other groups are scored. Each row is weighted by its
inverse sampling fraction (0 if not scored), so that sums over scored rows estimate sums over all.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.algorithms.losses import MAX_LOG
from dllm_rl.types import Batch

PREFIX = "rollout_corr/"
STEP_GROUPS = 8  # at most, of `step_metrics`


@dataclass(frozen=True)
class _Measured:
    log_mismatch: Float[Tensor, "B T"]  # fp64, 0 where not `finite`
    finite: Bool[Tensor, "B T"]  # tokens of scored rows whose ratio is finite
    token_weights: Float[Tensor, " K"]  # of those tokens
    row_weights: Float[Tensor, " R"]  # of the rows that have one
    num_tokens: Float[Tensor, ""]  # of ALL rows, less the estimated non-finite ones
    num_rows: Float[Tensor, ""]  # the same of rows
    lost: Float[Tensor, ""]  # share of non-finite tokens

    @property
    def rows(self) -> Bool[Tensor, " B"]:
        return self.finite.any(-1)

    def per_token(self, values: Float[Tensor, " K"]) -> Float[Tensor, ""]:
        """Mean over the tokens of all rows."""
        return (values * self.token_weights).sum() / self.num_tokens  # the known number, so that the mean is unbiased

    def per_row(self, values: Float[Tensor, " R"]) -> Float[Tensor, ""]:
        return (values * self.row_weights).sum() / self.num_rows

    def row_means(self, values: Float[Tensor, "B T"]) -> Float[Tensor, " R"]:
        """Each scored row's mean over its finite tokens."""
        return torch.where(self.finite, values, 0).sum(-1)[self.rows] / self.finite.sum(-1)[self.rows]

    def spread(self, values: Float[Tensor, " K"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Weighted mean and mean square over tokens."""
        total = self.token_weights.sum()  # under both, so that mean^2 / mean square stays in (0, 1]
        return (values * self.token_weights).sum() / total, (values.square() * self.token_weights).sum() / total


def _measured(
    log_mismatch: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], row_weights: Float[Tensor, " B"] | None
) -> _Measured:
    """Raises ValueError when no scored row has a token with a finite ratio."""
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
    """The `rollout_corr/` set over the marked tokens; exactly 0 / exactly 1 where both policies agree bit for bit,
    which only zero_mismatch promises: otherwise an unquantised rollout agrees with the learner to rounding.

    rollout_is_*  of the token weights min(rho, high): see `weight_metrics`
    ess, rho_max  of the raw rho: 1 / mean((rho / mean rho)^2) in (0, 1], and the largest (not verl's)
    kl, k3_kl  mean(-log rho), mean(rho - 1 - log rho), nats
    abs_log_ratio_{mean,max}  of |log rho|, nats
    log_ppl_{diff,abs_diff,diff_max,diff_min}  over sequences, of the sequence's mean of -log rho
    ppl_ratio  mean over sequences of exp of the same
    chi2_token, chi2_seq  mean of rho^2 - 1 over tokens, of (prod rho)^2 - 1 over sequences
    {training,rollout}_{ppl,log_ppl}  with `old`: mean over sequences of exp(-mean_t logp), and of -mean_t logp
    contribution_{positive,negative}  with `advantages`: -(rho - 1) A mean over tokens, by sign of A (VeXact [digest])
    nonfinite_fraction, rows  share of marked tokens left out; number of scored rows
    Log-ratios are clamped to +-20 before exp. Raises ValueError when no marked token has a finite ratio.

    Args:
        row_weights: Inverse sampling fraction per row, 0 where not scored (`group_weights`); None: all are. `mask`
            marks ALL rows. Means are unbiased for all rows while ratios are finite; ess, rollout_is_std and
            eff_sample_size are only consistent; extremes are of scored rows.
    """
    scored = _measured(log_mismatch, mask, row_weights)
    flat = scored.log_mismatch[scored.finite]
    excess = torch.expm1(flat.clamp(-MAX_LOG, MAX_LOG))  # rho - 1: means about 1 are exact where all agree
    rho = flat.clamp(-MAX_LOG, MAX_LOG).exp()
    sums = scored.log_mismatch.sum(-1)[scored.rows]
    log_ppl = -scored.row_means(scored.log_mismatch)
    mean, _ = scored.spread(rho)
    _, square = scored.spread(rho / mean)  # divided first: where all agree it is exactly 1
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
    """Verl's rollout_is_* set for truncated weights w = min(rho, high).

    mean, std, eff_sample_size, min, max  of w over tokens: population std, and 1 / mean((w / mean w)^2). verl's
                                          eff_sample_size clamps weights to [1 / high, high], and so is larger
    ratio_fraction_{high,low}  share of tokens with rho > high, < 1/high
    seq_{mean,std,min,max,max_deviation}  over sequences, of the row's mean w; sample std; largest |mean w - 1|
    seq_fraction_{high,low}  share of rows whose mean rho is > high, < 1/high
    `row_weights` and errors are as in `mismatch_metrics`.
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
    centre = 1 + scored.per_row(seq - 1)  # about 1, so that it is exact where all agree
    bessel = scored.num_rows / (scored.num_rows - 1).clamp(min=1)  # of one row the deviation is 0
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
    """The largest |log rho| and its 99th percentile, nats, by the denoising step that wrote the token.

    With more than STEP_GROUPS steps, step_K is the K-th of as many equal parts of the longest completion's steps. The
    percentile is the least value with at least 99 % of the values at or below it. Tokens whose ratio is not finite are
    left out; a step without a token has no metric.
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
    """How far the current log-probs have moved from the data's at one inner update, as (sum, count).

    off_policy/old/*: r = p_current / p_old (start of the update); off_policy/rollout/*: r = p_current / p_rollout.
    contribution_{positive,negative}  -(r - 1) A summed over tokens by sign of A, divided by ALL completion tokens
                                      (VeXact, eq. 5 [digest]); negative where the update follows the advantages
    m2   mean over kept tokens of (log r)^2, nats^2 (M2PO bounds m2 by 0.04 [digest])
    max  mean over sequences of the largest |log r|, nats
    """
    keep = batch.loss_mask
    advantages = batch.advantages[:, None]
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    tokens = batch.rollout.completion_mask.sum()  # of all rows: those without advantage contribute 0
    rows = keep.any(-1).sum()
    for name, base in (("old", old), ("rollout", batch.rollout_logprobs)):
        if base is None:  # the rollout's are not known
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
    """QaRL's early-warning metrics [digest], each over the tokens with A > 0 and those with A < 0.

    symptoms/error_tokens_*  share of tokens with p_learner < 1e-4; `old` must hold log-probs of single tokens
                             (trajectory, causal), not an ELBO's
    symptoms/repetition_*  share inside a trigram that occurred earlier in the completion; trigrams may overlap
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
    """Marked tokens inside a trigram that started earlier in the same row."""
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
