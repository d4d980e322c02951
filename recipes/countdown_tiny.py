"""A small masked-diffusion model, made here, learns Countdown by GRPO with FP8 rollouts. Results: recipes/results.md.

Three numbers up to 10, added and subtracted, make a target up to 20. An undertrained model fills the ten characters of
an expression in three parallel steps; RL does the rest from rewards alone: 1 for the target, and half the share of the
numbers that are rightly used.
"""

from functools import partial

from dllm_rl import Float8WeightOnly, MaxProb, Recipe, Trajectory, Unmask, main
from dllm_rl.groups import Warmup
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.tasks import Countdown

small_numbers = partial(Countdown, count=3, max_number=10, max_target=20, operators="+-", numbers_weight=0.5)
unmask_in_three = Unmask(max_new_tokens=10, diffusion_steps=3, rank=MaxProb())

recipe = Recipe(
    name="countdown-tiny",
    model=partial(tiny_masked_lm, characters="0123456789+-*/(),>= "),
    task=small_numbers(split="train"),
    validation_task=small_numbers(split="validation", size=200),
    eval_task=small_numbers(split="test", size=400),
    sampler=unmask_in_three.replace(temperature=1.0),
    eval_sampler=unmask_in_three.replace(temperature=0.0),
    likelihood=Trajectory(),
    rollout_quantization=Float8WeightOnly(),
    train_batch_size=32,
    num_steps=300,
    learning_rate=5e-4,
    warmup=Warmup(steps=600, target=0.08, metric="accuracy", eval_steps=20),
)

if __name__ == "__main__":
    main(recipe)
