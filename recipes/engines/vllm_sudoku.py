"""sudoku_unique's autoregressive model with rollouts by vLLM in bf16: `pip install -e ".[vllm]"` first.

The learner is in fp32; `--rollout_engine.dtype float32` lets vLLM compute in it, too. On a CPU vLLM takes heads of 32
numbers, so the model is wider than that of sudoku_unique.
"""

from dataclasses import replace
from functools import partial

from dllm_rl import TIS, main
from dllm_rl.integrations.vllm import VLLMEngine, VLLMSampler
from dllm_rl.models.tiny import tiny_llama
from recipes.sudoku_unique import recipe_of

recipe = replace(
    recipe_of("autoregressive"),
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
