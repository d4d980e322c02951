"""The results of an evaluation as numbers. No torch."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from operator import itemgetter
from typing import Any

import numpy as np

from dllm_rl.evaluation.intervals import bootstrap_difference, bootstrap_mean, majority_at_k, pass_at_k, wilson
from dllm_rl.tasks.base import Reward, addends

RATES = ("parsed", "accuracy", "solve_rate", "undecided", "cell_accuracy")  # shown if a grader has it
Sums = dict[int, tuple[float, float]]  # problem -> a metric's sum over its completions, and the sum's divisor


@dataclass(frozen=True)
class Graded:
    problem: int
    sample: int
    reward: Reward
    tokens: int = 0  # before the end token; here and below, 0: unknown
    forwards: float = 0.0  # its share of the batch's cost
    seconds: float = 0.0  # its share of the batch's cost
    steps: int = 0  # forwards that its row took part in, whatever the batch


@dataclass(frozen=True)
class Evaluation:
    """Every graded completion, by problem and sample, and the facts that the result depends on."""

    answers: tuple[Graded, ...]
    facts: Mapping[str, Any]

    @cached_property
    def sums(self) -> dict[str, Sums]:
        return sums_by_name(self.answers)

    @cached_property
    def means(self) -> dict[str, float]:
        """Return means over all completions: reward, parsed, and every name of the rewards' breakdown."""
        return {name: mean(*columns(sums)) for name, sums in self.sums.items()}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Return facts, number of problems, samples per problem, every mean and pass@k with its interval, and costs, as
        plain JSON.
        """
        problems = len(self.sums["reward"])
        samples = len(self.answers) // problems
        found = dict(self.sums)
        right = headline(self.means)
        if samples > 1:
            rewards: defaultdict[int, set[float]] = defaultdict(set)
            for answer in self.answers:
                rewards[answer.problem].add(answer.reward.value)
            equal = {problem: (float(len(values) == 1), 1.0) for problem, values in rewards.items()}
            found["frac_reward_zero_std"] = equal  # share of problems, like a run's metric of this name
        if samples > 1 and right != "reward":  # a reward does not count right samples
            for k in (*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples):
                found[f"pass@{k}"] = {}
                for problem, (count, _) in self.sums[right].items():
                    found[f"pass@{k}"][problem] = pass_at_k(samples, round(count), k), 1.0
        costs = [(answer.tokens, answer.forwards, answer.seconds, answer.steps) for answer in self.answers]
        tokens, forwards, seconds, steps = map(sum, zip(*costs, strict=True))
        cost = {"forwards_per_answer": steps / len(costs), "tokens_per_forward": tokens / steps if steps else 0.0}
        cost |= {"tokens": tokens, "forwards": round(forwards), "seconds": round(seconds, 3)}
        return {**self.facts, "n": problems, "samples": samples, **with_intervals(found), **cost}

    def majority(self, ks: Sequence[int]) -> dict[str, Any]:
        """Return maj@k by `majority_at_k`, with its interval.

        Raises:
            ValueError: The grader returns no answers, or there are fewer than k samples.
        """
        right = headline(self.means)
        wrong: defaultdict[int, Counter[str]] = defaultdict(Counter)
        for answer in self.answers if ks else ():
            if answer.reward.answer is None or right == "reward":
                raise ValueError("maj@k needs a grader that gives the answers that it compares, and an accuracy")
            if answer.reward.answer and not answer.reward.breakdown[right]:
                wrong[answer.problem][answer.reward.answer] += 1
        samples = len(self.answers) // len(self.sums["reward"])
        found: dict[str, Sums] = {f"maj@{k}": {} for k in ks}
        for k, (problem, (count, _)) in product(ks, self.sums[right].items()):
            votes = list(wrong[problem].values())
            found[f"maj@{k}"][problem] = majority_at_k(samples, round(count), votes, k), 1.0
        return with_intervals(found)


def sums_by_name(answers: Sequence[Graded]) -> dict[str, Sums]:
    """Return the `Sums` of each metric by name. The divisor of a mean counts completions; `addends` gives the divisor
    of a ratio.
    """
    found: dict[str, Sums] = {}
    for answer in answers:
        for name, (value, weight) in addends(answer.reward).items():
            sums = found.setdefault(name, {})
            if weight:  # a puzzle without empty cells has no share of empty cells
                before = sums.get(answer.problem, (0.0, 0.0))
                sums[answer.problem] = before[0] + value, before[1] + weight
    return dict(sorted(found.items()))


def columns(sums: Sums) -> Any:
    """Return the problems' sums and their divisors; a metric that no problem has is 0."""
    return zip(*(sums.values() or [(0.0, 1.0)]), strict=True)


def headline(names: Collection[str]) -> str:
    """Return the main metric of a task: accuracy or solve_rate if it is in `names`, else reward."""
    for name in ("accuracy", "solve_rate"):
        if name in names:
            return name
    return "reward"


def best_of(looked_at: Sequence[tuple[float, str]], metric: str) -> str:
    """Return a line with the highest (value, label), the number of values, and the last one, which is not selected."""
    best, where = max(looked_at, key=itemgetter(0))
    last, end = looked_at[-1]
    of = f"the highest of {len(looked_at)}, which flatters it"
    return f"best {metric}: {best:.3f} ({where}), {of}; the last: {last:.3f} ({end})"


def paired_differences(found: Evaluation, before: Evaluation) -> dict[str, list[float]]:
    """Return each mean less the mean of another evaluation: [difference, low, high], with a 95 % interval, over the
    problems that both have.
    """
    differences = {}
    for name, now in found.sums.items():
        then = before.sums.get(name, {})
        both = sorted(now.keys() & then.keys())  # sorted, since the draws depend on the order
        if both:
            values, weights = zip(*map(now.__getitem__, both), strict=True)
            earlier, shares = zip(*map(then.__getitem__, both), strict=True)
            drawn = np.random.default_rng(0)
            low, high = bootstrap_difference(values, earlier, drawn, weights=weights, weights_before=shares)
            differences[name] = [mean(values, weights) - mean(earlier, shares), low, high]
    return differences


def mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(values) / sum(weights)


def with_intervals(found: Mapping[str, Sums]) -> dict[str, Any]:
    """Return NAME, its mean, and NAME_interval, [low, high], for each name."""
    shown: dict[str, Any] = {}
    for name, sums in found.items():
        values, weights = columns(sums)
        shown[name] = mean(values, weights)
        shown[f"{name}_interval"] = list(interval(name, values, weights))
    return shown


def interval(name: str, values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % interval: Wilson's if every problem gives 0 or 1, else a bootstrap over problems, of fixed seed."""
    # Samples of a problem are not independent, so problems are resampled. Cells of a puzzle are not trials, even if all
    # are right, and neither is a reward.
    numbers = np.asarray(values)
    trials = ((numbers == 0) | (numbers == np.asarray(weights))).all()
    if trials and name not in ("reward", "cell_accuracy"):
        return wilson(int((numbers > 0).sum()), len(numbers))
    return bootstrap_mean(values, np.random.default_rng(0), weights=weights)
