"""A loss of your own, and its three checks (docs/extend-objective.md).

python -m recipes.examples.own_loss
"""

import torch

from dllm_rl import Loss, PPOClip, option
from dllm_rl.algorithms.correctors import FunctionCorrector
from dllm_rl.algorithms.losses import exp_ratio
from dllm_rl.testing import check_corrector
from dllm_rl.testing.enumeration import gradient_table


class SoftClip(Loss):
    """(B, T): the ratio's distance from 1 bends towards `width`, in place of PPO's corner."""

    width: float = option(default=0.2, above=0)

    def __call__(self, log_ratio, advantages, mask):
        change = exp_ratio(log_ratio) - 1
        return (1 + change / (1 + change.abs() / self.width)) * advantages[:, None]


if __name__ == "__main__":
    check_corrector(SoftClip())
    ratios = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    signs, everywhere = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64), torch.ones(3, 4, dtype=torch.bool)
    torch.autograd.gradcheck(lambda x: SoftClip()(x, signs, everywhere), ratios)
    few = {"policies": ("early",), "sigmas": (0.3,), "networks": 2}  # leave out for numbers to report
    for loss in (PPOClip(), SoftClip()):
        (row,) = gradient_table(FunctionCorrector(loss=loss), moved="old", **few)
        print(f"{type(loss).__name__}: bias {row.bias:.2f}, error {row.rmse:.2f}")
