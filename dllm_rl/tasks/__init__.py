"""Tasks: prompts and graders. Text in, numbers out; no torch."""

from dllm_rl.tasks.adapters import DatasetTask, ReasoningGym, task_from_dataset
from dllm_rl.tasks.base import Problem, Reward, Task
from dllm_rl.tasks.countdown import Countdown
from dllm_rl.tasks.gsm8k import GSM8K
from dllm_rl.tasks.math500 import MATH500
from dllm_rl.tasks.mini import Mini
from dllm_rl.tasks.sudoku import Sudoku

__all__ = [
    "GSM8K",
    "MATH500",
    "Countdown",
    "DatasetTask",
    "Mini",
    "Problem",
    "ReasoningGym",
    "Reward",
    "Sudoku",
    "Task",
    "task_from_dataset",
]
