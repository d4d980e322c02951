"""A model's files: families, loading, tensors, adapters in peft's format."""
