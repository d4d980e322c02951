"""The correctors and mismatch metrics alone, in a training loop that is not this library's (docs/extend-objective.md).

`dllm_rl.algorithms` needs torch and nothing of transformers, accelerate, torchao or peft. Whatever samples and trains,
give it three tensors of a batch: the log-probs of the learner, those of the policy that sampled, and a mask.

python -m recipes.examples.correctors_elsewhere
"""

import torch

from dllm_rl.algorithms.correctors import TIS, TokenStats
from dllm_rl.algorithms.mismatch import mismatch_metrics


def token_logprobs(table, tokens):
    """The log-probs (B, T) of tokens (B, T) under a policy with independent positions, logits (T, V)."""
    return table.log_softmax(-1).expand(len(tokens), -1, -1).gather(-1, tokens[..., None])[..., 0]


def main(num_steps=40):
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(4, 8, requires_grad=True)  # four positions, eight words
    optimizer = torch.optim.SGD([table], lr=2.0)
    corrector, mask = TIS(cap=2.0), torch.ones(64, 4, dtype=torch.bool)
    for _ in range(num_steps):
        sampler = (table.detach() * 4).round() / 4  # a coarse copy of the policy samples
        rows = sampler.softmax(-1).expand(64, -1, -1).reshape(-1, 8)
        tokens = torch.multinomial(rows, 1, generator=generator).view(64, 4)
        reward = (tokens == 3).float().mean(-1)  # the word 3, everywhere
        advantages = (reward - reward.mean()) / (reward.std() + 1e-4)
        old, rollout = token_logprobs(table, tokens), token_logprobs(sampler, tokens)
        stats = TokenStats(
            log_mismatch=(old - rollout).detach(),
            advantages=advantages,
            mask=mask,
            old_logprobs=old.detach(),
            rollout_logprobs=rollout,
            unmask_step=torch.arange(4).expand(64, -1),  # the positions are written from left to right
        )
        weights, keep, metrics = corrector.weights(stats)
        metrics = metrics | mismatch_metrics(stats.log_mismatch, mask)
        loss = -(weights * keep * old * advantages[:, None]).sum() / keep.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(reward.mean()), metrics


if __name__ == "__main__":
    reward, metrics = main()
    print(f"reward {reward:.2f}, ESS {metrics['rollout_corr/ess']:.4f}, k3 {metrics['rollout_corr/k3_kl']:.5f} nats")
