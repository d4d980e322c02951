"""Processes: collectives, weights held between them, a stop that all agree on, the watch over each other."""
