"""Results of an evaluation: means, confidence intervals, pass@k and maj@k. No torch."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from operator import itemgetter
from typing import Any

import numpy as np

from dllm_rl.evaluation.intervals import bootstrap_interval, majority_at_k, pass_at_k, wilson
from dllm_rl.tasks.base import Reward, metric_fractions

RATES = ("parsed", "accuracy", "solve_rate", "undecided", "cell_accuracy")  # shown if the grader returns them
WHY_NULL = "no interval: one problem, or the same number on every problem, shows no spread"
SAMPLER = ("max_new_tokens", "diffusion_steps", "block_size", "temperature", "rank", "commit", "cache")
SETTINGS = ("model", "quantization", *SAMPLER)
Sums = dict[int, tuple[float, float]]  # problem -> a metric's sum over its completions, and the sum's divisor


@dataclass(frozen=True)
class GradedAnswer:
    """A graded completion and its costs; a cost is 0 if it is unknown."""

    problem: int
    sample: int
    reward: Reward
    tokens: int = 0  # before the end token
    forwards: float = 0.0  # share of the batch's forwards
    seconds: float = 0.0  # share of the batch's time
    steps: int = 0  # forwards that this completion needed, whatever its batch
    content: str = field(
        default="", compare=False
    )  # digest of the problem, which tells whether two evaluations have the same problems


@dataclass(frozen=True)
class Evaluation:
    """All graded completions, sorted by problem and sample, and the settings that the result depends on."""

    answers: tuple[GradedAnswer, ...]
    facts: Mapping[str, Any]

    @cached_property
    def sums(self) -> dict[str, Sums]:
        """`Sums` of every metric by its name, as `metric_fractions` weighs each completion."""
        sums_by_metric: dict[str, Sums] = {}
        for answer in self.answers:
            for name, (value, weight) in metric_fractions(answer.reward).items():
                sums = sums_by_metric.setdefault(name, {})
                if weight:  # 0 for a ratio whose denominator is 0
                    previous = sums.get(answer.problem, (0.0, 0.0))
                    sums[answer.problem] = previous[0] + value, previous[1] + weight
        return dict(sorted(sums_by_metric.items()))

    @property
    def _has_rewards(self) -> bool:
        return any(answer.reward.value is not None for answer in self.answers)

    @cached_property
    def means(self) -> dict[str, float]:
        """Means over all completions: reward, parsed, and every metric of the breakdown; {} if none has a reward."""
        return {name: mean(*sums_and_divisors(sums)) for name, sums in self.sums.items()} if self._has_rewards else {}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Settings, numbers of problems and samples, every mean and pass@k with its interval, and costs, as JSON.

        Raises ValueError if no completion has a reward.
        """
        if not self._has_rewards:
            task = f"task {self.facts.get('task')!r}"
            raise ValueError(f"no completion of {task} has a reward: every reward function returned None for each")
        num_problems = len({answer.problem for answer in self.answers})
        num_samples = len(self.answers) // num_problems
        sums = dict(self.sums)
        if num_samples > 1:
            rewards: defaultdict[int, set[float]] = defaultdict(set)
            for answer in self.answers:
                if answer.reward.value is not None:
                    rewards[answer.problem].add(float(answer.reward.value))
            equal = {problem: (float(len(values) == 1), 1.0) for problem, values in rewards.items()}
            sums["frac_reward_zero_std"] = equal  # share of problems, like the training metric of this name
        sums |= self.pass_sums()
        costs = [(answer.tokens, answer.forwards, answer.seconds, answer.steps) for answer in self.answers]
        tokens, forwards, seconds, steps = map(sum, zip(*costs, strict=True))
        total_costs = {
            "forwards_per_answer": steps / len(costs),
            "tokens_per_forward": tokens / steps if steps else 0.0,
        }
        total_costs |= {"tokens": tokens, "forwards": round(forwards), "seconds": round(seconds, 3)}
        return {**self.facts, "n": num_problems, "samples": num_samples, **with_intervals(sums), **total_costs}

    def pass_sums(self) -> dict[str, Sums]:
        """Return pass@k of each problem for k = 1, 2, 4, ... up to the smallest number of samples of a problem.

        {} if that number is 1, or if no metric says which samples are right. Samples without this metric do not count.
        """
        metric = headline(self.means)
        num_samples = self._num_graded(metric)
        most = min(num_samples.values(), default=1)
        if most == 1 or metric == "reward":
            return {}
        num_right = self._num_right(metric)
        return {
            f"pass@{k}": {
                problem: (pass_at_k(num_samples[problem], num_right[problem], k), 1.0) for problem in self.sums[metric]
            }
            for k in (*(2**i for i in range(most.bit_length()) if 2**i < most), most)
        }

    def majority(self, ks: Sequence[int]) -> dict[str, Any]:
        """Return maj@k by `majority_at_k`, with its interval.

        Raises:
            ValueError: The grader returns no answers, or there are fewer than k samples.
        """
        metric = headline(self.means)
        wrong_votes: defaultdict[int, Counter[str]] = defaultdict(Counter)
        for answer in self.answers if ks else ():
            if answer.reward.answer is None or metric == "reward":
                raise ValueError("maj@k needs a grader that gives the answers that it compares, and an accuracy")
            if answer.reward.answer and answer.reward.breakdown.get(metric, 1) != 1:
                wrong_votes[answer.problem][answer.reward.answer] += 1
        sums: dict[str, Sums] = {f"maj@{k}": {} for k in ks}
        num_samples, num_right = self._num_graded(metric), self._num_right(metric)
        for k in ks:
            if k > max(num_samples.values(), default=0):
                raise ValueError(f"maj@{k} needs {k} samples of a problem with an accuracy; give more samples")
        for k, problem in product(ks, self.sums[metric]):
            if num_samples[problem] < k:
                continue
            votes = list(wrong_votes[problem].values())
            sums[f"maj@{k}"][problem] = majority_at_k(num_samples[problem], num_right[problem], votes, k), 1.0
        return with_intervals(sums)

    def _num_graded(self, metric: str) -> Counter[int]:
        """Return the number of samples of each problem that have the metric."""
        return Counter(answer.problem for answer in self.answers if metric in answer.reward.breakdown)

    def _num_right(self, metric: str) -> Counter[int]:
        """Return the number of right samples of each problem: those whose metric is 1."""
        return Counter(answer.problem for answer in self.answers if answer.reward.breakdown.get(metric) == 1)


def sums_and_divisors(sums: Sums) -> Any:
    """Return all problems' sums, and all divisors; 0 and 1 for a metric that no problem has."""
    return zip(*(sums.values() or [(0.0, 1.0)]), strict=True)


def headline(names: Collection[str]) -> str:
    """Return the main metric of a task: accuracy or solve_rate if it is in `names`, else reward."""
    for name in ("accuracy", "solve_rate"):
        if name in names:
            return name
    return "reward"


def best_of(values_and_labels: Sequence[tuple[float, str]], metric: str) -> str:
    """Return a line of text with the highest value and the last one.

    The line says that the highest value is biased upwards, because it was selected.
    """
    highest, label = max(values_and_labels, key=itemgetter(0))
    last, last_label = values_and_labels[-1]
    explanation = f"the highest of {len(values_and_labels)}, which flatters it"
    return f"best {metric}: {highest:.3f} ({label}), {explanation}; the last: {last:.3f} ({last_label})"


def paired_differences(evaluation: Evaluation, baseline: Evaluation) -> dict[str, list[float | None]]:
    """Return [difference, low, high] for each metric: its mean minus the baseline's, with a 95 % interval.

    Only the problems that both evaluations have are compared. low and high are None if that is one problem, or if
    every problem has the same difference.
    """
    differences: dict[str, list[float | None]] = {}
    for name, sums in evaluation.sums.items():
        baseline_sums = baseline.sums.get(name, {})
        problems = sorted(sums.keys() & baseline_sums.keys())  # sorted, because the bootstrap depends on the order
        if problems:
            values, weights = zip(*map(sums.__getitem__, problems), strict=True)
            baseline_values, baseline_weights = zip(*map(baseline_sums.__getitem__, problems), strict=True)
            bounds = bootstrap_interval(
                values,
                np.random.default_rng(0),
                weights=weights,
                before=baseline_values,
                weights_before=baseline_weights,
            )
            difference = mean(values, weights) - mean(baseline_values, baseline_weights)
            differences[name] = [difference, *(bounds or (None, None))]
    return differences


def compared_with(against: str, evaluation: Evaluation, baseline: Evaluation) -> dict[str, Any]:
    """Return what results say of a comparison: `against`, `difference` (`paired_differences`), and `why_null`, the
    reason, if a difference has no interval.
    """
    differences = paired_differences(evaluation, baseline)
    has_none = any(None in numbers for numbers in differences.values())
    return {"against": against, "difference": differences} | ({"why_null": WHY_NULL} if has_none else {})


def with_bounds(number: float, bounds: Sequence[float | None] | None, *, sign: str = "", separator: str = " ") -> str:
    """Return a number and its interval for a table. sign: "+" writes the sign of positive numbers, too."""
    shown = [f"{bound:{sign}.3f}" for bound in bounds or () if bound is not None]
    return f"{number:{sign}.3f}{separator}[{', '.join(shown) or 'no interval'}]"


def mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return sum(values) / sum(weights)."""
    return sum(values) / sum(weights)


def with_intervals(sums_by_metric: Mapping[str, Sums]) -> dict[str, Any]:
    """Return NAME (the mean) and NAME_interval ([low, high], or None) for each metric; and `why_null`, the reason,
    if one is None.
    """
    numbers: dict[str, Any] = {}
    for name, sums in sums_by_metric.items():
        values, weights = sums_and_divisors(sums)
        numbers[name] = mean(values, weights)
        bounds = interval(name, values, weights)
        numbers[f"{name}_interval"] = bounds and list(bounds)
    return numbers | ({"why_null": WHY_NULL} if None in numbers.values() else {})


def interval(name: str, values: Sequence[float], weights: Sequence[float]) -> tuple[float, float] | None:
    """Return a 95 % interval: Wilson's if every problem scores 0 or 1, else a bootstrap with a fixed seed.

    Wilson's interval is of the share of problems, so that it needs equal weights, or equal scores. The bootstrap
    resamples problems, because the samples of one problem are not independent. None without a spread: one problem, or
    equal scores.
    """
    # Rewards and cells of a puzzle are not independent trials, even if all values are 0 or 1.
    right = np.asarray(values) > 0
    all_zero_or_one = (np.asarray(values) == np.where(right, weights, 0)).all()
    one_mean = len(set(weights)) == 1 or right.all() or not right.any()
    if all_zero_or_one and one_mean and name not in ("reward", "cell_accuracy"):
        return wilson(int(right.sum()), len(right))
    return bootstrap_interval(values, np.random.default_rng(0), weights=weights)


def varying(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the settings that differ between results; ["model"] if none does."""
    return [name for name in SETTINGS if len({str(row[name]) for row in results if name in row}) > 1] or ["model"]


def metric_of(results: Sequence[dict[str, Any]]) -> str:
    """Return the metric that the protocol of some results reports: cell_accuracy for Sudoku under a paper's, else the
    headline. Of a grader that may return None, some of the results may lack it.
    """
    names = {name for result in results for name in result}
    is_published = results[0].get("protocol") not in (None, "own", "strict")
    return "cell_accuracy" if is_published and "cell_accuracy" in names else headline(names)
