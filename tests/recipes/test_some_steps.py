"""recipes/studies/some_steps.py: the summands add up to the gradient, and every way of drawing them is unbiased."""

import pytest
import torch

from dllm_rl import Prompts, Trajectory, Unmask, tiny_masked_lm
from dllm_rl.samplers.rules import MaxProb
from recipes.studies import some_steps
from recipes.studies.estimators import gradient


def test_the_summands_of_rows_and_steps_are_the_gradient():
    policy = tiny_masked_lm(characters="abcd", head_std=0.3)
    prompts = Prompts.from_ids([[5], [6]], pad_id=policy.pad_id, num_generations=2, seeds=range(4))
    sample = Unmask(max_new_tokens=6, diffusion_steps=3, rank=MaxProb(), temperature=1.0)
    rollout = sample(policy, prompts, torch.Generator())
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    parts, surprise = some_steps.summands(policy, rollout, advantages, 3)
    exact = Trajectory()
    whole = gradient(exact, policy, rollout, exact.draw_views(rollout, torch.Generator()), advantages)
    ours = -parts.flatten(0, 1).double().sum(0) / rollout.completion_mask.sum()
    torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(surprise.sum(-1), -rollout.logprobs.sum(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", some_steps.WAYS[:-1])
def test_a_drawn_weight_is_one_in_the_mean(way):
    stream = torch.Generator().manual_seed(0)
    sizes = torch.rand(6, 4, generator=stream) + 0.1
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    draws = [some_steps.weights(way, 2, sizes, sizes.flip(0), advantages, stream) for _ in range(4000)]
    found = torch.stack(draws)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - 1).abs() <= 4.5 * error + 1e-6).all()
