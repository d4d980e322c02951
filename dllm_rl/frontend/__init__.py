"""`grpo`: training in one call, with TRL's names."""
