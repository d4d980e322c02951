"""SmolLM2-135M, an autoregressive model, becomes a masked-diffusion one and learns 4x4 Sudoku: a warm-up, then RL.

Weights: recipes/weights.py (Apache-2.0; needs `pip install gguf`). Results: recipes/README.md.
"""

from dataclasses import replace
from functools import partial

from dllm_rl import Policy, diffusion_from_causal, main, max_prob, unmask
from recipes import weights
from recipes.sudoku_tiny import in_float32 as base

# Digits and dots are a token each, so a grid of 16 cells is 16 tokens.
in_four = partial(unmask, max_new_tokens=16, num_steps=4, rank=max_prob)


def smollm2_diffusion() -> Policy:
    """The pretrained model with full attention, a mask token and its head shifted, downloaded at the first call."""
    return diffusion_from_causal(weights.smollm2())


recipe = replace(
    base,
    name="smollm2-sudoku",
    model=smollm2_diffusion,
    validation_task=replace(base.validation_task, size=32),
    eval_task=replace(base.eval_task, size=64),
    sampler=partial(in_four, temperature=1.0),
    eval_sampler=partial(in_four, temperature=0.0),
    train_batch_size=4,
    num_generations=8,
    num_steps=20,
    learning_rate=2e-5,
    warmup_steps=60,
    warmup_batch_size=16,
    warmup_learning_rate=2e-4,
    warmup_target=0.1,
    warmup_eval_steps=20,
    save_steps=20,
    eval_batch_size=32,
)

if __name__ == "__main__":
    main(recipe)
