"""sudoku_unique on 9x9 Sudoku with 50 to 60 clues: 81 cells in nine parallel steps. Not run yet: no results."""

from dataclasses import replace
from functools import partial

from dllm_rl import MaxProb, Unmask, main, tiny_masked_lm
from dllm_rl.tasks import Sudoku
from recipes.sudoku_unique import recipe as base

puzzles = partial(Sudoku, side=9, clues=(50, 60))
unmask_in_nine = Unmask(max_new_tokens=81, diffusion_steps=9, rank=MaxProb())

recipe = replace(
    base,
    name="sudoku-9x9",
    model=partial(tiny_masked_lm, characters="123456789.=", max_length=163),
    task=puzzles(split="train"),
    validation_task=puzzles(split="validation", size=200),
    eval_task=puzzles(split="test", size=400),
    sampler=unmask_in_nine.replace(temperature=1.0),
    eval_sampler=unmask_in_nine.replace(temperature=0.0),
)

if __name__ == "__main__":
    main(recipe)
