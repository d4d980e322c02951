"""The estimator study's own arithmetic: its gradient is plain autograd's."""

import torch
from tiny_recipe import SIZES

from dllm_rl import Prompts, Trajectory, Unmask
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.samplers.rules import MaxProb
from recipes.studies.estimators import gradient


def test_the_studys_gradient_is_plain_autograds():
    """On-policy every ratio is 1, so that the loss has the gradient of -sum A log p over the number of tokens."""
    policy, estimator = tiny_masked_lm(**SIZES), Trajectory()
    prompts = Prompts.from_ids([[3, 4, 5], [6]], pad_id=policy.pad_id, num_generations=2)
    sampler = Unmask(max_new_tokens=4, diffusion_steps=2, temperature=1.0, rank=MaxProb())
    rollout = sampler(policy, prompts, torch.Generator().manual_seed(0))
    noise = estimator.draw_views(rollout, torch.Generator())
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    views = [view.logprobs(policy, rollout) for view in each_view(noise)]
    logps = estimator.combine(torch.stack(views), noise)
    loss = -(advantages[:, None] * logps)[rollout.completion_mask].sum() / rollout.completion_mask.sum()
    plain = torch.autograd.grad(loss, list(policy.module.parameters()), allow_unused=True, materialize_grads=True)
    expected = torch.cat([g.flatten() for g in plain]).double()
    found = gradient(estimator, policy, rollout, noise, advantages)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
