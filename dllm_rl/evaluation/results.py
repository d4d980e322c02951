"""The results of an evaluation as numbers: means, 95 % intervals, pass@k, cost. No torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dllm_rl.evaluation.intervals import bootstrap_difference, bootstrap_mean, pass_at_k, wilson
from dllm_rl.tasks.base import Reward, addends


@dataclass(frozen=True)
class Graded:
    """A graded completion: tokens before its end token, and its share of the batch's calls and seconds (0: unknown)."""

    problem: int
    sample: int
    reward: Reward
    tokens: int = 0
    forwards: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """Every graded completion, by problem and sample, and the facts that the result depends on."""

    answers: tuple[Graded, ...]
    facts: Mapping[str, Any]

    @cached_property
    def means(self) -> dict[str, float]:
        """Means over all completions: reward, parsed, and every name of the rewards' breakdown."""
        names = sorted({name for answer in self.answers for name in addends(answer.reward)})
        return {name: mean(*by_problem(self.answers, name)) for name in names}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Facts, n problems, samples per problem, every mean and pass@k with its interval, and the cost; plain JSON."""
        problems = len({answer.problem for answer in self.answers})
        samples = len(self.answers) // problems
        found = {name: by_problem(self.answers, name) for name in self.means}
        right = headline(self.means)
        if samples > 1 and right != "reward":
            counts = [round(value) for value in found[right][0]]
            for k in (*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples):
                found[f"pass@{k}"] = [pass_at_k(samples, count, k) for count in counts], [1.0] * problems
        return {
            **self.facts,
            "n": problems,
            "samples": samples,
            **with_intervals(found),
            "tokens": sum(answer.tokens for answer in self.answers),
            "forwards": round(sum(answer.forwards for answer in self.answers)),
            "seconds": round(sum(answer.seconds for answer in self.answers), 3),
        }


def by_problem(answers: Sequence[Graded], name: str) -> tuple[list[float], list[float]]:
    """Each problem's sum of a metric and its divisor: the completions with the metric, or the count of a ratio
    (`addends`). Problems without the metric are left out."""
    kept = [pair for pair in _sums(answers, name).values() if pair[1]] or [(0.0, 1.0)]
    return [value for value, _ in kept], [weight for _, weight in kept]


def _sums(answers: Sequence[Graded], name: str) -> dict[int, tuple[float, float]]:
    """The numbers of `by_problem` for every problem; 0 and 0 without the metric."""
    sums: dict[int, tuple[float, float]] = {}
    for answer in answers:
        value, weight = addends(answer.reward).get(name, (0.0, 0.0))
        before = sums.get(answer.problem, (0.0, 0.0))
        sums[answer.problem] = before[0] + value, before[1] + weight
    return sums


def headline(names: Collection[str]) -> str:
    """The metric that a task is known by, if it is in `names`."""
    return next((name for name in ("accuracy", "solve_rate") if name in names), "reward")


def paired_differences(found: Evaluation, before: Evaluation) -> dict[str, list[float]]:
    """Each mean less that of another evaluation: [difference, low, high], with a 95 % interval. Problems with both
    metrics count and are resampled (`bootstrap_difference`, from a fixed seed)."""
    differences = {}
    for name in (name for name in found.means if name in before.means):
        now, then = _sums(found.answers, name), _sums(before.answers, name)
        both = [problem for problem in now if now[problem][1] and then.get(problem, (0.0, 0.0))[1]]
        if both:
            values, weights = zip(*(now[problem] for problem in both), strict=True)
            earlier, shares = zip(*(then[problem] for problem in both), strict=True)
            drawn = np.random.default_rng(0)
            low, high = bootstrap_difference(values, earlier, drawn, weights=weights, weights_before=shares)
            differences[name] = [mean(values, weights) - mean(earlier, shares), low, high]
    return differences


def mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(values) / sum(weights)


def with_intervals(found: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, Any]:
    """NAME, its mean, and NAME_interval, [low, high], for each name's values and weights."""
    shown: dict[str, Any] = {}
    for name, (values, weights) in found.items():
        shown[name] = mean(values, weights)
        shown[f"{name}_interval"] = list(interval(name, values, weights))
    return shown


def interval(name: str, values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval: Wilson's if every problem gives 0 or 1, else a bootstrap over problems, from a fixed seed.

    Samples of a problem are not independent, so problems are resampled. reward and cell_accuracy are always resampled.
    """
    if name not in ("reward", "cell_accuracy") and all(
        value in (0.0, weight) for value, weight in zip(values, weights, strict=True)
    ):
        return wilson(sum(value > 0 for value in values), len(values))
    return bootstrap_mean(values, np.random.default_rng(0), weights=weights)
