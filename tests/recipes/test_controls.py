"""Control correctors of the studies: what they change, and what they leave alone."""

import pytest
import torch

from dllm_rl.algorithms import correctors as c
from dllm_rl.testing import check_corrector, make_stats
from recipes.studies.controls import Shuffled, fixed_lambda

MISMATCH, ADVANTAGES = torch.tensor([[0.5, -0.2, 0.0], [1.0, 0.3, 9.0]]), torch.tensor([1.0, -1.0])
MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_a_fixed_lambda_is_the_same_in_every_batch(lam):
    corrector = fixed_lambda(lam, cap=2.0)
    check_corrector(corrector)
    weights, _, metrics = corrector.weights(make_stats(MISMATCH, ADVANTAGES, MASK))
    expected = torch.where(MASK, 1 + lam * (MISMATCH.exp().clamp(max=2.0) - 1), 1)
    torch.testing.assert_close(weights, expected)
    assert metrics["ais/lambda"] == lam
    with pytest.raises(ValueError, match="lam=1"):
        fixed_lambda(1.5)


def test_shuffled_weights_are_the_same_numbers_elsewhere():
    plain, keep, metrics = c.TIS().weights(make_stats(MISMATCH, ADVANTAGES, MASK))
    dealt = [
        Shuffled(corrector=c.TIS(), seed=seed).weights(make_stats(MISMATCH, ADVANTAGES, MASK)) for seed in (0, 0, 1, 2)
    ]
    for weights, kept, said in dealt:
        assert sorted(weights[MASK].tolist()) == sorted(plain[MASK].tolist()) and weights[1, 2] == 1
        assert torch.equal(kept, keep) and said == metrics
    assert torch.equal(dealt[0][0], dealt[1][0]) and not torch.equal(dealt[0][0], plain)
    assert len({tuple(weights[MASK].tolist()) for weights, _, _ in dealt}) == 3
