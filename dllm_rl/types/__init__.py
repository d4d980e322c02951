"""Records of tensors that the stages of a training step pass to each other: rollouts, views, batches."""
