"""Correctors of the studies: controls that mean to be worse or to know nothing, and one that keeps each view's size."""

from functools import partial
from typing import Any

import torch

from dllm_rl.algorithms.correctors import AIS, TIS, Corrector, TokenStats, TokenWeights
from dllm_rl.algorithms.losses import Loss
from dllm_rl.rng import generator_for


def fixed_lambda(lam: float, **options: Any) -> Corrector:
    """AIS's mixture 1 + lam (w - 1) with lam the same in every batch: what an adaptive one must beat. Options are
    those of `AIS`."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam={lam} must lie in [0, 1]")
    return AIS(lambda_fn=partial(constant_lambda, lam=lam), **options)


def constant_lambda(reliability: float, divergence: float, variation: float, *, tau: float, lam: float) -> float:
    return lam


class Shuffled(Corrector):
    """A corrector with its weights dealt out anew over the tokens that it keeps: as large and as many, of other tokens.

    What remains of its effect is not due to which tokens it weighs. The order is a function of (seed, number of
    tokens).

    Args:
        corrector: The corrector, whose loss stays.
        seed: Seed of the order. Default: 0.
    """

    corrector: Corrector
    seed: int = 0

    @property
    def loss(self) -> Loss | None:
        return self.corrector.loss

    def weights(self, stats: TokenStats) -> TokenWeights:
        weights, keep, metrics = self.corrector.weights(stats)
        given = weights[keep]
        order = torch.randperm(len(given), generator=generator_for(self.seed, "shuffled weights", len(given)))
        weights = weights.clone()
        weights[keep] = given[order.to(given.device)]
        return TokenWeights(weights, keep, metrics)


class Permuted(Corrector):
    """A corrector's control without draws: its weights, each corrected token with that of the next one.

    The next one is by column and then by row: as large and as many weights, which have nothing to do with their token.

    Args:
        corrector: The corrector.
    """

    corrector: Corrector

    def weights(self, stats: TokenStats) -> TokenWeights:
        weights, keep, metrics = self.corrector.weights(stats)
        moved = torch.ones_like(weights)
        moved.T[stats.mask.T] = weights.T[stats.mask.T].roll(1)
        return TokenWeights(moved, keep, metrics)


class MeanOne(Corrector):
    """A corrector's weights, divided by their mean over the tokens of the batch that one view scores.

    `Trajectory(num_segments=num_views)` scores the tokens of step s of `num_steps` in view s * num_views // num_steps.
    Weights from an estimate may be small or large throughout a view; this keeps the view's part of the gradient.

    Args:
        num_views: Number of views.
        num_steps: Number of denoising steps of a row.
        corrector: The corrector. Default: TIS().
    """

    num_views: int
    num_steps: int
    corrector: Corrector = TIS()

    def weights(self, stats: TokenStats) -> TokenWeights:
        weights, keep, metrics = self.corrector.weights(stats)
        view = stats.unmask_step * self.num_views // self.num_steps
        weights = weights.clone()
        for number in range(self.num_views):
            scored = keep & (view == number)
            if scored.any() and (size := weights[scored].mean()) > 0:
                weights = torch.where(scored, weights / size, weights)
        return TokenWeights(weights, keep, metrics)
