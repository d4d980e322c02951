"""Sudoku: the task, its graders, a solver and generator of grids."""

from dllm_rl.tasks.sudoku.task import Sudoku

__all__ = ["Sudoku"]
