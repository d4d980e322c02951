"""A model's files: families, loading, tensors."""
