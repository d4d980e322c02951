"""The study of a renoising model's likelihood: its one-step estimate by hand, and its arms."""

import pytest
import torch
import transformers
from renoise_toys import toy

from dllm_rl import Prompts
from dllm_rl.likelihoods.views import each_view
from dllm_rl.samplers import Renoise
from recipes.studies import renoising

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "DiffusionGemmaConfig"), reason="this transformers has no DiffusionGemma"
)


def test_one_step_scores_the_answer_from_the_first_noise():
    """A direct forward of the toy's decoder, on the noise of the first step and without a step before it."""
    policy = toy(seed=3)
    prompts = Prompts.from_ids([[0, 2], [1]], pad_id=0, num_generations=2, seeds=[5, 6, 7, 8])
    options = {"max_new_tokens": 3, "diffusion_steps": 3, "entropy_bound": float("inf"), "answer": "drawn"}
    options |= {"stability_threshold": None, "confidence_threshold": None}
    rollout = Renoise(**options)(policy, prompts, torch.Generator())
    (view,) = each_view(renoising.one_step.draw_views(rollout, torch.Generator()))
    found = view.logprobs(policy, rollout)
    expected = []
    for row, prompt in enumerate([[0, 2], [0, 2], [1], [1]]):
        noise = rollout.renoised.seen[row, -3:, 0].long()[None]
        toy_module = policy.module
        read = torch.tanh(toy_module.embed[torch.tensor(prompt)] @ toy_module.read).sum(0)
        mixed = torch.einsum("ij,rjd->rid", toy_module.mix, toy_module.embed[noise])
        logits = torch.tanh(toy_module.place + mixed + read) @ toy_module.head
        expected.append(logits[0].log_softmax(-1).gather(-1, rollout.tokens[row, -3:, None])[:, 0])
    expected = torch.stack(expected)
    torch.testing.assert_close(found[:, -3:], expected, rtol=1e-5, atol=1e-6)
    assert not found[:, :-3].any() and len(set(rollout.renoised.seen[:, -3:, 0].flatten().tolist())) > 1
    # The update carries the same gradient back without a kept graph.
    vector = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
    weights = list(policy.module.parameters())
    wanted = torch.autograd.grad((found * vector).sum(), weights, allow_unused=True)
    view.backward(policy, rollout, vector)
    for weight, gradient in zip(weights, wanted, strict=True):
        blank = torch.zeros_like(weight)
        ours, theirs = (blank if each is None else each for each in (weight.grad, gradient))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
