"""LLaDA-8B-Instruct learns 4x4 Sudoku: d1's settings (arXiv 2504.12216), FP8 rollouts, adaptive importance weights.

Written for one GPU of 80 GB or more. Estimates, not measured on a GPU: --dry_run counts 63 GB at most (with a copy in
FP8, and 6 rows of 512 tokens kept for their backward; 36 with --gradient_checkpointing). A step is 4.4e16 FLOPs of
rollout, 1e15 of scoring, 8e15 of updates, and 8e14 in fp32 (head, adapters): at 45 % of an H100's bf16 peak and 75 % of
its fp32 peak 140 s, of which the rollout takes 100, or 50 if FP8 doubles its speed. An H200 has room for 12 rows at a
time (96 GB) and the same arithmetic. Not run yet: no results.
"""

from functools import partial

from dllm_rl import Lora, Recipe, Sudoku, ais, float8_dynamic, kl_k3, main, one_step, unmask

in_blocks = partial(unmask, max_new_tokens=256, num_steps=128, block_size=32)
puzzles = partial(Sudoku, clues=8, prompt_format="text", opening="<reasoning>", reward_rule="d1")

recipe = Recipe(
    name="llada-8b-sudoku",
    model="GSAI-ML/LLaDA-8B-Instruct",
    dtype="bfloat16",
    lora=partial(Lora, r=128, alpha=64.0, dropout=0.05),
    task=puzzles(split="train"),
    validation_task=puzzles(split="validation", size=256),
    eval_task=puzzles(split="test", size=256),
    sampler=partial(in_blocks, temperature=0.3),
    eval_sampler=partial(in_blocks, temperature=0.0),
    likelihood=one_step(prompt_mask=0.15),
    corrector=ais(),
    rollout_quantization=float8_dynamic,
    beta=0.04,
    kl=kl_k3,
    train_batch_size=8,
    num_generations=6,
    micro_batch_size=6,
    num_iterations=8,
    num_steps=1000,
    learning_rate=3e-6,
    adam_beta1=0.9,
    adam_beta2=0.99,
    weight_decay=0.1,
    max_grad_norm=0.2,
    eval_batch_size=32,
)

if __name__ == "__main__":
    main(recipe)
