"""What a run would do and take, without running it."""
