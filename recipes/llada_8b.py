"""LLaDA-8B-Instruct, or another published model, learns Sudoku, Countdown or GSM8K with adapters.

    python recipes/llada_8b.py --dry_run
    python recipes/llada_8b.py --task countdown --model Dream-org/Dream-v0-Instruct-7B --dry_run

--task   sudoku (the default), countdown or gsm8k: problems, grader and temperature are d1's (arXiv 2504.12216)
--model  a checkpoint's folder or a hub id; LLaDA-8B-Instruct by default

The settings are those that `grpo` takes for a large model of this kind; for LLaDA-8B one update per rollout at a
learning rate of 1e-5, the likelihood of the trajectory in eight segments, and compiled rollouts, in FP8 on an H100, an
H200 or newer, and else in bf16. `--preset d1` takes those of d1's paper instead, and every other setting is an option,
as in all recipes. `--dry_run` prints the estimated memory and time. Never run with published weights: no results. For
rows and a reward of your own, call `grpo`.
"""

import argparse
import sys
from functools import partial

from dllm_rl import Recipe, grpo_recipe, main
from dllm_rl.cli.run_recipe import as_program
from dllm_rl.tasks import GSM8K, Countdown, Sudoku

LLADA = "GSAI-ML/LLaDA-8B-Instruct"
TASKS = {  # with the temperature of the rollouts
    "sudoku": (partial(Sudoku, clues=8, prompt_format="text", opening="<reasoning>", reward_rule="d1"), 0.3),
    "countdown": (partial(Countdown, count=3, prompt_format="text", opening="<reasoning>", reward_rule="d1"), 0.9),
    "gsm8k": (partial(GSM8K, opening="<reasoning>", reward_rule="d1"), 0.9),
}


def recipe_of(task: str = "sudoku", model: str = LLADA) -> Recipe:
    """Return the recipe of a model and a task."""
    problems, temperature = TASKS[task]
    return grpo_recipe(
        model,
        problems(split="train"),
        eval_dataset=problems(split="test", size=256),
        validation_task=problems(split="validation", size=256),
        sampler_options={"temperature": temperature},
        preset="large",
        torch_compile=True,
        num_steps=1000,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=TASKS, default="sudoku")
    parser.add_argument("--model", default=LLADA)
    chosen, sys.argv[1:] = parser.parse_known_args()
    with as_program():
        main(recipe_of(chosen.task, chosen.model))
