"""ForkGRPO (arXiv 2609.39859): parallel decoding, left to right where the model is uncertain, and trained only there.

Every masked position draws a token. `Fork` writes all draws whose probability is above `threshold`. If there are none,
the step is a fallback: it writes the leftmost draw. `ForkSteps` scores the tokens of the fallback steps. The paper
divides a rollout's sum by the number of its fallback steps; the losses of the library divide by its tokens.

python -m recipes.examples.fork_grpo     checks it with `check_estimator`
RECIPE.py --sampler.rank Confidence --sampler.commit recipes.examples.fork_grpo.Fork \
    --likelihood recipes.examples.fork_grpo.ForkSteps
"""

import math
from dataclasses import replace

import torch

from dllm_rl import Commit, Confidence, LikelihoodEstimator, Prompts, Trajectory, Unmask, tiny_masked_lm
from dllm_rl.records import option
from dllm_rl.testing import check_estimator


class Fork(Commit):
    """The paper trains with a threshold of 0.8. Scores are log-probs of the drawn tokens: rank=Confidence()."""

    threshold: float = option(default=0.8, above=0, below=1)

    order = "deterministic"
    adaptive = True
    required_ranks = (Confidence(),)

    def __call__(self, scores, masked, steps_left):  # (B, M), (B, M), (B,) -> (B, M)
        confident = masked & (scores > math.log(self.threshold))
        leftmost = masked & (masked.cumsum(-1) == 1)
        return torch.where(confident.any(-1, keepdim=True), confident, leftmost)


class ForkSteps(LikelihoodEstimator):
    """Of `Trajectory`'s views those positions alone that a fallback step wrote: no draw there was above the threshold.

    The record leaves out the mask token's probability, and the rank does not: where a model gives the mask token much,
    a token just above the threshold may count as one of the parallel steps.
    """

    threshold: float = option(default=0.8, above=0, below=1)

    is_random = False
    reads_order = False
    replays_steps = True

    def draw_views(self, rollout, generator):
        views = Trajectory(include_order=False).draw_views(rollout, generator)
        kept = views.coefficients * (rollout.logprobs <= math.log(self.threshold))
        return replace(views, masked=views.masked & kept.any(-1, keepdim=True), coefficients=kept)


if __name__ == "__main__":
    policy = tiny_masked_lm(characters="1234.=", head_std=0.3)
    prompts = Prompts.from_ids([[3, 4, 5], [6, 5, 4]], pad_id=policy.pad_id, num_generations=2, seeds=range(4))
    sampler = Unmask(max_new_tokens=6, temperature=1.0, rank=Confidence(), commit=Fork())
    check_estimator(ForkSteps(), policy, sampler(policy, prompts, torch.Generator()))
