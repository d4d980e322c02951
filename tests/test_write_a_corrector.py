"""The worked example of a corrector in docs/extend.md runs as it is printed, and does what it says."""

import math
import runpy

import pytest
from readme import example
from torch import tensor
from torch.testing import assert_close

from dllm_rl.testing import make_stats


def test_the_example_runs_and_weighs_as_it_says(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        program = tmp_path / "example.py"
        program.write_text(example("Write a corrector"))
        corrector = runpy.run_path(str(program))["corrector"]
    mismatch = tensor([[0.0, 0.5, -1.0, math.nan]])
    weights, keep, metrics = corrector.weights(make_stats(mismatch, tensor([1.0]), tensor([[True, True, True, True]])))
    assert_close(weights, tensor([[1.0, math.exp(-1), math.exp(-2), 1.0]]))
    assert keep.tolist() == [[True, True, True, False]]
    assert metrics["doubt/mean_weight"] == pytest.approx((1 + math.exp(-1) + math.exp(-2)) / 3)
    assert metrics["rollout_corr/nonfinite_fraction"] == 0.25
