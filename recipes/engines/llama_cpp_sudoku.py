"""sudoku_unique in LLaDA's layout, with rollouts computed by llama.cpp: `pip install -e ".[llamacpp]"` first.

sudoku_unique's own model has learned positions, which llama.cpp's `llada` architecture lacks; the layout llada has
none, and its width of 96 holds whole blocks of 32 weights. `--rollout_engine.format F16` takes another format.
"""

from dataclasses import replace

from dllm_rl import main
from recipes.engines.llama_cpp import LlamaCpp
from recipes.sudoku_unique import recipe_of

recipe = replace(
    recipe_of("llada"),
    name="llama-cpp-sudoku",
    rollout_quantization=None,
    rollout_engine=LlamaCpp(format="Q8_0"),
    max_retained_graphs=2,
    num_steps=1800,
)

if __name__ == "__main__":
    main(recipe)
