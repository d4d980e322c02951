"""LLaDA-8B-Instruct learns 4x4 Sudoku with the settings that this library recommends for LLaDA-8B and LoRA adapters.

They are those that `grpo` takes for this model: one update per rollout at a learning rate of 1e-5, the likelihood of
the trajectory in eight segments, compiled bf16 rollouts, and no KL term. `--preset d1` takes the settings of d1's paper
(arXiv 2504.12216) instead. The task, its grader and the sampler's temperature are d1's in both cases. `--dry_run`
prints the estimated memory and time. Never run with published weights: no results.
"""

from functools import partial

from dllm_rl import Recipe, Sudoku, Trajectory, Unmask, main
from dllm_rl.presets import PRESETS

large = PRESETS["large"]  # what `grpo` takes for this model
in_blocks = Unmask(max_new_tokens=256, diffusion_steps=128, **large.sampler)
puzzles = partial(Sudoku, clues=8, prompt_format="text", opening="<reasoning>", reward_rule="d1")

recipe = Recipe(
    name="llada-8b-sudoku",
    model="GSAI-ML/LLaDA-8B-Instruct",
    **large.settings,
    task=puzzles(split="train"),
    validation_task=puzzles(split="validation", size=256),
    eval_task=puzzles(split="test", size=256),
    sampler=in_blocks.replace(temperature=0.3),
    eval_sampler=in_blocks.replace(temperature=0.0),
    likelihood=Trajectory(num_segments=8),
    torch_compile=True,
    num_steps=1000,
)

if __name__ == "__main__":
    main(recipe)
