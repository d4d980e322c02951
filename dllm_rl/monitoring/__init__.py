"""What a run prints, writes and draws of its metrics."""
