"""DiffusionGemma-26B-A4B-it learns Countdown with three numbers, by adapters, on one GPU of 141 GB (an estimate).

Never run: no results. `--dry_run` needs no weights. Sixteen steps for a canvas of 256 tokens are fewer than the
authors' 48, of which most completions need fewer too: a canvas ends when it is stable and sure. An update replays them.
"""

from dataclasses import replace

from dllm_rl import Float8WeightOnly, Trajectory, main
from dllm_rl.models.lora_settings import Lora
from dllm_rl.samplers import Renoise
from recipes.llada_8b_countdown import recipe as base

renoise_in_16 = Renoise(max_new_tokens=256, diffusion_steps=16)

recipe = replace(
    base,
    name="diffusion-gemma-countdown",
    model="google/diffusiongemma-26B-A4B-it",
    sampler=renoise_in_16.replace(answer="drawn"),
    eval_sampler=renoise_in_16,
    likelihood=Trajectory(),
    rollout_quantization=Float8WeightOnly(),
    torch_compile=False,
    lora=Lora(),
    num_generations=4,
    micro_batch_size=4,
    rollout_batch_size=8,
    eval_batch_size=8,
)

if __name__ == "__main__":
    main(recipe)
