"""The study of four-bit rollouts: statistics of gradients by hand, its control, and which rate an arm takes."""

from pathlib import Path

import pytest
import torch

from dllm_rl import RunControl, ais
from dllm_rl.testing import make_stats
from recipes.studies.low_bits import ARMS, HALF, MORE_ARMS, HalfTheSteps, best_rates, permuted_ais
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
    ours, moved = ais().weight_fn(stats).importance_weights, permuted_ais().weight_fn(stats).importance_weights
    torch.testing.assert_close(moved[mask].sort().values, ours[mask].sort().values)
    assert (moved != ours)[mask].all() and (moved[~mask] == 1).all()


def test_an_arm_takes_the_best_rate_of_the_arm_that_it_follows():
    """The mean of two seeds counts: of `unquantized` 0.4 and 0.4 at rate 1, and 0.6 and 0.3 at rate 2."""
    after = {("unquantized", 1.0): (0.4, 0.4), ("unquantized", 2.0): (0.6, 0.3), ("int4", 1.0): (0.3, 0.3)}
    after |= {("int4", 2.0): (0.2, 0.3), ("int4, tis", 1.0): (0.1, 0.1), ("int4, tis", 2.0): (0.6, 0.6)}
    after |= {("int4, aligned", 1.0): (0.5, 0.5), ("int4, aligned", 2.0): (0.1, 0.8)}
    runs = [
        {"arm": f"{arm} at {rate:g}", "learning_rate": rate, "after": end}
        for (arm, rate), ends in after.items()
        for end in ends
    ]
    rates = best_rates(runs)
    assert rates.keys() == (ARMS | MORE_ARMS).keys()
    assert rates["fp8"] == rates["unquantized"] == 2.0 and rates["int4 row"] == rates["int4"] == 1.0
    assert rates["int4, qarl"] == rates["int4, aligned"] == 1.0 and rates["int4 row, tis"] == rates["int4, ais"] == 2.0


def test_half_the_steps_have_weights_of_tis():
    """A ratio of e is capped at 2 in the first 24 steps, or in those from 24 on, and 1 in the others."""
    stats = make_stats(torch.tensor([[1.0]]), torch.ones(1), torch.tensor([[True]]))
    for first in (True, False):
        half = HalfTheSteps(first=first)
        weights = []
        for step in range(HALF + 2):
            half.on_step(RunControl(directory=Path(), step=step, num_steps=48), {})
            weights.append(half(stats).importance_weights.item())
        assert weights == [2.0 if first else 1.0] * HALF + [1.0 if first else 2.0] * 2
