"""A small masked-diffusion model, made here, learns 4x4 Sudoku from solved puzzles: what RL may start from.

python recipes/sft_tiny.py
python recipes/sudoku_unique.py --model runs/sft-tiny-seed0/checkpoints/step-000150 --warmup.steps 0
"""

from functools import partial

from dllm_rl import SFT, main
from dllm_rl.groups import Evaluation
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.tasks import Sudoku
from recipes.solved import solved

recipe = SFT(
    name="sft-tiny",
    model=partial(tiny_masked_lm, characters="1234.="),
    dataset=solved(Sudoku(split="train", clues=(10, 12), size=4000)),
    eval_dataset=solved(Sudoku(split="validation", clues=(10, 12), size=200)),
    max_length=64,
    completion_length=16,
    train_batch_size=64,
    learning_rate=2e-3,
    num_steps=150,
    evaluation=Evaluation(steps=50),
)

if __name__ == "__main__":
    main(recipe)
