"""LLaDA-8B-Instruct learns 4x4 Sudoku: most of d1's settings (arXiv 2504.12216), FP8 rollouts.

For one GPU of 48 GB or more: --dry_run counts 38 GB at most (with a copy in FP8, and two rows of 512 tokens kept for
their backward; 31 with --gradient_checkpointing), and at rates that parts of it reached on an H200 57 s for a step's
rollout, compiled and in FP8, 3 s for scoring and 6 s for 8 updates. A prompt's completions share a row of scoring and
update: --micro_batch_size 8 takes all prompts of a step at once, in 61 GB. A step of an
older version, with random weights and a quarter of the denoising steps, ran there (33.5 s, part `step` of
benchmarks/results/gpu.json). Not run yet with published weights: no results.
"""

from functools import partial

from dllm_rl import K3, Confidence, Float8Dynamic, Lora, OneStep, PPOClip, Recipe, Sudoku, Unmask, main
from dllm_rl.presets import PRESETS

large = PRESETS["large"]  # rate, bf16, gradient norm, groups: what `grpo` takes for this model
in_blocks = Unmask(max_new_tokens=256, diffusion_steps=128, rank=Confidence(), **large.sampler)
puzzles = partial(Sudoku, clues=8, prompt_format="text", opening="<reasoning>", reward_rule="d1")

recipe = Recipe(
    name="llada-8b-sudoku",
    model="GSAI-ML/LLaDA-8B-Instruct",
    **{**large.settings, "lora": Lora(r=128, alpha=64.0, dropout=0.05), "micro_batch_size": 2},  # rows of 2 prompts
    task=puzzles(split="train"),
    validation_task=puzzles(split="validation", size=256),
    eval_task=puzzles(split="test", size=256),
    sampler=in_blocks.replace(temperature=0.3),
    eval_sampler=in_blocks.replace(temperature=0.0),
    likelihood=OneStep(prompt_mask=0.15),  # gives no likelihood ratios, so that no corrector's weights are right
    loss=PPOClip(epsilon=0.2, delta=1.2),  # several updates a rollout
    rollout_quantization=Float8Dynamic(),
    torch_compile=True,
    beta=0.04,
    kl=K3(),
    num_iterations=8,
    num_steps=1000,
    adam_beta1=0.9,
    adam_beta2=0.99,
    weight_decay=0.1,
)

if __name__ == "__main__":
    main(recipe)
