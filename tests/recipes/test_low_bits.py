"""The study of four-bit rollouts: statistics of gradients by hand, and its control."""

import pytest
import torch

from dllm_rl import ais
from dllm_rl.testing import make_stats
from recipes.studies.controls import permuted
from recipes.studies.low_bits_gradients import BASELINE, OWN, jackknife, mean_product, rows_of
from recipes.studies.paired import interval


def test_a_product_of_means_counts_different_batches_alone():
    """(1, 2, 3) with itself: (1*2 + 1*3 + 2*3) * 2 / 6 = 11/3, and the mean's square would be 4."""
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert mean_product(values[:, None] * values, [0, 1, 2]) == pytest.approx(11 / 3)
    assert mean_product(values[:, None] * values, [0, 2]) == 3


def test_the_jackknife_of_a_mean_is_students_interval():
    values = [0.1, 0.5, 0.4, 0.9]
    mean, half = jackknife(lambda batches: sum(values[i] for i in batches) / len(batches), 4)
    assert f"{mean:.3f}±{half:.3f}" == interval(values)


def test_rows_of_gradients_without_noise():
    """Own gradients (1, 0) in every batch. Twice as long: bias 1; at a right angle: bias 1 + 1, cosine 0."""
    own = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    arms = {OWN: own, BASELINE: torch.tensor([[0.0, 1.0]] * 4, dtype=torch.float64), "twice": 2 * own}
    rows = rows_of({arm: x @ x.T for arm, x in arms.items()}, {arm: x @ own.T for arm, x in arms.items()})
    numbers = {row.pop("arm"): {name: value for name, (value, _) in row.items()} for row in rows}
    assert numbers[OWN] == {"bias": 0, "cosine": 1, "gain": 1, "noise": 0}
    assert numbers[BASELINE] == {"bias": 2, "cosine": 0, "gain": 0, "noise": 0}
    assert numbers["twice"] == {"bias": 1, "cosine": 1, "gain": 1, "noise": 0}


def test_noise_is_the_variance_of_a_batch():
    """Gradients 1 and 3 in turn: mean square 5, product of different batches (8 * 8 - 20) / 12 = 11/3."""
    own = torch.tensor([[1.0], [3.0], [1.0], [3.0]], dtype=torch.float64)
    (row,) = rows_of({OWN: own @ own.T, BASELINE: own @ own.T}, {OWN: own @ own.T, BASELINE: own @ own.T})[:1]
    assert row["noise"][0] == pytest.approx((5 - 11 / 3) / (11 / 3))


def test_permuted_weights_are_those_of_ais_elsewhere():
    mask = torch.tensor([[True, True, False], [True, False, True]])
    stats = make_stats(torch.tensor([[-0.5, 0.9, 0.0], [0.3, 0.0, -1.2]]), torch.ones(2), mask)
    ours, moved = ais().weight_fn(stats).importance_weights, permuted(ais()).weight_fn(stats).importance_weights
    torch.testing.assert_close(moved[mask].sort().values, ours[mask].sort().values)
    assert (moved != ours)[mask].all() and (moved[~mask] == 1).all()
