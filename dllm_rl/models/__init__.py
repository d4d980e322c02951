"""Models: the policy interface, backbones, heads, adapters and checkpoints."""
