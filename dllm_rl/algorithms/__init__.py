"""Pure functions on rewards (B,) and log-probs (B, T): advantages, correctors, losses, metrics. They use no model."""
