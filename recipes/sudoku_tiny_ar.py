"""sudoku_unique with a small causal model: one loop and style, through one interface. Results: recipes/README.md."""

from dataclasses import replace
from functools import partial

from dllm_rl import Autoregress, Causal, main, tiny_llama
from recipes.sudoku_unique import recipe as base

recipe = replace(
    base,
    name="sudoku-tiny-ar",
    model=partial(tiny_llama, characters="1234.=", causal=True),
    sampler=Autoregress(max_new_tokens=16, temperature=1.0),
    eval_sampler=Autoregress(max_new_tokens=16, temperature=0.0),
    likelihood=Causal(),
    sft_warmup_steps=600,
)

if __name__ == "__main__":
    main(recipe)
