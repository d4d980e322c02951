"""Intervals and pass@k against closed forms, enumeration and simulation."""

from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import comb, pi, sqrt, tan

import numpy as np
import pytest

from dllm_rl.evaluation.intervals import bootstrap_interval, majority_at_k, pass_at_k, student_t, t_interval, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 10), (37, 400), (200, 400)])
def test_wilson_solves_its_equation(successes: int, n: int) -> None:
    """The bounds are the two p with |successes/n - p| = z sqrt(p (1-p) / n)."""
    z = 1.959963984540054
    for bound in wilson(successes, n):
        assert abs(abs(successes / n - bound) - z * sqrt(bound * (1 - bound) / n)) < 1e-9
    low, high = wilson(successes, n)
    assert 0.0 <= low <= successes / n <= high <= 1.0 and high > low


def test_wilson_known_values() -> None:
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == 1.0
    z2 = 1.959963984540054**2
    assert wilson(0, 10)[1] == pytest.approx(z2 / (10 + z2), abs=1e-12)  # the root of p = z sqrt(p (1-p) / 10)
    assert wilson(5, 10)[0] + wilson(5, 10)[1] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("p", [0.02, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("n", [30, 400])
def test_wilson_covers(p: float, n: int) -> None:
    """Exact coverage: the probability of the counts whose interval holds p."""
    covered = sum(
        comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if wilson(k, n)[0] <= p <= wilson(k, n)[1]
    )
    assert 0.92 < covered < 0.99


def test_bootstrap_covers() -> None:
    generator = np.random.default_rng(1)
    trials, n, hits = 100, 60, 0
    for _ in range(trials):
        low, high = bootstrap_interval(generator.exponential(2.0, n), generator, resamples=300)
        hits += low <= 2.0 <= high
    assert 0.88 < hits / trials < 0.98  # 0.95 less what skewed data cost; standard error 0.022


def test_bootstrap_of_a_ratio_covers() -> None:
    """Correct cells over empty cells: sizes 4 to 6, each cell right with probability 0.7 but alike within a row."""
    generator = np.random.default_rng(2)
    trials, n, hits = 100, 80, 0
    for _ in range(trials):
        sizes = generator.integers(4, 7, n)
        right = np.where(generator.random(n) < 0.5, sizes, generator.binomial(sizes, 0.4))
        low, high = bootstrap_interval(right, generator, resamples=300, weights=sizes)
        hits += low <= 0.7 <= high
    assert 0.90 < hits / trials < 0.985


def test_bootstrap_width_is_the_normal_one_for_many_rows() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, 4000)
    low, high = bootstrap_interval(values, np.random.default_rng(4))
    assert (high - low) == pytest.approx(2 * 1.96 * values.std() / sqrt(4000), rel=0.06)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.01)


def test_bootstrap_of_a_ratio_divides_the_sums() -> None:
    """Half the rows 1 of 1, half 3 of 9: 4 of 10 together, where the mean of the ratios is 2/3."""
    low, high = bootstrap_interval([1.0, 3.0] * 500, np.random.default_rng(0), weights=[1.0, 9.0] * 500)
    assert 0.37 < low < 0.4 < high < 0.43


def test_bootstrap_is_a_function_of_its_generator() -> None:
    values = [0.0, 1.0, 1.0]
    assert bootstrap_interval(values, np.random.default_rng(0)) == bootstrap_interval(values, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("values", "weights"),
    [
        ([0.625], None),
        ([0.5, 0.5], None),
        ([0.0] * 4, None),
        ([-3e8] * 5, None),
        ([0.1 + 0.2, 0.3, 0.3], None),  # equal but for rounding
        ([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]),  # whatever is drawn, value and weight come together
    ],
)
def test_rows_without_spread_have_no_interval(values, weights) -> None:
    """Whatever rows are drawn, their mean is the same: a bootstrap has no width, which is no certainty."""
    assert bootstrap_interval(values, np.random.default_rng(0), weights=weights) is None
    before = [0.25] * len(values)
    ones = weights and [1.0] * len(values)
    differences = bootstrap_interval(
        values, np.random.default_rng(0), weights=weights, before=before, weights_before=ones
    )
    assert differences is None


def test_a_small_spread_has_an_interval() -> None:
    low, high = bootstrap_interval([0.3, 0.3 + 1e-6] * 50, np.random.default_rng(0))
    assert 0.3 < low < 0.3 + 5e-7 < high < 0.3 + 1e-6
    low, high = bootstrap_interval([1e-12, 3e-12] * 50, np.random.default_rng(0))  # small numbers, too
    assert 1e-12 < low < 2e-12 < high < 3e-12


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_samples_with_a_hit(n: int) -> None:
    for correct in range(n + 1):
        results = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            draws = list(combinations(results, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_closed_form_and_large_numbers() -> None:
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3, abs=1e-12)
    assert pass_at_k(200, 7, 100) == pytest.approx(1 - comb(193, 100) / comb(200, 100), abs=1e-12)
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5, abs=1e-9)


def partitions(n: int, most: int):
    """Every way to write n as a sum of numbers of at most `most`, the largest first."""
    if n == 0:
        yield ()
    for first in range(min(n, most), 0, -1):
        for rest in partitions(n - first, first):
            yield (first, *rest)


def share_of_right(votes: tuple) -> Fraction:
    """The right answer is 0, a vote of None is none: 1 over the answers that tie with it, else 0."""
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts or counts[0] < max(counts.values()):
        return Fraction(0)
    return Fraction(1, list(counts.values()).count(counts[0]))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_majority_at_k_is_the_mean_over_every_subset(n: int) -> None:
    """Brute force: every number of right samples, every partition of wrong ones, every k; exactly equal."""
    for correct in range(n + 1):
        for counts in (counts for wrong in range(n - correct + 1) for counts in partitions(wrong, wrong)):
            votes = [0] * correct + [i for i, count in enumerate(counts, 1) for _ in range(count)]
            votes += [None] * (n - len(votes))
            for k in range(1, n + 1):
                subsets = list(combinations(votes, k))
                mean = sum(map(share_of_right, subsets)) / len(subsets)
                assert majority_at_k(n, correct, counts, k) == float(mean), (correct, counts, k)


def test_majority_at_k_by_hand() -> None:
    """Samples A A B C, A right. Of 3: AAB and AAC are right, each A of ABC ties with two others: (1 + 1 + 2/3) / 4."""
    assert majority_at_k(4, 2, [1, 1], 3) == 2 / 3
    assert majority_at_k(4, 2, [1, 1], 4) == 1.0
    # A B B and a sample without a vote: of the 6 pairs, two are AB, half right, and in one A votes alone.
    assert majority_at_k(4, 1, [2], 2) == 2 / 6


def test_majority_at_k_of_many_samples() -> None:
    """The answers' chances to win, and that of no vote, sum to 1; of one sample, the chance is the share."""
    counts, n = [20, 11, 11, 5, *[1] * 9], 64
    for k in (1, 7, 32, 64):
        wins = [majority_at_k(n, own, counts[:i] + counts[i + 1 :], k) for i, own in enumerate(counts)]
        assert sum(wins) + comb(n - sum(counts), k) / comb(n, k) == pytest.approx(1.0, abs=1e-12)
    assert majority_at_k(n, 20, counts[1:], 1) == 20 / 64 and majority_at_k(n, 20, counts[1:], 64) == 1.0


def test_bad_arguments() -> None:
    for bad in ((4, 2, [3], 1), (4, 2, [2], 5), (4, 2, [2], 0), (4, -1, [2], 1), (4, 2, [-1], 1)):
        with pytest.raises(ValueError, match="correct"):
            majority_at_k(*bad)
    for bad in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="successes"):
            wilson(*bad)
    for bad in ((5, 6, 1), (5, 2, 6), (5, 2, 0), (5, -1, 1)):
        with pytest.raises(ValueError, match="correct"):
            pass_at_k(*bad)
    generator = np.random.default_rng(0)
    for values, weights in (([], None), ([1.0], [1.0, 2.0]), ([1.0], [0.0])):
        with pytest.raises(ValueError, match="a positive weight for each"):
            bootstrap_interval(values, generator, weights=weights)


def test_bootstrap_of_a_difference_is_of_the_same_rows() -> None:
    """What is common to both cancels: a constant shift shows no spread, and a noisy one has that of the shift alone."""
    generator = np.random.default_rng(3)
    hard = generator.normal(0, 10, 50)
    assert bootstrap_interval(hard + 1, generator, before=hard) is None
    shift = generator.normal(1, 1, 50)
    low, high = bootstrap_interval(hard + shift, np.random.default_rng(0), before=hard)
    assert (low, high) == pytest.approx(bootstrap_interval(shift, np.random.default_rng(0)))
    back = bootstrap_interval(hard, np.random.default_rng(0), before=hard + shift)
    assert back == pytest.approx((-high, -low), abs=1e-3)  # the quantiles lie between two draws


def test_bootstrap_of_a_difference_of_ratios_by_hand() -> None:
    """Two rows, so four draws: (0,0), (0,1), (1,0), (1,1) give 1/2 - 1/4, 4/6 - 2/6 twice, 3/4 - 1/2 (of sums)."""
    values, weights, before, others = [1.0, 3.0], [2.0, 4.0], [1.0, 1.0], [4.0, 2.0]
    generator = np.random.default_rng(0)
    low, high = bootstrap_interval(values, generator, weights=weights, before=before, weights_before=others)
    assert (low, high) == pytest.approx((1 / 4, 4 / 6 - 2 / 6))


def test_bootstrap_of_a_difference_refuses() -> None:
    for values, before in [([], []), ([1.0], [1.0, 2.0])]:
        with pytest.raises(ValueError, match="as many before"):
            bootstrap_interval(values, np.random.default_rng(0), before=before)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        *zip(range(2, 11), (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), strict=True),
        *((11, 2.228), (12, 2.201), (20, 2.093), (31, 2.042), (32, 2.040), (121, 1.980), (1001, 1.962)),
    ],
)
def test_students_t_is_that_of_printed_tables(values: int, expected: float) -> None:
    assert student_t(values) == pytest.approx(expected, abs=5e-4)


def test_students_t_is_not_rounded() -> None:
    """With one degree P(|t| < x) is arctan(x) 2 / pi, with two x / sqrt(2 + x^2)."""
    assert student_t(2) == pytest.approx(tan(0.475 * pi), rel=1e-12)
    assert student_t(3) == pytest.approx(sqrt(2 * 0.95**2 / (1 - 0.95**2)), rel=1e-12)


def test_students_interval_by_hand() -> None:
    """Of 1, 2, 3 the standard error is sqrt(1/3); with 4, 6 it is sqrt(1/3 + 2/2), with the smaller one's 1 degree."""
    half = student_t(3) * sqrt(1 / 3)
    assert t_interval([1, 2, 3]) == pytest.approx((2 - half, 2 + half))
    half = student_t(2) * sqrt(1 / 3 + 2 / 2)
    assert t_interval([1, 2, 3], [4, 6]) == pytest.approx((-3 - half, -3 + half))
    assert t_interval([1]) is None and t_interval([0.1, 0.1, 0.1]) is None and t_interval([1, 2], [3]) is None
