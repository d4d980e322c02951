"""LoRA: adapters beside linear layers and stacked experts, and merged into them."""
