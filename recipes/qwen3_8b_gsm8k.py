"""Qwen3-8B, autoregressive, learns GSM8K with an exact likelihood. Never run: no results."""

from dataclasses import replace
from functools import partial

from dllm_rl import GSM8K, Autoregress, Causal, main
from recipes.llada_8b_gsm8k import recipe as base

questions = partial(GSM8K, reward_rule="own")

recipe = replace(
    base,
    name="qwen3-8b-gsm8k",
    model="Qwen/Qwen3-8B",
    task=questions(split="train"),
    validation_task=questions(split="validation", size=256),
    eval_task=questions(split="test"),
    sampler=Autoregress(max_new_tokens=512, temperature=1.0),
    eval_sampler=Autoregress(max_new_tokens=512, temperature=0.0),
    likelihood=Causal(),
    num_generations=8,
    micro_batch_size=8,
    gradient_checkpointing=True,
)

if __name__ == "__main__":
    main(recipe)
