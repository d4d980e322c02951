"""A corrector's statistics per denoising step: early steps, which see little, disagree in other ways than late ones."""

from dataclasses import replace
from functools import partial

import torch

from dllm_rl.algorithms.correctors import Corrector, TokenStats, TokenWeights, WeightFn, ais
from dllm_rl.members import configurable


def weights_by_step(stats: TokenStats, *, weight_fn: WeightFn) -> TokenWeights:
    """Weigh the tokens of each denoising step as a batch of their own [ours]. A metric is the mean over the steps, each
    weighted by its tokens.
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
    if not sums:  # no token at all: whatever the corrector says of that
        return weight_fn(stats)
    return TokenWeights(weights, keep, {name: total / stats.mask.sum().item() for name, total in sums.items()})


@configurable
def by_step(*, corrector: Corrector | None = None) -> Corrector:
    """A corrector whose statistics are of one denoising step at a time: AIS's lambda, the ratio of a sequence (of its
    tokens of a step), rejection. Token weights of their own (`tis`, `icepop`) are the same with it and without.

    Args:
        corrector: Whose weights they are; None: `ais()`.
    """
    corrector = ais() if corrector is None else corrector
    return replace(corrector, weight_fn=partial(weights_by_step, weight_fn=corrector.weight_fn))
