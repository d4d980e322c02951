"""Evaluating a policy on a task, storing completions and grading them again."""
