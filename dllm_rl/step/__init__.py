"""One training step: collect samples, score them, correct for the mismatch, update the weights."""
