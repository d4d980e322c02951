"""A likelihood estimator of your own, and its check (docs/extend-objective.md).

python -m recipes.examples.own_estimator
"""

import torch

from dllm_rl import LikelihoodEstimator, Prompts, Unmask, tiny_masked_lm
from dllm_rl.likelihoods.masks import row_generators, uniforms_at
from dllm_rl.testing import check_estimator
from dllm_rl.types.scoring import Views


class Halves(LikelihoodEstimator):
    def draw_views(self, rollout, generator):
        """Two views (N = 2): a random half of the completion masked, then the other; each token is scored once."""
        completion = rollout.completion_mask  # (B, T)
        keys = uniforms_at(completion, row_generators(rollout, generator))  # in [0, 1); +inf off the completion
        masked = torch.stack([keys < 0.5, completion & (keys >= 0.5)])
        return Views(masked, masked.float())  # sum_i log p(y_i | the prompt and the other half), nats: biased


halves = Halves()
policy = tiny_masked_lm(characters="1234.=")
prompts = Prompts.from_ids([[3, 4, 5], [6, 5, 4]], pad_id=policy.pad_id, num_generations=2, seeds=range(4))
rollout = Unmask(max_new_tokens=6, temperature=1.0)(policy, prompts, torch.Generator())

if __name__ == "__main__":
    check_estimator(halves, policy, rollout)
