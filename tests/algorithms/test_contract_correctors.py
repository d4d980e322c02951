"""One contract for every corrector; a new one joins by one line."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dllm_rl.algorithms import correctors as c
from dllm_rl.algorithms.losses import GSPO
from dllm_rl.testing import check_corrector, make_stats

CORRECTORS = {
    "none": c.NoCorrection(),
    "tis": c.TIS(),
    "tis-sequence": c.TIS(level="sequence"),
    "tis-geometric": c.TIS(level="sequence", pool="geometric", cap=3.0),
    "mis": c.MIS(),
    "mis-sequence": c.MIS(level="sequence", pool="geometric"),
    "icepop": c.IcePop(),
    "reject-token": c.Reject(level="token", statistic="k1", threshold=0.3),
    "reject-mean": c.Reject(threshold=0.1),
    "reject-sum": c.Reject(statistic="k2", pool="sum", threshold=0.5),
    "reject-max": c.Reject(statistic="k3", pool="max", threshold=0.2),
    "ais-alarm": c.AIS(),
    "ais-geometric": c.AIS(pool="geometric"),
    "ais-sequence": c.AIS(level="sequence"),
    "tbpo": c.TBPO(),
    "tbpo-wide": c.TBPO(eps_high=0.05, neg_low=0.05, neg_high=0.05),
    "aligned": c.Aligned(),
    "qarl": c.QaRL(),
    "vexact": c.Compose(parts=(c.TIS(), c.Reject())),
    "composed": c.Compose(
        parts=(c.AIS(), c.Reject(threshold=0.2), c.FunctionCorrector(loss=GSPO(epsilon=0.1, epsilon_high=0.1)))
    ),
}


@pytest.mark.parametrize("name", CORRECTORS)
def test_contract(name):
    check_corrector(CORRECTORS[name])


def test_an_entropy_that_is_read_off_the_mask_breaks_the_contract():
    def weights(stats):
        _, keep, metrics = c.drop_nonfinite(stats.log_mismatch, stats.mask)
        off = (stats.log_mismatch.detach() != 0) * 0.1 * stats.entropy.mean()
        return c.TokenWeights(1 + off * torch.ones_like(stats.log_mismatch), keep, metrics)

    with pytest.raises(AssertionError, match="off the mask must not change the weights"):
        check_corrector(c.FunctionCorrector(function=weights, needs_entropy=True))


FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=50, deadline=None)
@given(values=arrays("float32", (3, 4), elements=FINITE), marked=arrays("bool", (3, 4)))
def test_lambda_lies_in_the_unit_interval_for_any_finite_input(values, marked):
    stats = make_stats(torch.tensor(values), torch.ones(3), torch.tensor(marked))
    for pool in ("product", "geometric"):
        weights, keep, metrics = c.AIS(pool=pool).weights(stats)
        assert 0 <= metrics["ais/lambda"] <= 1
        assert 1 / 3 - 1e-12 <= metrics["ais/ess"] <= 1 and metrics["ais/CV"] >= 0 and metrics["ais/D"] >= 0
        assert torch.equal(keep, torch.tensor(marked))
        assert ((weights >= 0) & (weights <= 2)).all()


@settings(max_examples=20, deadline=None)
@given(values=arrays("float32", (3, 4), elements=st.floats(width=32)))
def test_any_input_at_all_gives_finite_weights(values):
    mismatch = torch.tensor(values)
    lost = (~mismatch.isfinite()).double().mean().item()
    stats = make_stats(mismatch, torch.tensor([1.0, -1.0, 0.0]), torch.ones(3, 4, dtype=torch.bool))
    for name, corrector in CORRECTORS.items():
        weights, keep, metrics = corrector.weights(stats)
        assert weights.isfinite().all() and (weights >= 0).all(), name
        assert not keep[~mismatch.isfinite()].any(), name
        assert metrics["rollout_corr/nonfinite_fraction"] == pytest.approx(lost, abs=1e-12), name
