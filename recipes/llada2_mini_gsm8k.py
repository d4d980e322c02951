"""LLaDA2.0-mini, block-causal with blocks of 32, learns GSM8K; the likelihood replays the sampler in 8 segments.

Not run yet: no results.
"""

from dataclasses import replace

from dllm_rl import BlockCache, MaxProb, Trajectory, main
from recipes.llada_8b_gsm8k import in_blocks
from recipes.llada_8b_gsm8k import recipe as base

# The order of segments has no known probability under `Confidence`.
by_max_prob = in_blocks.replace(rank=MaxProb(), cache=BlockCache())

recipe = replace(
    base,
    name="llada2-mini-gsm8k",
    model="inclusionAI/LLaDA2.0-mini",
    sampler=by_max_prob.replace(temperature=0.9),
    eval_sampler=by_max_prob.replace(temperature=0.0),
    likelihood=Trajectory(num_segments=8),
    gradient_checkpointing=True,
)

if __name__ == "__main__":
    main(recipe)
