"""A recipe of a large model as it was timed and counted: FP8 rollouts, one mask for eight updates, and a KL term."""

from dataclasses import replace

from dllm_rl import K3, Float8Dynamic, OneStep, PPOClip

AS_TIMED = {
    "likelihood": OneStep(prompt_mask=0.15),
    "loss": PPOClip(epsilon=0.2, delta=1.2),
    "rollout_quantization": Float8Dynamic(),
    "num_iterations": 8,
    "micro_batch_size": 2,
    "beta": 0.04,
    "kl": K3(),
}


def as_timed(recipe):
    return replace(recipe, **AS_TIMED, lora=replace(recipe.lora, dropout=0.05))
