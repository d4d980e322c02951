"""Interface of a task: problems, and a grader that maps text to numbers. Tasks never import torch."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from dllm_rl.tasks.deadline import deadline

FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class Problem:
    """One problem: the text that the model reads, and the data that a grader needs. `task[index]` returns it.

    Attributes:
        prompt: Text, or chat messages with role and content that the tokenizer renders.
        fields: JSON-serializable data for the grader. It is stored with the completions.
        solution: A correct completion, for supervised warm-up. None (default): no solution is available.
        blank: For infilling: a placeholder text. Each occurrence in the prompt is one token to fill in; the
            grader receives the filled text. None (default): no infilling.
    """

    prompt: str | list[dict[str, str]]
    fields: Mapping[str, Any] = field(default_factory=dict)
    solution: str | None = None
    blank: str | None = None


def shown_prompt(problem: Problem) -> str:
    """Return the prompt's text; of a chat, the text of the last message that is not the assistant's."""
    if isinstance(problem.prompt, str):
        return problem.prompt
    # The last message may be the beginning of the answer. Content may be a list of parts, such as text and images.
    content: Any = next((turn["content"] for turn in reversed(problem.prompt) if turn["role"] != "assistant"), "")
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content or ())


@dataclass(frozen=True)
class Reward:
    """The grade of a completion, which a task's `reward` returns.

    Attributes:
        value: Number that training maximizes. None: the completion has no reward; it is skipped, as if it had not been
            sampled: its advantage is 0, and no mean counts it.
        parsed: Whether the grader could read an answer; reported separately from the value.
        breakdown: Further metrics by name, averaged over completions; RATIO_METRICS lists those that are ratios of
            counts.
        answer: Normalized answer for majority voting (maj@k): equal answers have the same spelling; "" if not parsed.
            None (default): the task has no maj@k.
    """

    value: float | None
    parsed: bool
    breakdown: Mapping[str, float] = field(default_factory=dict)
    answer: str | None = None


@dataclass(frozen=True)
class Cost:
    """The sampling cost of a completion. A grader that has a parameter `forwards` or `tokens_per_forward` receives the
    attribute of that name.

    Args:
        forwards: Model calls for this completion up to its last written token. Steps that only other rows of the batch
            took, and extra calls of a cache, are not counted.
        tokens: Tokens written, up to the end token.
    """

    forwards: int
    tokens: int

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per forward, 0 without forwards."""
        return self.tokens / self.forwards if self.forwards else 0.0


COST_ARGUMENTS = ("forwards", "tokens_per_forward")  # parameters with which a grader requests sampling costs


def requested_costs(function: Callable) -> list[str]:
    """Return which COST_ARGUMENTS a function has as parameters; `**kwargs` does not request any."""
    return [name for name in COST_ARGUMENTS if name in inspect.signature(function).parameters]


@runtime_checkable
class Task(Protocol):
    """A sized, indexable collection of problems with a grader.

    Implement it for problems that no other task covers; use `task_from_dataset` for rows with reward functions. Change
    `version` whenever a grade may change.

    Optional members: rewards(problems, completions) grades many completions together; reward_weights maps names in the
    breakdown to weights. A grader may request COST_ARGUMENTS, as in reward(problem, completion, forwards), or
    rewards(problems, completions, forwards) with a list.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...

    def reward(self, problem: Problem, completion: str) -> Reward: ...


def check_not_empty(setting: str, task: Task) -> None:
    """Raise ValueError, which names the `setting`, if the task has no problems, for example in an empty file."""
    if not len(task):
        path = getattr(task, "path", None)
        location = "" if path is None else f" in {str(path)!r}"
        raise ValueError(
            f"{setting}: {task.name!r} has no problems{location}; give a file with more rows, or another split"
        )


Grader = Callable[[Mapping[str, Any], str], Reward]  # (a problem's fields, a completion) -> grade

# Metrics that are ratios of two counts: their mean is the sum of the first count divided by the sum of the second.
RATIO_METRICS = {"cell_accuracy": ("correct_cells", "empty_cells")}


def metric_fractions(reward: Reward) -> dict[str, tuple[float, float]]:
    """Return what a completion adds to numerator and denominator of each metric's mean: the reward, `parsed` and
    `component_fractions`. A component named `reward` or `parsed` is `reward_part` or `parsed_part` here; an only
    component named `reward` is left out, as it repeats the reward. A completion without a reward adds nothing.
    """
    if reward.value is None:
        return {"reward": (0.0, 0.0), "parsed": (0.0, 0.0)}
    fractions = {"reward": (reward.value, 1.0), "parsed": (float(reward.parsed), 1.0)}
    components = component_fractions(reward)
    if components.keys() == {"reward"}:
        return fractions
    return fractions | {f"{name}_part" if name in fractions else name: components[name] for name in components}


def component_fractions(reward: Reward) -> dict[str, tuple[float, float]]:
    """Return numerator and denominator of each metric of the breakdown: (value, 1), or the two counts of
    RATIO_METRICS.
    """
    fractions = {name: (value, 1.0) for name, value in reward.breakdown.items()}
    for name, counts in RATIO_METRICS.items():
        if name in fractions and all(count in fractions for count in counts):
            # The mean of a single count is not shown: it has no meaning without the other count.
            numerator, _ = fractions.pop(counts[0])
            denominator, _ = fractions.pop(counts[1])
            fractions[name] = numerator, denominator
    return fractions


def completion_metrics(reward: Reward) -> dict[str, float]:
    """Return the metrics of one completion: `parsed` and the breakdown, without ratios whose denominator is 0."""
    metrics = {}
    for name, (numerator, denominator) in metric_fractions(reward).items():
        if denominator and name != "reward":
            metrics[name] = float(numerator) / float(denominator)
    return metrics


def grade(
    task: Task,
    problems: Sequence[Problem],
    completions: Sequence[str],
    costs: Sequence[Cost] | None = None,
    *,
    timeout: float | None = None,
) -> list[Reward]:
    """Grade completions.

    If the task has a method `rewards`, all completions are graded in one call.

    Args:
        task: Task with the grader.
        problems: The problem of each completion.
        completions: The completions, as text.
        costs: One per completion, for graders that request COST_ARGUMENTS. None (default): unknown.
        timeout: Seconds that a call of the grader may take; after that `deadline` ends this process.
            None (default): no limit.

    Returns:
        One reward per completion.

    Raises:
        RuntimeError: The grader raises or exits.
        ValueError: The grader does not return a `Reward`, a number is not finite in fp32, or the numbers of problems
            and completions differ.
    """
    if len(problems) != len(completions):
        raise ValueError(f"{len(problems)} problems for {len(completions)} completions: give the problem of each")
    call = _GradeCall(task, problems, completions, costs or (), timeout)
    with nullcontext(lambda: None) if timeout is None else deadline(timeout, call.timeout_message) as restart:
        rewards, error = call.grade_together()
        if rewards is None:  # no batch grader, or it failed: grade one by one, to name the completion that fails
            rewards = call.grade_one_by_one(restart, error)
        if error is not None:
            count = f"{len(completions)} completions in one call"
            raise RuntimeError(f"the grader of task {task.name!r} raised on {count}: {error!r}") from error
        call.check(rewards)
    return rewards


@dataclass
class _GradeCall:
    """One call of `grade`. `index` is the completion that is being graded, which an error message quotes; while all are
    graded together it is 0.
    """

    task: Task
    problems: Sequence[Problem]  # one per completion
    completions: Sequence[str]
    costs: Sequence[Cost]
    timeout: float | None
    index: int = 0

    def describe_current(self) -> str:
        return f"problem {self.problems[self.index]!r}, completion {self.completions[self.index]!r}"

    def timeout_message(self) -> str:
        """Return what the process prints when the grader exceeds the time limit."""
        return (
            f"process {os.environ.get('RANK', 0)}: the grader of task {self.task.name!r} did not return within "
            f"reward_timeout={self.timeout:g} s on {self.describe_current()}; fix it or raise reward_timeout"
        )

    def cost_arguments(self, grader: Callable) -> dict[str, list[int | float]]:
        """Return the costs that the grader requests, by parameter; {} if costs are unknown."""
        if not self.costs:
            return {}
        return {name: [getattr(cost, name) for cost in self.costs] for name in requested_costs(grader)}

    def grade_together(self) -> tuple[list[Reward] | None, BaseException | None]:
        """Return (rewards, None), or (None, error), or (None, None) if the task has no `rewards`.

        The error is returned, not raised, so that an error of `grade_one_by_one` is not chained to it.
        """
        rewards: Callable[..., Sequence[Reward]] | None = getattr(self.task, "rewards", None)
        if rewards is None:
            return None, None
        try:
            return list(rewards(self.problems, self.completions, **self.cost_arguments(rewards))), None
        except (Exception, SystemExit) as error:
            return None, error

    def grade_one_by_one(self, restart: Callable[[], None], error_together: BaseException | None) -> list[Reward]:
        """Grade each completion by a separate call. `restart` begins a new time limit; `error_together` is that of
        `grade_together`.
        """
        costs = self.cost_arguments(self.task.reward)
        rewards = []
        for index, (problem, completion) in enumerate(zip(self.problems, self.completions, strict=True)):
            self.index = index
            restart()
            try:
                arguments = {name: values[index] for name, values in costs.items()}
                rewards.append(self.task.reward(problem, completion, **arguments))
            except (Exception, SystemExit) as error:  # a grader that exits must not look like a successful run
                message = f"the grader of task {self.task.name!r} raised on {self.describe_current()}: {error!r}"
                if error_together is not None and repr(error_together) != repr(error):
                    message += f"; on all {len(self.completions)} completions in one call: {error_together!r}"
                raise RuntimeError(message) from error
        return rewards

    def check(self, rewards: Sequence[Reward]) -> None:
        """Raise ValueError if a reward is invalid."""
        for index, reward in enumerate(rewards):
            self.index = index
            if reason := invalid_reason(reward):
                raise ValueError(
                    f"the grader of task {self.task.name!r} returned {reason} on {self.describe_current()}"
                )


def invalid_reason(reward: Any) -> str | None:
    """Return why a reward is invalid, or None. All of its numbers must be finite in fp32."""
    if not isinstance(reward, Reward):
        return f"{reward!r}, which is not a Reward(value, parsed, breakdown)"
    if not isinstance(reward.breakdown, Mapping):
        return f"breakdown={reward.breakdown!r}, which is not a mapping of names to numbers"
    # Not one dict: a metric of the breakdown may have the name `value` or `parsed`.
    numbers: list[tuple[str, Any]] = [("parsed", reward.parsed), *reward.breakdown.items()]
    if reward.value is not None:
        numbers.append(("value", reward.value))
    for name, value in numbers:
        try:  # numbers of Python, NumPy and torch (one element), and booleans
            number = None if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, RuntimeError):
            number = None
        if number is None:
            return f"{name}={value!r}, which is not a number; give a float"
        if not abs(number) <= FLOAT32_MAX:
            return f"{name}={value!r}, which is not a finite number of fp32; scale it, or leave it out of the breakdown"
    return None
