"""Samplers: functions (policy, prompts, generator) -> Rollout."""
