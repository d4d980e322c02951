"""Dream-7B-Instruct learns Countdown with three numbers, with LLaDA's sampler and settings. Never run: no results."""

from dataclasses import replace

from dllm_rl import main
from recipes.llada_8b_countdown import recipe as base

recipe = replace(base, name="dream-7b-countdown", model="Dream-org/Dream-v0-Instruct-7B")

if __name__ == "__main__":
    main(recipe)
