"""LLaDA-8B-Instruct learns 4x4 Sudoku with all its weights: fp32 ones, bf16 products, 8-bit AdamW, no KL term.

Updates of 1e-6 vanish in bf16 weights, so these are fp32 (`dtype`) and autocast computes in bf16 (`bf16`); blocks are
recomputed in the backward. Estimates, not measured on a GPU: --dry_run counts 106 GB at most (weights 32, gradients 32,
AdamW 16, the FP8 copy 9, autocast's bf16 weights 15), which fits 141 GB and not 96; a KL term's reference adds 32,
torch's AdamW 48. A step takes an H200 71 s, the update 12 of them. Not run yet: no results.
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
    beta=0.0,
    gradient_checkpointing=True,
    learning_rate=1e-6,
)

if __name__ == "__main__":
    main(recipe)
