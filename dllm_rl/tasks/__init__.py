"""Tasks: prompts and graders. Text in, numbers out; no torch."""

from dllm_rl.tasks.base import Problem, Reward, Task
from dllm_rl.tasks.code import Code
from dllm_rl.tasks.countdown import Countdown
from dllm_rl.tasks.datasets import DatasetTask, task_from_dataset
from dllm_rl.tasks.math import GSM8K, MATH500
from dllm_rl.tasks.sudoku import Sudoku

__all__ = [
    "GSM8K",
    "MATH500",
    "Code",
    "Countdown",
    "DatasetTask",
    "Problem",
    "Reward",
    "Sudoku",
    "Task",
    "task_from_dataset",
]
