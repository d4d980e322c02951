"""An order of your own: a rank and a commit rule, and the check of their likelihood (docs/extend-sampler.md).

python -m recipes.examples.own_order
"""

import torch

from dllm_rl import Commit, Confidence, Rank
from dllm_rl.samplers.rules import highest
from dllm_rl.testing import check_order


class LogOdds(Rank):
    order = "deterministic"

    def __call__(self, logits, normalizer):  # (K, V) fp32 and (K,) -> (K,): the highest are written first
        first, second = logits.topk(2, dim=-1).values.unbind(-1)
        return first - second


class Halves(Commit):
    order = "deterministic"

    @staticmethod
    def count(num_masked, steps_left):  # (B,), (B,) -> (B,): half of what is left
        return torch.where(steps_left == 1, num_masked, (num_masked + 1) // 2)

    def __call__(self, scores, masked, steps_left):  # (B, M), (B, M), (B,) -> (B, M)
        return highest(scores, masked, count=self.count(masked.sum(-1), steps_left))


if __name__ == "__main__":
    print(check_order(LogOdds(), Halves()))  # deterministic
    print(check_order(Confidence(), Halves()))  # confidence; without `count` unknown
    print(check_order(LogOdds().__call__, Halves()))  # unknown: a plain function declares nothing
