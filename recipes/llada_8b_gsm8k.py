"""LLaDA-8B-Instruct learns GSM8K with the settings of `llada_8b_sudoku`. Never run: no results."""

from dataclasses import replace
from functools import partial

from dllm_rl import GSM8K, main
from recipes.llada_8b_sudoku import in_blocks
from recipes.llada_8b_sudoku import recipe as base

questions = partial(GSM8K, opening="<reasoning>", reward_rule="d1")

recipe = replace(
    base,
    name="llada-8b-gsm8k",
    task=questions(split="train"),
    validation_task=questions(split="validation", size=256),
    eval_task=questions(split="test"),
    sampler=in_blocks.replace(temperature=0.9),
    sft_warmup_metric="accuracy",
)

if __name__ == "__main__":
    main(recipe)
