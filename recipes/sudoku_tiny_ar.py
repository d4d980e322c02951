"""The same task, loop and style with a small causal model, through the same interface. Results: recipes/README.md."""

from dataclasses import replace
from functools import partial

from dllm_rl.config import from_command_line
from dllm_rl.likelihoods.estimators import causal
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.training.loop import train
from recipes.sudoku_tiny import recipe as base

recipe = replace(
    base,
    name="sudoku-tiny-ar",
    model=partial(tiny_llama, characters="1234.=", causal=True),
    sampler=partial(autoregress, max_new_tokens=16, temperature=1.0),
    eval_sampler=partial(autoregress, max_new_tokens=16, temperature=0.0),
    likelihood=causal(),
    warmup_steps=600,
)

if __name__ == "__main__":
    train(from_command_line(recipe))
