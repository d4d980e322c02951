"""Countdown: the task, its graders, and a reader of expressions."""

from dllm_rl.tasks.countdown.task import Countdown

__all__ = ["Countdown"]
