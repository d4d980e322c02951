"""Informed Masking (arXiv 2609.25927): the masks of an ELBO fall more often on tokens that changed little when written.

The score m_i of a token is the sum of the absolute changes of the top-1 confidence, from the step that wrote it to the
next one, over the positions at most `window` away that are still masked then. A mask of k tokens is drawn without
replacement by q_i ~ exp(sharpness (max m - m_i) / (max m - min m)). Its weight stays L / k, so that the expectation is
not the ELBO. Tokens of the last step have no next step and the score 0.

The confidences are those of `policy`, which replays the rollout's steps; the paper records them while it samples.

python -m recipes.examples.informed_masking     checks it with `check_estimator`
"""

from functools import partial

import torch

from dllm_rl import Prompts, Unmask, tiny_masked_lm
from dllm_rl.likelihoods import masks
from dllm_rl.likelihoods.estimators import FunctionLikelihood
from dllm_rl.testing import check_estimator


@torch.no_grad()
def change_of_confidence(policy, rollout, window):
    """The scores (B, T): how much nearby masked positions changed when each token was written."""
    inside, step = rollout.completion_mask, rollout.unmask_step
    column = torch.arange(inside.shape[1])
    near = (column[:, None] - column).abs() <= window
    found, before = torch.zeros_like(rollout.logprobs), None
    for number in range(int(step.max()) + 1):
        masked = inside & (step >= number)
        logits = policy.logits(rollout.tokens.masked_fill(masked, policy.spec.mask_id), rollout.attention_mask)
        now = logits.log_softmax(-1).amax(-1).exp()
        if before is not None:
            written = inside & (step == number - 1)
            change = ((now - before).abs() * masked).to(found)  # of the positions that are masked in both steps
            found += written * (change @ near.to(found))
        before = now
    return found


def informed_masks(rollout, generator, *, policy, sharpness=1.5, window=10, num_samples=2):
    inside = rollout.completion_mask
    score = change_of_confidence(policy, rollout, window)
    most = score.masked_fill(~inside, -torch.inf).amax(-1, keepdim=True)
    least = score.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
    log_q = sharpness * (most - score) / (most - least).clamp(min=1e-9)
    generators = masks.row_generators(rollout, generator)
    size = inside.sum(-1, keepdim=True)
    views = []
    for u in masks.uniforms_per_row(generators, num_samples, stratified=True, device=inside.device):
        waiting = -torch.log1p(-masks.uniforms_at(inside, generators).masked_fill(~inside, 0.5))
        keys = waiting.log() - log_q  # whoever waits least comes first, with rates q
        views.append(masks.k_masked_view(inside, keys, 1 + masks.uniform_index(u, size)))
    return masks.stack_views(views, samples=num_samples)


if __name__ == "__main__":
    policy = tiny_masked_lm(characters="1234.=", head_std=0.3)
    prompts = Prompts.from_ids([[3, 4, 5], [6, 5, 4]], pad_id=policy.pad_id, num_generations=2, seeds=range(4))
    rollout = Unmask(max_new_tokens=6, temperature=1.0)(policy, prompts, torch.Generator())
    check_estimator(FunctionLikelihood(function=partial(informed_masks, policy=policy)), policy, rollout)
