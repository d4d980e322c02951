"""TRIAGE (arXiv 2610.07043): damp the tokens that a low-bit rollout makes dangerous, and no others."""

from functools import partial

import torch
import torch.nn.functional as F

from dllm_rl.algorithms.correctors import Corrector, TokenStats, TokenWeights, drop_nonfinite
from dllm_rl.algorithms.losses import exp_ratio
from dllm_rl.bounds import Bound, bounded
from dllm_rl.members import configurable


@bounded(gate=Bound(at_least=0), window=Bound(at_least=1))
def triage_weights(stats: TokenStats, *, gate: float = 0.02, window: int = 64) -> TokenWeights:
    """W = rho = exp(log_mismatch) where the advantage is negative, the learner finds the token less likely than the
    rollout did (rho < 1), and the gate is open; 1 elsewhere.

    Pushing down a token that the learner holds for unlikely already is what drives it off. That only such tokens are
    damped, and that a gate decides per 64 tokens, is [digest]. The weight rho, and the gate, which opens where the mean
    |log_mismatch| of the window exceeds `gate`, are [ours]. `triage` explains the keywords.
    """
    log_mismatch, keep, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
    place = stats.mask.cumsum(-1).sub(1).clamp(min=0) // window  # windows are of corrected tokens: padding is in none
    windows = F.one_hot(place) * keep[..., None]  # (B, T, windows of a row)
    size = windows.sum(1).clamp(min=1)
    mean = (windows * log_mismatch.abs().double()[..., None]).sum(1) / size
    is_open = (mean > gate).gather(1, place)
    damped = keep & is_open & (log_mismatch < 0) & (stats.advantages < 0)[:, None]
    total = max(keep.sum().item(), 1)
    metrics["triage/open_fraction"] = (keep & is_open).sum().item() / total
    metrics["triage/damped_fraction"] = damped.sum().item() / total
    return TokenWeights(torch.where(damped, exp_ratio(log_mismatch), 1), keep, metrics)


@configurable
def triage(*, gate: float = 0.02, window: int = 64) -> Corrector:
    """Damping of unlikely tokens in answers of negative advantage; see `triage_weights`.

    Args:
        gate: Mean |log_mismatch| of a window above which its tokens are damped, nats.
        window: Tokens per window.
    """
    return Corrector(weight_fn=partial(triage_weights, gate=gate, window=window))
