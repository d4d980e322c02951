"""sudoku_tiny_ar with rollouts by vLLM in bf16, and a learner in fp32: `pip install -e ".[vllm]"` first.

On a CPU vLLM takes heads of 32 numbers, so the model is wider than sudoku_tiny_ar's. `--rollout_engine.dtype float32`
lets vLLM compute in the learner's format.
"""

from dataclasses import replace
from functools import partial

from dllm_rl import TIS, main, tiny_llama
from dllm_rl.integrations.vllm import VLLMEngine, VLLMSampler
from recipes.sudoku_tiny_ar import recipe as base

recipe = replace(
    base,
    name="vllm-sudoku",
    model=partial(tiny_llama, characters="1234.=", causal=True, hidden_size=128),
    sampler=VLLMSampler(max_new_tokens=16, temperature=1.0),
    rollout_quantization=None,
    rollout_engine=VLLMEngine(
        # A small cache, and no compilation: a small model starts faster.
        engine_args={"enforce_eager": True, "kv_cache_memory_bytes": 2**28, "distributed_executor_backend": "uni"}
    ),
    corrector=TIS(),
)

if __name__ == "__main__":
    main(recipe)
