"""The ratios of three short rows, of which weights are worked by hand."""

import math

import torch
from torch import tensor
from torch.testing import assert_close

from dllm_rl.testing import make_stats

# The (B=3, T=4) example: ratios rho = p_old / p_rollout, three, two and four of them marked.
#   row 0   1    2   4   1/2    product 4, geometric mean 4^(1/4) = sqrt 2
#   row 1   1/4  1   8   -      product 2, geometric mean 2^(1/3)
#   row 2   1    1   -   -      product 1, geometric mean 1
# The unmarked ones hold 100, which must not be seen.
RHO = tensor([[1, 2, 4, 0.5], [0.25, 1, 8, 100], [1, 1, 100, 100]], dtype=torch.float64)
MASK = tensor([[True] * 4, [True, True, True, False], [True, True, False, False]])
X, A = RHO.log(), tensor([1.0, -2.0, 0.5], dtype=torch.float64)
LN2 = math.log(2)


def weigh(corrector):
    weights, keep, metrics = corrector.weights(make_stats(X, A, MASK))
    return torch.where(keep, weights, 0), keep, metrics


def close(actual, expected):
    # Sequence ratios pass through fp64 logs and exps: a few roundings.
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=1e-14)
