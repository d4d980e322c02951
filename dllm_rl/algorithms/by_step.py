"""Corrector statistics per denoising step: early steps see few tokens and disagree in other ways than late steps."""

from dataclasses import replace
from functools import partial

import torch

from dllm_rl.algorithms.correctors import Corrector, TokenStats, TokenWeights, WeightFn, ais
from dllm_rl.members import configurable


def weights_by_step(stats: TokenStats, *, weight_fn: WeightFn) -> TokenWeights:
    """Weight the tokens of each denoising step as a separate batch [ours].

    A metric is the mean over the steps, each weighted by its number of tokens. `by_step` explains the keyword.
    """
    weights = torch.ones_like(stats.log_mismatch).detach()
    keep = torch.zeros_like(stats.mask)
    sums: dict[str, float] = {}
    steps, counts = stats.unmask_step[stats.mask].unique(return_counts=True)
    for step, count in zip(steps.tolist(), counts.tolist(), strict=True):
        mask = stats.mask & (stats.unmask_step == step)
        part = weight_fn(stats.among(mask))
        weights = torch.where(mask, part.importance_weights, weights)
        keep |= part.loss_mask
        for name, value in part.metrics.items():
            sums[name] = sums.get(name, 0.0) + value * count
    if not sums:  # no tokens: return the corrector's result for an empty mask
        return weight_fn(stats)
    return TokenWeights(weights, keep, {name: total / stats.mask.sum().item() for name, total in sums.items()})


@configurable
def by_step(*, corrector: Corrector | None = None) -> Corrector:
    """Make a corrector whose statistics cover one denoising step at a time.

    The statistics are the lambda of `ais`, the ratio of a sequence (over the tokens of one step) and the rejection of
    sequences. Token weights without batch statistics (`tis`, `icepop`) are the same with and without it.

    Args:
        corrector: Corrector to apply per step. None (default): `ais()`.

    Returns:
        A corrector with the same loss and reduction.
    """
    corrector = ais() if corrector is None else corrector
    return replace(corrector, weight_fn=partial(weights_by_step, weight_fn=corrector.weight_fn))
