"""sudoku_unique with a mixture of experts, in LLaDA-MoE's layout. Results: recipes/README.md."""

from dataclasses import replace
from functools import partial

from dllm_rl import Float8WeightOnly, main
from dllm_rl.models.tiny import tiny_moe
from recipes.sudoku_unique import recipe as base

recipe = replace(
    base,
    name="sudoku-tiny-moe",
    model=partial(tiny_moe, characters="1234.="),
    rollout_quantization=Float8WeightOnly(),
    sft_warmup_steps=400,
    sft_warmup_target=0.25,
    num_steps=180,
    max_retained_graphs=2,
)

if __name__ == "__main__":
    main(recipe)
