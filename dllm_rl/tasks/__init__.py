"""Tasks: prompts and graders. Text in, numbers out; no torch."""

from dllm_rl.tasks.base import Problem, Reward, Task
from dllm_rl.tasks.sudoku import Sudoku

__all__ = ["Problem", "Reward", "Sudoku", "Task"]
