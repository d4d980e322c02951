"""sudoku_unique with a model in LLaDA's own layout: un-causaled Llama blocks. Results: recipes/README.md."""

from dataclasses import replace
from functools import partial

from dllm_rl import main, tiny_llama
from recipes.sudoku_unique import recipe as base

recipe = replace(
    base,
    name="sudoku-tiny-llada",
    model=partial(tiny_llama, characters="1234.=", causal=False),
    sft_warmup_steps=400,
    sft_warmup_target=0.3,
    num_steps=500,
)

if __name__ == "__main__":
    main(recipe)
