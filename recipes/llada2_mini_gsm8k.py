"""LLaDA2.0-mini, block-causal with blocks of 32, learns GSM8K; the likelihood replays the sampler in 8 segments.

Not run yet: no results.
"""

from dataclasses import replace
from functools import partial

from dllm_rl import block_cache, main, max_prob, trajectory
from recipes.llada_8b_gsm8k import in_blocks
from recipes.llada_8b_gsm8k import recipe as base

# The order of segments has no known probability under `confidence`.
by_max_prob = partial(in_blocks, rank=max_prob, cache=block_cache())

recipe = replace(
    base,
    name="llada2-mini-gsm8k",
    model="inclusionAI/LLaDA2.0-mini",
    sampler=partial(by_max_prob, temperature=0.9),
    eval_sampler=partial(by_max_prob, temperature=0.0),
    likelihood=trajectory(num_segments=8),
    gradient_checkpointing=True,
)

if __name__ == "__main__":
    main(recipe)
