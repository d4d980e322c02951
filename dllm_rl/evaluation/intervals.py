"""95 % confidence intervals (Wilson, bootstrap) and the unbiased pass@k and maj@k estimators. No torch."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import comb, cos, pi, sin, sqrt, tan
from statistics import NormalDist, mean, variance

import numpy as np

LEVEL = 0.95
Numbers = Sequence[float] | np.ndarray
MAX_DRAWS = 2**16  # of rows at once: a large bootstrap stays in the cache, a small one needs few calls
ROUNDING = 1e-9  # relative to the values; a bootstrap interval whose width is below it shows rounding alone


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of p = successes / n.

    (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n), with z the normal quantile. The interval is in [0, 1]
    and has a positive width.

    Raises:
        ValueError: Not 0 <= successes <= n, or n below 1.
    """
    if not (n >= 1 and 0 <= successes <= n):
        raise ValueError(f"successes={successes} of n={n}: needs 0 <= successes <= n and n >= 1")
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    p = successes / n
    center = p + z * z / (2 * n)
    half_width = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Set the exact bounds 0 (no success) and 1 (no failure), which rounding could miss.
    low = 0.0 if successes == 0 else (center - half_width) / scale
    high = 1.0 if successes == n else (center + half_width) / scale
    return low, high


def bootstrap_interval(
    values: Numbers,
    generator: np.random.Generator,
    *,
    weights: Numbers | None = None,
    before: Numbers | None = None,
    weights_before: Numbers | None = None,
    resamples: int = 2000,
) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval (Efron 1979) for the mean of `values`, or for it minus that of `before`.

    Both are measured on the same rows. With weights, a mean is sum(values) / sum(weights). With 30 normally distributed
    rows the interval covers 93 %, not 95 %.

    Returns:
        The interval; None for one row, or if every row has the same number, because the rows then show no spread.
    """
    numbers = np.asarray(values, dtype=np.float64)
    divisors = np.ones_like(numbers) if weights is None else np.asarray(weights, dtype=np.float64)
    before_values = np.zeros_like(numbers) if before is None else np.asarray(before, dtype=np.float64)
    divisors_before = np.ones_like(numbers) if weights_before is None else np.asarray(weights_before, dtype=np.float64)
    lengths = {len(each) for each in (numbers, divisors, before_values, divisors_before)}
    if len(lengths) > 1 or 0 in lengths or not (divisors > 0).all() or not (divisors_before > 0).all():
        raise ValueError(f"{len(numbers)} values: needs some, as many before, and a positive weight for each")
    differences: list[float] = []
    while len(differences) < resamples:
        at_once = min(max(1, MAX_DRAWS // len(numbers)), resamples - len(differences))
        # The same rows for both: their difficulty cancels.
        rows = generator.integers(0, len(numbers), (at_once, len(numbers)))
        means = numbers[rows].sum(1) / divisors[rows].sum(1)
        differences.extend(means - before_values[rows].sum(1) / divisors_before[rows].sum(1))
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    scale = max(abs(numbers / divisors).max(), abs(before_values / divisors_before).max())
    return (float(low), float(high)) if high - low > ROUNDING * scale else None


def student_t(n: int) -> float:
    """Return the half-width of n values' 95 % interval in standard errors: Student's t, n - 1 degrees of freedom.

    P(|t| < x) is a finite sum of powers of the cosine of arctan(x / sqrt(n - 1)) (Abramowitz & Stegun 26.7.3, 26.7.4).
    """
    degrees, low, high = n - 1, 0.0, pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        term, total = cos(angle) ** (degrees % 2), 0.0
        for power in range(degrees % 2, degrees - 1, 2):
            total += term
            term *= cos(angle) ** 2 * (power + 1) / (power + 2)
        inside = (angle + total * sin(angle)) * 2 / pi if degrees % 2 else total * sin(angle)
        low, high = (angle, high) if inside < LEVEL else (low, angle)
    return degrees**0.5 * tan(low)


def t_interval(values: Sequence[float], before: Sequence[float] | None = None) -> tuple[float, float] | None:
    """Return Student's 95 % interval of the mean of `values`, or of it minus that of `before`, of other runs.

    For two samples it takes n - 1 degrees of freedom of the smaller one, and never less width than Welch's interval.

    Returns:
        The interval; None for fewer than two values, or if all values are equal, because they then show no spread.
    """
    samples = [values] if before is None else [values, before]
    n = min(map(len, samples))
    if n < 2:
        return None
    center = mean(values) - (0.0 if before is None else mean(before))
    half = student_t(n) * sqrt(sum(variance(each) / len(each) for each in samples))
    scale = max(abs(value) for each in samples for value in each)
    return (center - half, center + half) if 2 * half > ROUNDING * scale else None


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased probability that one of k samples is correct (Chen et al. 2021, eq. 1).

    1 - C(n - correct, k) / C(n, k), computed as a product, without overflow or cancellation.

    Raises:
        ValueError: Not 0 <= correct <= n, or not 1 <= k <= n.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"n={n}, correct={correct}, k={k}: needs 0 <= correct <= n and 1 <= k <= n")
    if n - correct < k:
        return 1.0
    prob_all_wrong = 1.0
    for i in range(n - correct + 1, n + 1):
        prob_all_wrong *= 1 - k / i
    return 1 - prob_all_wrong


def majority_at_k(n: int, correct: int, wrong: Sequence[int], k: int) -> float:
    """Return the unbiased probability that the most frequent answer among k of n samples is right.

    It is the exact mean over all subsets of k samples. If m answers tie and one of them is right, the subset counts as
    1/m; a subset without a vote is wrong [ours].

    Args:
        n: Number of samples.
        correct: Number of samples with the right answer.
        wrong: Number of samples with each wrong answer. The remaining samples have no vote.
        k: Number of samples that vote.

    Raises:
        ValueError: k is above n or below 1, or the counts do not fit n.
    """
    if not (min(correct, *wrong, 0) == 0 and correct + sum(wrong) <= n and 1 <= k <= n):
        raise ValueError(f"n={n}, correct={correct}, wrong={wrong}, k={k}: needs correct + sum(wrong) <= n, n >= k > 0")
    num_right = Fraction(0)  # subsets whose majority is right
    for most in range(1, min(correct, k) + 1):  # votes for the right answer, which no other answer may exceed
        rivals = [count for count in wrong if count >= most]
        num_other = n - correct - sum(rivals)  # samples whose answers are too rare to tie
        # ways[drawn, tied]: ways to draw `drawn` wrong samples such that `tied` answers, the right one included, tie.
        ways = Counter({(drawn, 1): comb(num_other, drawn) for drawn in range(k - most + 1)})
        for count in rivals:
            more: Counter[tuple[int, int]] = Counter()
            for (drawn, tied), number in ways.items():
                for votes in range(min(most, k - most - drawn) + 1):
                    more[drawn + votes, tied + (votes == most)] += number * comb(count, votes)
            ways = more
        for (drawn, tied), number in ways.items():
            num_right += Fraction(comb(correct, most) * number, tied) if drawn == k - most else 0
    return float(num_right / comb(n, k))
