"""One contract for every corrector; a new one joins by one line."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dllm_rl.algorithms import correctors as c
from dllm_rl.algorithms.by_step import by_step
from dllm_rl.algorithms.losses import gspo
from dllm_rl.algorithms.triage import triage
from dllm_rl.testing import check_corrector, make_stats

CORRECTORS = {
    "none": c.no_correction(),
    "tis": c.tis(),
    "tis-sequence": c.tis(level="sequence"),
    "tis-geometric": c.tis(level="sequence", pool="geometric", cap=3.0),
    "mis": c.mis(),
    "mis-sequence": c.mis(level="sequence", pool="geometric"),
    "icepop": c.icepop(),
    "reject-token": c.reject(level="token", statistic="k1", threshold=0.3),
    "reject-mean": c.reject(threshold=0.1),
    "reject-sum": c.reject(statistic="k2", pool="sum", threshold=0.5),
    "reject-max": c.reject(statistic="k3", pool="max", threshold=0.2),
    "ais-alarm": c.ais(),
    "ais-geometric": c.ais(pool="geometric"),
    "ais-sequence": c.ais(level="sequence"),
    "tbpo": c.tbpo(),
    "tbpo-wide": c.tbpo(eps_high=0.05, neg_low=0.05, neg_high=0.05),
    "aligned": c.aligned(),
    "qarl": c.qarl(),
    "triage": triage(),
    "triage-narrow": triage(gate=0.3, window=2),
    "by step": by_step(),
    "by step, rejection": by_step(corrector=c.reject(threshold=0.1)),
    "vexact": c.compose(c.tis(), c.reject()),
    "composed": replace(c.compose(c.ais(), c.reject(threshold=0.2)), loss=partial(gspo, epsilon=0.1, epsilon_high=0.1)),
}


@pytest.mark.parametrize("name", CORRECTORS)
@pytest.mark.parametrize("seed", [0, 1])
def test_contract(name, seed):
    check_corrector(CORRECTORS[name], seed=seed)


FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=150, deadline=None)
@given(values=arrays("float32", (3, 4), elements=FINITE), marked=arrays("bool", (3, 4)))
@pytest.mark.parametrize("pool", ["product", "geometric"])
def test_lambda_lies_in_the_unit_interval_for_any_finite_input(pool, values, marked):
    weight_fn = c.ais(pool=pool).weight_fn
    weights, keep, metrics = weight_fn(make_stats(torch.tensor(values), torch.ones(3), torch.tensor(marked)))
    assert 0 <= metrics["ais/lambda"] <= 1
    assert 1 / 3 - 1e-12 <= metrics["ais/rho"] <= 1 and metrics["ais/CV"] >= 0 and metrics["ais/D"] >= 0
    assert torch.equal(keep, torch.tensor(marked))
    assert ((weights >= 0) & (weights <= 2)).all()


@settings(max_examples=60, deadline=None)
@given(values=arrays("float32", (3, 4), elements=st.floats(width=32)))
@pytest.mark.parametrize("name", CORRECTORS)
def test_any_input_at_all_gives_finite_weights(name, values):
    mismatch = torch.tensor(values)
    advantages, mask = torch.tensor([1.0, -1.0, 0.0]), torch.ones(3, 4, dtype=torch.bool)
    weights, keep, metrics = CORRECTORS[name].weight_fn(make_stats(mismatch, advantages, mask))
    assert weights.isfinite().all() and (weights >= 0).all()
    assert not keep[~mismatch.isfinite()].any()
    lost = (~mismatch.isfinite()).double().mean().item()
    assert metrics["rollout_corr/nonfinite_fraction"] == pytest.approx(lost, abs=1e-12)
