"""LLaDA-8B-Instruct learns Countdown with three numbers, set as `llada_8b_sudoku` is. Never run: no results."""

from dataclasses import replace
from functools import partial

from dllm_rl import Countdown, main
from recipes.llada_8b_sudoku import in_blocks
from recipes.llada_8b_sudoku import recipe as base

numbers = partial(Countdown, count=3, prompt_format="text", opening="<reasoning>", reward_rule="d1")

recipe = replace(
    base,
    name="llada-8b-countdown",
    task=numbers(split="train"),
    validation_task=numbers(split="validation", size=256),
    eval_task=numbers(split="test", size=256),
    sampler=in_blocks.replace(temperature=0.9),
)

if __name__ == "__main__":
    main(recipe)
