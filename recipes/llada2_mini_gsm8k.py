"""LLaDA2.0-mini, block-causal with blocks of 32, learns GSM8K; the likelihood replays the sampler in 8 segments.

Never run: no results.
"""

from dataclasses import replace

from dllm_rl import BlockCache, main
from recipes.llada_8b_gsm8k import recipe as base

recipe = replace(
    base,
    name="llada2-mini-gsm8k",
    model="inclusionAI/LLaDA2.0-mini",
    sampler=base.sampler.replace(cache=BlockCache()),
    eval_sampler=base.eval_sampler.replace(cache=BlockCache()),
    gradient_checkpointing=True,
)

if __name__ == "__main__":
    main(recipe)
