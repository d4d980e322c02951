"""Sequence-likelihood estimators: they draw masked views of a rollout, score every view, and combine the scores."""
