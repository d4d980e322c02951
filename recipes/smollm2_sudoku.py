"""SmolLM2-135M, made a masked-diffusion model by smollm2_sudoku_sft.py, learns 4x4 Sudoku from rewards alone.

    pip install gguf && python recipes/smollm2_sudoku_sft.py
    python recipes/smollm2_sudoku.py

Grids of 16 cells are 16 tokens, filled in two parallel steps. Results: recipes/README.md.
"""

from dataclasses import replace
from functools import partial

from dllm_rl import float8_weight_only, lora_r16, main
from recipes.smollm2_sudoku_sft import Digits
from recipes.sudoku_tiny import recipe as base

recipe = replace(
    base,
    name="smollm2-sudoku",
    model="runs/smollm2-sudoku-sft-seed0/checkpoints/step-000200",
    task=Digits(split="train"),
    validation_task=Digits(split="validation", size=32),
    eval_task=Digits(split="test", size=100),
    rollout_quantization=partial(float8_weight_only, dequantised=True),
    lora=lora_r16,
    kept_graphs=2,
    train_batch_size=4,
    num_steps=24,
    learning_rate=1e-3,
    warmup_steps=0,
    eval_steps=0,
    eval_batch_size=50,
    logging_steps=5,
    log_completions_steps=20,
)

if __name__ == "__main__":
    main(recipe)
