"""Coupled-GRPO (arXiv 2506.20639) as its authors' code has it: the likelihood, which `Coupled` has in ESPO's form.

log p(i) is the mean of two log-probs: of token i with the completion fully masked, and of token i in the one of two
complementary masks that hides it, divided by that mask's expected share, s or 1 - s, where s ~ U(0.2, 0.8).

python -m recipes.examples.coupled_grpo     checks it with `check_estimator`
RECIPE.py --likelihood recipes.examples.coupled_grpo.CoupledGRPO
"""

import torch

from dllm_rl import LikelihoodEstimator, Prompts, Unmask, tiny_masked_lm
from dllm_rl.likelihoods.masks import row_generators, uniforms_at, uniforms_per_row
from dllm_rl.testing import check_estimator
from dllm_rl.types.scoring import Views


class CoupledGRPO(LikelihoodEstimator):
    reads_order = False

    def draw_views(self, rollout, generator):
        """Three views: everything masked, a random mask, its complement; s is drawn per row (theirs: per batch)."""
        completion = rollout.completion_mask
        generators = row_generators(rollout, generator)
        (u,) = uniforms_per_row(generators, 1, stratified=False, device=completion.device)
        share = (0.2 + 0.6 * u).float()  # (B, 1)
        first = completion & (uniforms_at(completion, generators) < share)
        second = completion & ~first
        return Views(
            torch.stack([completion, first, second]),
            torch.stack([completion / 2, first / (2 * share), second / (2 * (1 - share))]),
        )


if __name__ == "__main__":
    policy = tiny_masked_lm(characters="1234.=")
    prompts = Prompts.from_ids([[3, 4, 5], [6, 5, 4]], pad_id=policy.pad_id, num_generations=2, seeds=range(4))
    rollout = Unmask(max_new_tokens=6, temperature=1.0)(policy, prompts, torch.Generator())
    check_estimator(CoupledGRPO(), policy, rollout)
