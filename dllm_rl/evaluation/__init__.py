"""Evaluating a policy on a task, storing completions and regrading them."""
