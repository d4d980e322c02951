"""Sequence-likelihood estimators: masks as data, views of a rollout, and what combines them."""
