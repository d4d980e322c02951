"""LLaDA-8B-Instruct learns 4x4 Sudoku with all its weights: fp32 ones, bf16 products, and 8-bit AdamW.

Updates of 1e-6 vanish in bf16 weights, so these are fp32 (`dtype`) and autocast computes in bf16 (`bf16`); blocks are
recomputed in the backward. `--dry_run` estimates 98 GB at most (weights 32, gradients 32, AdamW 16, autocast's bf16
weights 15), which fits 141 GB and not 96; torch's AdamW takes 48 more. Never run: no results.
"""

from dataclasses import replace

from dllm_rl import AdamW8bit, main
from recipes.llada_8b_sudoku import recipe as base

recipe = replace(
    base,
    name="llada-8b-sudoku-full",
    lora=None,
    dtype="float32",
    bf16=True,
    optim=AdamW8bit(),
    gradient_checkpointing=True,
    learning_rate=1e-6,
)

if __name__ == "__main__":
    main(recipe)
