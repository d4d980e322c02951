"""How far the rollout policy and the learner disagree on the tokens that were sampled (training-inference mismatch).

log_mismatch = logp_old - logp_rollout per token, nats; rho = exp(log_mismatch). Names are verl's. Every function takes
the mask from BEFORE any rejection and the GLOBAL batch.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.losses import MAX_LOG


def mismatch_metrics(
    log_mismatch: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, high: float = 2.0
) -> dict[str, float]:
    """verl's `rollout_corr/` set over the marked tokens; exactly 0 / exactly 1 where both policies agree bit for bit.

    rollout_is_{mean,std,min,max}   of rho, per token
    rollout_is_eff_sample_size      1 / mean((rho / mean rho)^2), in (0, 1]
    rollout_is_ratio_fraction_{high,low}   share of tokens with rho > high, rho < 1/high
    kl = mean(-log rho), k3_kl = mean(rho - 1 - log rho), abs_log_ratio_mean and _max = mean and max |log rho|, nats
    log_ppl_diff   mean over sequences of the sequence's mean of -log rho
    chi2_token = mean rho^2 - 1,  chi2_seq = mean over sequences of (prod rho)^2 - 1
    Log-ratios are clamped to +-20 before exp. Raises ValueError when no token is marked.
    """
    if not mask.any():
        raise ValueError("mask marks no token: there is no mismatch to measure")
    flat = log_mismatch[mask].double()
    rho = flat.clamp(-MAX_LOG, MAX_LOG).exp()
    per_row = torch.where(mask, log_mismatch, 0).double().sum(-1)[mask.any(-1)]
    lengths = mask.sum(-1)[mask.any(-1)]
    values = {
        "rollout_is_mean": rho.mean(),
        "rollout_is_std": rho.std(correction=0),
        "rollout_is_min": rho.min(),
        "rollout_is_max": rho.max(),
        "rollout_is_eff_sample_size": 1 / (rho / rho.mean()).square().mean(),
        "rollout_is_ratio_fraction_high": (rho > high).double().mean(),
        "rollout_is_ratio_fraction_low": (rho < 1 / high).double().mean(),
        "kl": -flat.mean(),
        "k3_kl": (torch.expm1(flat.clamp(-MAX_LOG, MAX_LOG)) - flat).mean(),
        "abs_log_ratio_mean": flat.abs().mean(),
        "abs_log_ratio_max": flat.abs().max(),
        "log_ppl_diff": -(per_row / lengths).mean(),
        "chi2_token": rho.square().mean() - 1,
        "chi2_seq": (2 * per_row).clamp(-MAX_LOG, MAX_LOG).exp().mean() - 1,
    }
    return {f"rollout_corr/{name}": value.item() + 0.0 for name, value in values.items()}
