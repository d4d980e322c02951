"""LLaDA-MoE-7B-A1B-Instruct learns GSM8K; the adapters are on attention only. Never run: no results."""

from dataclasses import replace

from dllm_rl import main
from recipes.llada_8b_gsm8k import recipe as base

recipe = replace(base, name="llada-moe-gsm8k", model="inclusionAI/LLaDA-MoE-7B-A1B-Instruct")

if __name__ == "__main__":
    main(recipe)
