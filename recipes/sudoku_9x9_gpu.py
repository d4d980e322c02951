"""A model of 85 million weights in LLaDA's layout, made here, learns 9x9 Sudoku with compiled FP8 rollouts on a GPU.

Products in FP8 need compute capability 8.9 or newer. Not run yet: no results.
"""

from dataclasses import replace
from functools import partial

from dllm_rl import Float8Dynamic, main, tiny_llama
from recipes.sudoku_9x9 import recipe as base

recipe = replace(
    base,
    name="sudoku-9x9-gpu",
    model=partial(
        tiny_llama,
        characters="123456789.=",
        causal=False,
        hidden_size=768,
        num_layers=12,
        num_attention_heads=12,
        intermediate_size=2048,
        max_length=163,
    ),
    bf16=True,
    rollout_quantization=Float8Dynamic(),
    torch_compile=True,
    sft_warmup_steps=2000,
    sft_warmup_learning_rate=5e-4,
    learning_rate=1e-4,
)

if __name__ == "__main__":
    main(recipe)
