"""A small masked-diffusion model, made here, learns 4x4 Sudoku by GRPO with FP8 rollouts. Results: recipes/README.md.

An undertrained model meets puzzles with 10 to 12 clues and one solution, and fills 16 cells in two parallel steps. This
task has solutions to learn from, and supervised training alone is faster. It is not enough for latin_sudoku.py. In
quantized_sudoku.py the same puzzles compare quantized rollouts.
"""

from functools import partial

from dllm_rl import Float8WeightOnly, MaxProb, Recipe, Trajectory, Unmask, main
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.tasks import Sudoku

unmask_in_two = Unmask(max_new_tokens=16, diffusion_steps=2, rank=MaxProb())

recipe = Recipe(
    name="sudoku-unique",
    model=partial(tiny_masked_lm, characters="1234.="),
    task=Sudoku(split="train", clues=(10, 12)),
    validation_task=Sudoku(split="validation", clues=(10, 12), size=200),
    eval_task=Sudoku(split="test", clues=(10, 12), size=400),
    sampler=unmask_in_two.replace(temperature=1.0),
    eval_sampler=unmask_in_two.replace(temperature=0.0),
    likelihood=Trajectory(),
    rollout_quantization=Float8WeightOnly(),
    sft_warmup_steps=200,
    sft_warmup_target=0.2,
    num_steps=360,
    eval_steps=60,
)

if __name__ == "__main__":
    main(recipe)
