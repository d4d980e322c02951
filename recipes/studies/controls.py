"""Controls for studies of importance weights: correctors that mean to be worse, or to know nothing."""

from functools import partial
from typing import Any

import torch

from dllm_rl.algorithms.correctors import Corrector, TokenStats, TokenWeights, WeightFn, ais
from dllm_rl.members import configurable
from dllm_rl.rng import generator_for


def fixed_lambda(lam: float, **options: Any) -> Corrector:
    """AIS's mixture 1 + lam (w - 1) with lam the same in every batch: what an adaptive one must beat. Options are
    those of `ais`."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam={lam} must lie in [0, 1]")
    return ais(lambda_fn=partial(constant_lambda, lam=lam), **options)


def constant_lambda(reliability: float, divergence: float, variation: float, *, tau: float, lam: float) -> float:
    return lam


def shuffled(corrector: Corrector, *, seed: int = 0) -> Corrector:
    """The corrector with its weights dealt out anew over the tokens that it keeps: as large and as many, of other
    tokens. What remains of its effect is not due to which tokens it weighs."""
    return Corrector(partial(shuffled_weights, weight_fn=corrector.weight_fn, seed=seed), corrector.loss)


def shuffled_weights(stats: TokenStats, *, weight_fn: WeightFn, seed: int) -> TokenWeights:
    """The order is a function of (seed, number of tokens)."""
    weights, keep, metrics = weight_fn(stats)
    given = weights[keep]
    order = torch.randperm(len(given), generator=generator_for(seed, "shuffled weights", len(given)))
    weights = weights.clone()
    weights[keep] = given[order.to(given.device)]
    return TokenWeights(weights, keep, metrics)


@configurable
def permuted(corrector: Corrector) -> Corrector:
    """Make a corrector's control without draws: the same weights on other tokens (`weights_of_next_tokens`)."""
    return Corrector(weight_fn=partial(weights_of_next_tokens, weight_fn=corrector.weight_fn))


def weights_of_next_tokens(stats: TokenStats, *, weight_fn: WeightFn) -> TokenWeights:
    """The weights of `weight_fn`, each corrected token with that of the next one, by column and then by row: as large
    and as many, and nothing to do with their token. Nothing is drawn, unlike in `shuffled`."""
    weights, keep, metrics = weight_fn(stats)
    moved = torch.ones_like(weights)
    moved.T[stats.mask.T] = weights.T[stats.mask.T].roll(1)
    return TokenWeights(moved, keep, metrics)
