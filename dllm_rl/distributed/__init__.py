"""Several processes: collectives, sharded weights, a common stop, the watch over one another."""
