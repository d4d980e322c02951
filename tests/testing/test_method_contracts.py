"""The contracts of correctors and estimators notice broken ones."""

from dataclasses import replace

import pytest
import torch

from dllm_rl.algorithms import correctors as c
from dllm_rl.testing import check_corrector


def _broken(change):
    def weight_fn(stats):
        return change(*c.tis().weight_fn(stats), stats.log_mismatch)

    return replace(c.no_correction(), weight_fn=weight_fn)


def summing(what):
    """r A, with a sum over processes that changes nothing."""
    return lambda r, a, m, sum_over_processes: r.exp() * a[:, None] + 0 * sum_over_processes(what(r)).sum()


BROKEN = {
    "exactly 1": _broken(lambda w, k, m, x: (w * 1.0001, k, m)),
    "keep mask must be the mask": _broken(lambda w, k, m, x: (w, k & (torch.arange(k.shape[1]) > 0), m)),
    "detached": _broken(lambda w, k, m, x: (x.exp(), k, m)),
    "finite float": _broken(lambda w, k, m, x: (w, k, {"a": torch.ones(())})),
    "order of the rows must": _broken(
        lambda w, k, m, x: (w * (1 + torch.arange(len(w)) * w.sub(1).abs().sum())[:, None], k, m)
    ),
    "off the mask": _broken(lambda w, k, m, x: (w * (1 + x.detach().clamp(min=5, max=8).sub(5).sum()), k, m)),
    "subset": _broken(lambda w, k, m, x: (w, k | (x > 0), m)),
    "leave the keep mask": _broken(lambda w, k, m, x: (w, k | ~x.isfinite(), m)),
    "loss must be that of none": replace(c.no_correction(), loss=lambda r, a, m: r.exp() * a[:, None] + 1e-3),
    "must ask for one sum": replace(
        c.no_correction(),
        loss=lambda r, a, m, sum_over_processes: r.exp() * sum_over_processes(sum_over_processes(a))[:, None],
    ),
    "sums over processes must add up": replace(c.no_correction(), loss=summing(lambda r: r.exp().mean())),
    "gradient must be that of none": c.no_correction(),
}


@pytest.mark.parametrize("promise", BROKEN)
def test_contract_notices(promise):
    corrector = BROKEN[promise]
    if promise == "gradient must be that of none":  # same value on-policy, half the gradient
        corrector = replace(corrector, loss=lambda r, a, m: (1 + 0.5 * r) * a[:, None])
    with pytest.raises(AssertionError, match=promise):
        check_corrector(corrector)
