"""A small model, made here, learns 4x4 Sudoku by GRPO with FP8 rollouts. Results: recipes/results.md.

    python recipes/sudoku_unique.py
    python recipes/sudoku_unique.py --layout llada --corrector AIS

An undertrained model meets puzzles with 10 to 12 clues and one solution. `--layout` says which kind of model:

masked           a masked diffusion model, which fills the 16 cells in two parallel steps (the default)
llada            the same in LLaDA's own layout: Llama blocks with full attention
llada_moe        a mixture of experts in LLaDA-MoE's layout
autoregressive   a causal model, which writes cell by cell
diffusion_gemma  DiffusionGemma's layout: the noise is random tokens, which it rewrites in each of four steps

The likelihood of diffusion_gemma replays every step, and its gradient goes back through what a step sees of the step
before. That learned 0.051±0.045 more than to stop there, in ten pairs (an archived study), and needs the memory of all
steps. Its rollouts accept every draw of a step: which draws a bound accepts is nothing that a gradient
sees.

This task has solutions to learn from, and supervised training alone is faster. It is not enough for latin_sudoku.py. In
quantized_sudoku.py the same puzzles compare quantized rollouts.
"""

import argparse
import math
import sys
from functools import partial
from typing import Any

from dllm_rl import Autoregress, Causal, Float8WeightOnly, MaxProb, Recipe, Trajectory, Unmask, main
from dllm_rl.groups import Evaluation, Warmup
from dllm_rl.models.tiny import tiny_diffusion_gemma, tiny_llama, tiny_masked_lm, tiny_moe
from dllm_rl.samplers import Renoise
from dllm_rl.tasks import Sudoku

unmask_in_two = Unmask(max_new_tokens=16, diffusion_steps=2, rank=MaxProb())
renoise_in_four = Renoise(max_new_tokens=16, diffusion_steps=4)
LAYOUTS: dict[str, dict[str, Any]] = {
    "masked": {"model": partial(tiny_masked_lm, characters="1234.=")},
    "llada": {
        "model": partial(tiny_llama, characters="1234.=", causal=False),
        "warmup": {"steps": 400, "target": 0.3},
        "num_steps": 500,
    },
    "llada_moe": {
        "model": partial(tiny_moe, characters="1234.="),
        "warmup": {"steps": 400, "target": 0.25},
        "num_steps": 180,
        "max_retained_graphs": 2,
    },
    "autoregressive": {
        "model": partial(tiny_llama, characters="1234.=", causal=True),
        "sampler": Autoregress(max_new_tokens=16, temperature=1.0),
        "eval_sampler": Autoregress(max_new_tokens=16, temperature=0.0),
        "likelihood": Causal(),
        "warmup": {"steps": 600},
    },
    "diffusion_gemma": {
        "model": partial(tiny_diffusion_gemma, characters="1234.=", canvas_length=16),
        "sampler": renoise_in_four.replace(answer="drawn", entropy_bound=math.inf),
        "eval_sampler": renoise_in_four,
        "likelihood": Trajectory(self_conditioning="full"),
        "warmup": {"steps": 300},
        "max_retained_graphs": 4,
        "num_steps": 240,
    },
}


def recipe_of(layout: str = "masked") -> Recipe:
    """Return the recipe of a kind of model, one of LAYOUTS."""
    recipe = Recipe(
        name="sudoku-unique",
        **LAYOUTS["masked"],
        task=Sudoku(split="train", clues=(10, 12)),
        validation_task=Sudoku(split="validation", clues=(10, 12), size=200),
        eval_task=Sudoku(split="test", clues=(10, 12), size=400),
        sampler=unmask_in_two.replace(temperature=1.0),
        eval_sampler=unmask_in_two.replace(temperature=0.0),
        likelihood=Trajectory(),
        rollout_quantization=Float8WeightOnly(),
        warmup=Warmup(steps=200, target=0.2),
        num_steps=360,
        evaluation=Evaluation(steps=60),
    )
    if layout == "masked":
        return recipe
    return recipe.replace(name=f"sudoku-{layout.replace('_', '-')}", **LAYOUTS[layout])


recipe = recipe_of()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--layout", choices=LAYOUTS, default="masked")
    chosen, sys.argv[1:] = parser.parse_known_args()
    main(recipe_of(chosen.layout))
