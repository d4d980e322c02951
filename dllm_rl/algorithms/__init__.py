"""Pure functions on rewards (P, G) and log-probs (B, T): advantages, correctors, losses, metrics. They use no model."""
