"""The contracts of correctors and estimators notice broken ones."""

import pytest
import torch

from dllm_rl.algorithms import correctors as c
from dllm_rl.algorithms.losses import CISPO, K3, Loss, PPOClip, Reinforce
from dllm_rl.testing import check_corrector


def _broken(change):
    def weights(stats):
        return c.TokenWeights(*change(*c.TIS().weights(stats), stats.log_mismatch))

    return c.FunctionCorrector(function=weights)


def summing(what):
    """r A, with a sum over processes that changes nothing."""
    return lambda r, a, m, sum_over_processes: r.exp() * a[:, None] + 0 * sum_over_processes(what(r)).sum()


def by_entropy(read, **fields):
    """TIS among the tokens whose entropy is below 1.5 nats, read by `read`."""

    def function(stats):
        weights = c.TIS().weights(stats)
        return weights._replace(importance_weights=weights.importance_weights.where(read(stats) < 1.5, 1.0))

    return c.FunctionCorrector(function=function, **fields)


def returning(change):
    return c.FunctionCorrector(function=lambda stats: change(c.TIS().weights(stats)))


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
    "must ask for one sum": c.FunctionCorrector(
        loss=lambda r, a, m, sum_over_processes: r.exp() * sum_over_processes(sum_over_processes(a))[:, None],
    ),
    "sums over processes must add up": c.FunctionCorrector(loss=summing(lambda r: r.exp().mean())),
    # The same value on-policy, and half the gradient.
    "gradient must be that of NoCorrection": c.FunctionCorrector(loss=lambda r, a, m: (1 + 0.5 * r) * a[:, None]),
    "reads the entropy": by_entropy(lambda stats: stats.entropy),
    "which is None": by_entropy(lambda stats: stats.entropy.clamp(min=0)),
    "set needs_entropy": c.Compose(parts=(c.TIS(), by_entropy(lambda stats: 2 * stats.entropy))),
    "needs_entropy=True": c.FunctionCorrector(
        function=lambda s: c.NoCorrection().weights(s.among(s.mask & (s.entropy < 9)))
    ),
    "not a Tensor": returning(lambda weights: weights.importance_weights),
    "not a tuple": returning(tuple),
    "not a dict": returning(lambda weights: weights._asdict()),
    "not a NoneType": returning(lambda weights: None),
}


@pytest.mark.parametrize("promise", BROKEN)
def test_contract_notices(promise):
    with pytest.raises(AssertionError, match=promise):
        check_corrector(BROKEN[promise])


def test_what_reads_the_entropy_and_says_so_passes():
    check_corrector(by_entropy(lambda stats: stats.entropy, needs_entropy=True))
    check_corrector(by_entropy(lambda stats: torch.zeros(()) if stats.entropy is None else stats.entropy))


class Halved(Loss):
    def __call__(self, log_ratio, advantages, mask):
        return 0.5 * (log_ratio + 1) * advantages[:, None]


def test_a_loss_is_checked_as_that_of_a_corrector_without_weights():
    for loss in (PPOClip(), Reinforce(), CISPO(), lambda r, a, m: r.exp() * a[:, None] + 1e-3):
        check_corrector(loss if isinstance(loss, Loss) else c.FunctionCorrector(loss=loss))  # of any value on-policy
    for made in (Halved(), c.FunctionCorrector(loss=Halved())):
        with pytest.raises(AssertionError, match=r"the gradient must be that of NoCorrection\(\) bit for bit"):
            check_corrector(made)


def test_a_plain_function_is_checked_as_weights():
    check_corrector(c.NoCorrection().weights)
    with pytest.raises(AssertionError, match="must be exactly 1"):
        check_corrector(lambda stats: c.NoCorrection().weights(stats)._replace(importance_weights=2.0 * stats.mask))


@pytest.mark.parametrize("value", [None, K3(), 3])
def test_what_is_neither_is_refused_in_a_line(value):
    with pytest.raises(ValueError, match=r"^corrector=.* is not of type Corrector"):
        check_corrector(value)


def test_an_error_that_the_entropy_does_not_cause_stays_what_it_is():
    with pytest.raises(TypeError, match="NoneType"):
        check_corrector(c.FunctionCorrector(function=lambda stats: None + stats.mask))
    with pytest.raises(AttributeError, match="no_such"):
        check_corrector(c.FunctionCorrector(function=lambda stats: stats.no_such))
