"""Qwen3-0.6B-diffusion-mdlm (Tiny-A2D), the smallest of the real models, learns GSM8K. Never run: no results."""

from dataclasses import replace
from functools import partial

from dllm_rl import GSM8K, main
from recipes.llada_8b_gsm8k import recipe as base

# The model was trained on turns that begin with an empty thought.
questions = partial(GSM8K, opening="<think>\n\n</think>\n\n", reward_rule="d1")

recipe = replace(
    base,
    name="tiny-a2d-gsm8k",
    model="dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",
    task=questions(split="train"),
    validation_task=questions(split="validation", size=256),
    eval_task=questions(split="test"),
    micro_batch_size=24,
)

if __name__ == "__main__":
    main(recipe)
