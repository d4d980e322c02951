"""A loss with a detached part, sg(min(r, max_ratio)) A log r, and its checks (docs/extend-objective.md)."""

import torch

from dllm_rl.algorithms.correctors import FunctionCorrector
from dllm_rl.algorithms.losses import exp_ratio
from dllm_rl.testing import check_corrector
from dllm_rl.testing.enumeration import gradient_table


def capped(log_ratio, advantages, mask, *, max_ratio=5.0):
    """(B, T): sg(min(r, max_ratio)) A log r, as `CISPO`."""
    return exp_ratio(log_ratio.detach()).clamp(max=max_ratio) * advantages[:, None] * log_ratio


def with_value(log_ratio, advantages, mask):
    """The same gradient, and A r as the value: only for the check."""
    objective = capped(log_ratio, advantages, mask)
    return objective - objective.detach() + advantages[:, None] * exp_ratio(log_ratio).detach()


check_corrector(FunctionCorrector(loss=with_value))
log_ratio = torch.linspace(-2, 2, 8, dtype=torch.float64).view(2, 4).requires_grad_()
signs, everywhere = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool)
(gradient,) = torch.autograd.grad(capped(log_ratio, signs, everywhere).sum(), log_ratio)
torch.testing.assert_close(gradient, log_ratio.detach().exp().clamp(max=5.0) * signs[:, None])
mine = FunctionCorrector(loss=capped)
table = gradient_table(mine, moved="old", policies=("early",), sigmas=(0.0, 0.3), networks=2)
print([(row.policy, row.sigma, round(row.bias, 2), round(row.rmse, 2)) for row in table])
