"""Sequence-likelihood estimators: masks as data, views of a rollout, and what combines them."""

from dllm_rl.likelihoods.estimators import (
    LikelihoodEstimator,
    block,
    causal,
    coupled,
    elbo,
    eubo,
    one_step,
    quadrature,
    sandwich,
    trajectory,
)

__all__ = [
    "LikelihoodEstimator",
    "block",
    "causal",
    "coupled",
    "elbo",
    "eubo",
    "one_step",
    "quadrature",
    "sandwich",
    "trajectory",
]
