"""How far the rollout policy and the learner disagree on the tokens that were sampled (training-inference mismatch).

log_mismatch = logp_old - logp_rollout per token, nats; rho = exp(log_mismatch). Names and definitions are verl's where
it has them. Every function takes the mask from BEFORE any rejection and the GLOBAL batch. A row without tokens is no
sequence; a token whose log_mismatch is not finite is left out and counted.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.algorithms.losses import MAX_LOG

PREFIX = "rollout_corr/"


def mismatch_metrics(
    log_mismatch: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    high: float = 2.0,
    old: Float[Tensor, "B T"] | None = None,
    advantages: Float[Tensor, " B"] | None = None,
) -> dict[str, float]:
    """The `rollout_corr/` set over the marked tokens; exactly 0 / exactly 1 where both policies agree bit for bit.

    rollout_is_*        of the token weights min(rho, high): see `weight_metrics`
    ess, rho_max        of the raw rho: 1 / mean((rho / mean rho)^2) in (0, 1], and the largest (not verl's)
    kl = mean(-log rho), k3_kl = mean(rho - 1 - log rho), abs_log_ratio_{mean,max} of |log rho|, nats
    log_ppl_{diff,abs_diff,diff_max,diff_min}   over sequences, of the sequence's mean of -log rho
    ppl_ratio           mean over sequences of exp of the same
    chi2_token = mean rho^2 - 1,  chi2_seq = mean over sequences of (prod rho)^2 - 1
    training_ppl, training_log_ppl, rollout_ppl, rollout_log_ppl   with `old` (the learner's log-probs): mean over
                        sequences of exp(-mean_t logp), and of -mean_t logp
    contribution_{positive,negative}   with `advantages`: -(rho - 1) A averaged over all tokens, split by sign of A
                        (VeXact [digest]: k1 and k3 stay flat while these do not)
    nonfinite_fraction  share of marked tokens left out
    Log-ratios are clamped to +-20 before exp. Raises ValueError when no token is marked, or none has a finite ratio.
    """
    finite = mask & log_mismatch.isfinite()
    if not finite.any():
        raise ValueError("mask marks no token with a finite log_mismatch: there is no mismatch to measure")
    x = torch.where(finite, log_mismatch, 0).double()
    flat = x[finite]
    rho = flat.clamp(-MAX_LOG, MAX_LOG).exp()
    rows, lengths = finite.any(-1), finite.sum(-1)
    sums, lengths = x.sum(-1)[rows], lengths[rows]
    log_ppl = -sums / lengths
    values = {
        "ess": 1 / (rho / rho.mean()).square().mean(),
        "rho_max": rho.max(),
        "kl": -flat.mean(),
        "k3_kl": (torch.expm1(flat.clamp(-MAX_LOG, MAX_LOG)) - flat).mean(),
        "abs_log_ratio_mean": flat.abs().mean(),
        "abs_log_ratio_max": flat.abs().max(),
        "log_ppl_diff": log_ppl.mean(),
        "log_ppl_abs_diff": log_ppl.abs().mean(),
        "log_ppl_diff_max": log_ppl.max(),
        "log_ppl_diff_min": log_ppl.min(),
        "ppl_ratio": log_ppl.clamp(-MAX_LOG, MAX_LOG).exp().mean(),
        "chi2_token": rho.square().mean() - 1,
        "chi2_seq": (2 * sums.clamp(-MAX_LOG, MAX_LOG)).exp().mean() - 1,
        "nonfinite_fraction": 1 - finite.sum().double() / mask.sum(),
    }
    if old is not None:
        training = torch.where(finite, old, 0).double().sum(-1)[rows] / lengths
        for name, log_prob in (("training", training), ("rollout", training + log_ppl)):
            values[f"{name}_ppl"], values[f"{name}_log_ppl"] = (-log_prob).exp().mean(), -log_prob.mean()
    if advantages is not None:
        part = -torch.expm1(x.clamp(-MAX_LOG, MAX_LOG)) * advantages.double()[:, None]
        for name, sign in (("positive", advantages > 0), ("negative", advantages < 0)):
            values[f"contribution_{name}"] = part[finite & sign[:, None]].sum() / finite.sum()
    return weight_metrics(log_mismatch, mask, high=high) | {PREFIX + name: v.item() + 0.0 for name, v in values.items()}


def weight_metrics(
    log_mismatch: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    high: float = 2.0,
    low: float | None = None,
    level: str = "token",
) -> dict[str, float]:
    """verl's rollout_is_* set for truncated weights (low None) or weights masked outside [low, high].

    rho_t per token, or the row's product with level "sequence"; w = min(rho, high), or rho inside [low, high] else 0.
    mean, std, eff_sample_size = 1 / mean((w / mean w)^2)   of w over tokens, population std
    min, max                of w over tokens; of the raw product over sequences at level "sequence"
    ratio_fraction_{high,low}   share with raw rho > high, < low (default 1/high): of tokens, or of sequences
    oob_ratio               with `low`: share of tokens outside
    seq_{mean,std,min,max,max_deviation}   over sequences, of the row's mean w; sample std; largest |mean w - 1|
    seq_fraction_{high,low}     share of rows whose mean raw rho is > high, < low
    """
    finite = mask & log_mismatch.isfinite()
    if not finite.any():
        raise ValueError("mask marks no token with a finite log_mismatch: there is no mismatch to measure")
    x = torch.where(finite, log_mismatch, 0).double()
    rows = finite.any(-1)
    if level == "sequence":
        x = torch.where(finite, x.sum(-1, keepdim=True), 0)
    elif level != "token":
        raise ValueError(f"level={level!r} must be 'token' or 'sequence'")
    raw = x.clamp(-MAX_LOG, MAX_LOG).exp()
    floor = 1 / high if low is None else low
    w = raw.clamp(max=high) if low is None else raw.masked_fill((raw < low) | (raw > high), 0)
    one = lambda tensor: torch.where(finite, tensor, 0).sum(-1)[rows] / finite.sum(-1)[rows]  # noqa: E731
    flat, each = w[finite], raw[finite] if level == "token" else one(raw)
    extremes = flat if level == "token" else each
    seq, raw_seq = one(w), one(raw)
    mean = flat.mean()
    values = {
        "mean": mean,
        "std": flat.std(correction=0),
        "min": extremes.min(),
        "max": extremes.max(),
        # Every weight zero: no sample is left.
        "eff_sample_size": 1 / (flat / mean).square().mean() if mean > 0 else mean,
        "ratio_fraction_high": (each > high).double().mean(),
        "ratio_fraction_low": (each < floor).double().mean(),
        "seq_mean": seq.mean(),
        "seq_std": seq.std() if len(seq) > 1 else torch.zeros(()),
        "seq_min": seq.min(),
        "seq_max": seq.max(),
        "seq_max_deviation": (seq - 1).abs().max(),
        "seq_fraction_high": (raw_seq > high).double().mean(),
        "seq_fraction_low": (raw_seq < floor).double().mean(),
    }
    if low is not None:
        values["oob_ratio"] = ((raw < low) | (raw > high))[finite].double().mean()
    return {f"{PREFIX}rollout_is_{name}": v.item() + 0.0 for name, v in values.items()}


def symptom_metrics(
    tokens: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    *,
    old: Float[Tensor, "B T"] | None = None,
    threshold: float = 1e-4,
    ngram: int = 3,
) -> dict[str, float]:
    """QaRL's early-warning metrics [digest], each over the tokens with A > 0 and those with A < 0.

    symptoms/error_tokens_*  share with p_learner < threshold, although the rollout sampled them; with `old`, which must
                             hold log-probs of single tokens (trajectory, causal), not an ELBO's contributions.
    symptoms/repetition_*    share inside an n-gram that stood earlier in the same completion; n-grams may overlap.
    A sign without tokens gives 0.
    """
    error = None if old is None else mask & (old < math.log(threshold))
    repeated = repeats(tokens, mask, ngram=ngram)
    metrics = {}
    for name, sign in (("positive", advantages > 0), ("negative", advantages < 0)):
        counted = mask & sign[:, None]
        total = max(counted.sum().item(), 1)
        if error is not None:
            metrics[f"symptoms/error_tokens_{name}"] = (error & counted).sum().item() / total
        metrics[f"symptoms/repetition_{name}"] = (repeated & counted).sum().item() / total
    return metrics


def repeats(tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, ngram: int = 3) -> Bool[Tensor, "B T"]:
    """Marked tokens inside an n-gram of the row's marked tokens that occurred, starting earlier, in the same row."""
    if ngram < 1:
        raise ValueError(f"ngram={ngram} must be at least 1")
    found = torch.zeros(mask.shape, dtype=torch.bool)
    for row, (ids, marked) in enumerate(zip(tokens.cpu(), mask.cpu(), strict=True)):
        places, seen = marked.nonzero()[:, 0], set()
        words = ids[marked].tolist()
        for start in range(len(words) - ngram + 1):
            gram = tuple(words[start : start + ngram])
            if gram in seen:
                found[row, places[start : start + ngram]] = True
            seen.add(gram)
    return found.to(mask.device)
