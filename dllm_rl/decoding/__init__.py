"""Tokens, order and support: what sampler and likelihoods share, and no model."""
