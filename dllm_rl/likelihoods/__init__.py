"""Sequence-likelihood estimators: masks as data, views of a rollout, and the functions that combine the views."""
