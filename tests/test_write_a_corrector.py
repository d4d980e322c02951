"""The example of a corrector weighs as it says."""

import math

import pytest
from torch import tensor
from torch.testing import assert_close

from dllm_rl.testing import check_corrector, make_stats
from recipes.examples.own_corrector import Doubt


def test_the_example_keeps_the_contract_and_weighs_as_it_says():
    corrector = Doubt()
    check_corrector(corrector)
    mismatch = tensor([[0.0, 0.5, -1.0, math.nan]])
    weights, keep, metrics = corrector.weights(make_stats(mismatch, tensor([1.0]), tensor([[True, True, True, True]])))
    assert_close(weights, tensor([[1.0, math.exp(-1), math.exp(-2), 1.0]]))
    assert keep.tolist() == [[True, True, True, False]]
    assert metrics["doubt/mean_weight"] == pytest.approx((1 + math.exp(-1) + math.exp(-2)) / 3)
    assert metrics["rollout_corr/nonfinite_fraction"] == 0.25
