"""A training loop of your own from the library's parts: an FP8 copy samples, TIS corrects, PPO's clip updates twice.

python -m recipes.examples.own_loop
"""

import torch

from dllm_rl import (
    TIS,
    Float8WeightOnly,
    GroupRelative,
    PPOClip,
    Prompts,
    TokenStats,
    Trajectory,
    Unmask,
    quantized_copy,
    tiny_masked_lm,
)
from dllm_rl.rng import generator_for

policy = tiny_masked_lm(characters="1234=")
optimizer = torch.optim.AdamW(policy.module.parameters(), lr=2e-3)
sampler, likelihood = Unmask(max_new_tokens=4, temperature=1.0), Trajectory()
corrector, loss, advantages_of = TIS(), PPOClip(), GroupRelative()
prompt, *goal = policy.tokenizer.encode("=1234", add_special_tokens=False)
rewards_by_step = []
for step in range(40):
    copy = quantized_copy(policy, Float8WeightOnly())
    seeds = range(64 * step, 64 * (step + 1))  # a row's answer depends on its prompt, its seed and the weights alone
    prompts = Prompts.from_ids([[prompt]] * 8, pad_id=policy.pad_id, num_generations=8, seeds=seeds)
    rollout = sampler(copy, prompts, generator_for("rollout", step))
    rewards = (rollout.tokens[:, 1:] == torch.tensor(goal)).float().mean(1)  # (B,)
    rewards_by_step.append(rewards.mean().item())
    advantages = advantages_of(rewards, rollout.group)
    # Every policy scores the same views: two draws of masks would make a ratio noisy, or undefined.
    views = likelihood.draw_views(rollout, generator_for("views", step))
    old = likelihood.logprobs(
        policy, rollout, views
    )  # (B, T), nats; an estimate also scores the copy, with these views
    mask = rollout.completion_mask
    log_mismatch = (old - rollout.logprobs) * mask
    stats = TokenStats(log_mismatch, advantages, mask, old, rollout.logprobs, rollout.unmask_step)
    weights, mask, _ = corrector.weights(stats)
    for _ in range(2):
        scores = likelihood.view_logprobs(policy, rollout, views, retain_graphs=True)
        log_ratio = (likelihood.combine(scores, views) - old) * mask
        objective = loss(log_ratio, advantages, mask) * weights * mask
        optimizer.zero_grad()
        (-objective.sum() / mask.sum()).backward()
        optimizer.step()
print("right digits, first and last step:", rewards_by_step[0], rewards_by_step[-1])
