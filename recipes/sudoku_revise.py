"""A small model that edits learns 4x4 Sudoku by GRPO: FP8 rollouts that draw written cells again, with exact ratios.

The warm-up replaces three tenths of the visible cells and predicts all of them, so that the model learns which ones are
wrong; edits ruin a model that has learned masks alone. A step of the sampler writes a quarter of the grid, and draws
each written cell again with probability 0.1 (`SoftEdit`). `Trajectory()` scores every writing.
"""

from dataclasses import replace

from dllm_rl import MaxProb, SoftEdit, Unmask, main
from recipes.sudoku_unique import recipe as base

unmask_in_four = Unmask(max_new_tokens=16, diffusion_steps=4, rank=MaxProb())
edit_in_four = unmask_in_four.replace(commit=SoftEdit(rate=0.1))

recipe = replace(
    base,
    name="sudoku-revise",
    sampler=edit_in_four.replace(temperature=1.0),
    eval_sampler=edit_in_four.replace(temperature=0.0),
    sft_warmup_corruption=0.3,
    train_batch_size=16,
    max_retained_graphs=4,
    num_steps=120,
    eval_steps=30,
)

if __name__ == "__main__":
    main(recipe)
