"""Tasks: prompts and graders. Text in, numbers out; no torch."""

from dllm_rl.tasks.base import Problem, Reward, Task

__all__ = ["Problem", "Reward", "Task"]
