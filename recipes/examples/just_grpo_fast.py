"""The "Fast" selection of NeMo-RL's Block JustGRPO: of each block the least certain quarter of the tokens is scored.

Text is written from left to right. A block's ceil(fraction * block size) tokens whose recorded log-probs are lowest are
scored, given all tokens before them, without a correction for the selection. Source: research/just_grpo of NeMo-RL,
its README and code. It divides the loss by the number of selected tokens; here they are summed.

python -m recipes.examples.just_grpo_fast     checks it with `check_estimator`
RECIPE.py --sampler.block_size 1 --sampler.diffusion_steps none \
    --likelihood recipes.examples.just_grpo_fast.LeastCertain
"""

import math
from dataclasses import replace

import torch

from dllm_rl import LikelihoodEstimator, Prompts, Trajectory, Unmask, tiny_masked_lm
from dllm_rl.likelihoods.masks import block_index, ranks
from dllm_rl.records import option
from dllm_rl.testing import check_estimator


class LeastCertain(LikelihoodEstimator):
    fraction: float = option(default=0.25, above=0, at_most=1)
    block_size: int = option(default=16, at_least=1)

    is_random = False
    reads_order = False
    replays_steps = True

    def draw_views(self, rollout, generator):
        block = block_index(rollout.completion_mask, self.block_size)
        chosen = torch.zeros_like(rollout.completion_mask)
        for number in range(int(block.max()) + 1):  # ties go to the earlier token
            inside = block == number
            budget = math.ceil(self.fraction * self.block_size)
            chosen |= inside & (ranks(rollout.logprobs.masked_fill(~inside, torch.inf)) < budget)
        views = Trajectory(include_order=False).draw_views(rollout, generator)
        kept = views.coefficients * chosen
        return replace(views, masked=views.masked & kept.any(-1, keepdim=True), coefficients=kept)


if __name__ == "__main__":
    policy = tiny_masked_lm(characters="1234.=", head_std=0.3)
    prompts = Prompts.from_ids([[3, 4, 5], [6, 5, 4]], pad_id=policy.pad_id, num_generations=2, seeds=range(4))
    rollout = Unmask(max_new_tokens=6, temperature=1.0, block_size=1)(policy, prompts, torch.Generator())
    check_estimator(LeastCertain(block_size=3), policy, rollout)
