"""Corrections of the training-inference mismatch: three seams with neutral defaults, so that methods compose.

log_mismatch = logp_old - logp_rollout per token (nats), over the GLOBAL batch: all rows of all processes. Weights are
detached and multiply the surrogate, before any KL term.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.losses import MAX_LOG, ppo_clip

Weigh = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, dict[str, float]]]
Surrogate = Callable[[Tensor, Tensor, Tensor], Tensor]


def no_weights(
    log_mismatch: Float[Tensor, "B T"], advantages: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"], dict[str, float]]:
    """Every weight 1, every token kept."""
    return torch.ones_like(log_mismatch), mask, {}


@dataclass(frozen=True)
class Corrector:
    """weigh          (log_mismatch (B, T), advantages (B,), mask (B, T)) -> detached weights, keep mask, metrics.
    surrogate      (log_ratio (B, T), advantages (B,), mask (B, T)) -> per-token objective (B, T).
    align_forward  the learner's forward runs through the rollout's quantised operands.
    """

    weigh: Weigh = no_weights
    surrogate: Surrogate = partial(ppo_clip, epsilon=0.2)
    align_forward: bool = False


def truncated(
    log_mismatch: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    cap: float = 2.0,
    level: Literal["token", "sequence"] = "token",
    aggregate: Literal["product", "geometric"] = "product",
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"], dict[str, float]]:
    """Truncated importance weights, w = min(rho, cap) [paper: TIS].

    token     rho_t = exp(log_mismatch_t)
    sequence  one rho for the row: exp(sum_t) with `product`, exp(mean_t) with `geometric`.
    """
    log_w = per_level(log_mismatch, mask, level=level, aggregate=aggregate)
    weights = log_w.clamp(-MAX_LOG, MAX_LOG).exp()
    capped = (weights > cap)[mask].double().mean().item() if mask.any() else 0.0
    return weights.clamp(max=cap).detach(), mask, {"tis/capped_fraction": capped}


def per_level(
    log_mismatch: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, level: str, aggregate: str
) -> Float[Tensor, "B T"]:
    """The log-ratio at token level, or the row's sum or mean of it spread over the row; 0 off the mask."""
    log_w = torch.where(mask, log_mismatch, 0)
    if level == "token":
        return log_w
    if level != "sequence":
        raise ValueError(f"level={level!r} must be 'token' or 'sequence'")
    total = log_w.sum(-1, keepdim=True)
    if aggregate == "geometric":
        total = total / mask.sum(-1, keepdim=True).clamp(min=1)
    elif aggregate != "product":
        raise ValueError(f"aggregate={aggregate!r} must be 'product' or 'geometric'")
    return torch.where(mask, total, 0)


def none() -> Corrector:
    """No correction: weight 1 everywhere."""
    return Corrector()


def tis(
    *,
    cap: float = 2.0,
    level: Literal["token", "sequence"] = "token",
    aggregate: Literal["product", "geometric"] = "product",
) -> Corrector:
    """Truncated importance sampling; see `truncated`."""
    return Corrector(weigh=partial(truncated, cap=cap, level=level, aggregate=aggregate))
