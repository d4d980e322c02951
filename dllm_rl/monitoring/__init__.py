"""A run's metrics: printed, written and drawn."""
