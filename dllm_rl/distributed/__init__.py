"""Training in several processes: collectives, sharded weights, stopping together, detection of lost processes."""
