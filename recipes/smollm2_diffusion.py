"""SmolLM2-135M, made a masked-diffusion model by smollm2_diffusion_sft.py, goes on with sums from rewards alone.

    pip install gguf && python recipes/smollm2_diffusion_sft.py
    python recipes/smollm2_diffusion.py

Four tokens are written in two parallel steps, at random positions in training: no gradient then misses the order's part
(docs/mismatch.md). Results: recipes/results.md.
"""

from dataclasses import replace

from dllm_rl import MaxProb, Trajectory, Unmask, main
from dllm_rl.samplers.rules import RandomOrder
from recipes.smollm2_arithmetic import recipe as base
from recipes.smollm2_diffusion_sft import PlainSums

in_two = Unmask(max_new_tokens=4, diffusion_steps=2)

recipe = replace(
    base,
    name="smollm2-diffusion",
    model="runs/smollm2-diffusion-sft-seed0/checkpoints/step-000120",
    task=PlainSums(held_out=False, size=1200),
    validation_task=PlainSums(held_out=True, size=40),
    eval_task=PlainSums(held_out=True, size=100),
    sampler=in_two.replace(rank=RandomOrder(), temperature=1.0),
    eval_sampler=in_two.replace(rank=MaxProb(), temperature=0.0),
    likelihood=Trajectory(),
    max_retained_graphs=2,
    train_batch_size=8,
    num_steps=48,
)

if __name__ == "__main__":
    main(recipe)
