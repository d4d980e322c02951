"""Correctors per denoising step: the mismatch of early steps, which see few tokens, differs from that of late steps.

docs/methods.md explains the tag [ours].
"""

from dataclasses import replace
from functools import partial

import torch

from dllm_rl.algorithms.correctors import Corrector, TokenStats, TokenWeights, WeightFn, ais
from dllm_rl.members import configurable


def weights_by_step(stats: TokenStats, *, weight_fn: WeightFn) -> TokenWeights:
    """Apply `weight_fn` to the tokens of each denoising step separately [ours].

    Each metric is averaged over the steps, weighted by their numbers of tokens.
    """
    weights = torch.ones_like(stats.log_mismatch).detach()
    loss_mask = torch.zeros_like(stats.mask)
    weighted_sums: dict[str, float] = {}
    steps, counts = stats.unmask_step[stats.mask].unique(return_counts=True)
    for step, count in zip(steps.tolist(), counts.tolist(), strict=True):
        step_mask = stats.mask & (stats.unmask_step == step)
        result = weight_fn(stats.among(step_mask))
        weights = torch.where(step_mask, result.importance_weights, weights)
        loss_mask |= result.loss_mask
        for name, value in result.metrics.items():
            weighted_sums[name] = weighted_sums.get(name, 0.0) + value * count
    if not weighted_sums:  # no tokens: return the corrector's result for an empty mask
        return weight_fn(stats)
    num_tokens = stats.mask.sum().item()
    return TokenWeights(weights, loss_mask, {name: total / num_tokens for name, total in weighted_sums.items()})


@configurable
def by_step(*, corrector: Corrector | None = None) -> Corrector:
    """Make a corrector whose statistics cover one denoising step at a time.

    Use it if the mismatch differs between early and late steps. The lambda of `ais`, sequence ratios and sequence
    rejection are then computed over the tokens of one step. A corrector that weights each token by its ratio alone
    (`tis` and `icepop` by default) does not change.

    Args:
        corrector: Corrector to apply per step. None (default): `ais()`.

    Returns:
        A corrector with the same loss and reduction.
    """
    corrector = ais() if corrector is None else corrector
    return replace(corrector, weight_fn=partial(weights_by_step, weight_fn=corrector.weight_fn))
