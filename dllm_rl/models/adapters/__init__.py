"""LoRA: adapters on linear layers and stacked experts, and merged into them."""
