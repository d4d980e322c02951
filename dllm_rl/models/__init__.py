"""Backbones: how a checkpoint maps onto a stock transformers class, and small models made from scratch."""
