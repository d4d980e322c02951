"""Writes d1's prompts, and the 256 puzzles of Sudoku that its evaluation draws, into the present folder.

In `eval` of a copy of github.com/dllm-reasoning/d1 (its modules run):

    python REPOSITORY/recipes/examples/d1_prompts.py

d1 reports of LLaDA-8B-Instruct at 128, 256 and 512 tokens, in percent (arXiv 2504.12216):

    Sudoku, `cell_accuracy`   11.7   6.7   5.5
    Countdown, `accuracy`     20.7  19.5  16.0
    GSM8K, `accuracy`         68.7  76.7  78.2
    MATH500, `accuracy`       26.0  32.4  36.2
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, "")
countdown, gsm8k, math500, sudoku = map(importlib.import_module, ("countdown", "gsm8k", "math500", "sudoku"))
Path("sudoku.txt").write_text(sudoku.SUDOKU_SYSTEM_PROMPT + "\n\nSolve the following Sudoku puzzle: {cells}\n")
Path("countdown.txt").write_text(countdown.CTD_SYSTEM_PROMPT + "\n\nNumbers: [{numbers}]\nTarget: {target}")
Path("gsm8k.txt").write_text(gsm8k.GSM_SYSTEM_PROMPT + "\n\n{question}")
Path("math500.txt").write_text(math500.MATH500_SYSTEM_PROMPT + "\n\n{problem}")
puzzles = pd.read_csv("../dataset/4x4_test_sudoku.csv", dtype=str)
drawn = np.random.RandomState(42).choice(500, 256, replace=False)
puzzles.iloc[drawn].to_csv("sudoku.csv", index=False)
