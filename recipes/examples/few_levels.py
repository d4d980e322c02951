"""Coarse formats of weights: integers -n..n with a scale per row. n = 3 is a format of three bits, n = 2 five levels.

python -m recipes.examples.few_levels     prints how far the weights of a layer move
RECIPE.py --rollout_quantization recipes.examples.few_levels.Levels --rollout_quantization.largest 2
"""

import torch

from dllm_rl import option
from dllm_rl.quantization.schemes import Rounding


class Levels(Rounding):
    largest: int = option(default=3, at_least=1)

    def rounded(self, weight, generator):
        scale = (weight.abs().amax(-1, keepdim=True) / self.largest).clamp(min=1e-12)
        return (weight / scale).round() * scale


if __name__ == "__main__":
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for largest in (7, 3, 2, 1):
        error = (Levels(largest=largest).rounded(weight, torch.Generator()) - weight).norm() / weight.norm()
        print(f"{2 * largest + 1} levels: relative error {error:.3f}")
