"""Interface of a task: text in, numbers out. Tasks never import torch."""

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
    """One problem: the text that the model reads, and the data that a grader needs.

    A task returns one for each index.

    Attributes:
        prompt: Text, or chat messages with role and content that the tokenizer renders.
        fields: Data for the grader, as JSON; stored with completions.
        solution: A correct completion, for supervised warm-up. None (default): no solution is available.
        blank: For infilling, the piece of text that marks one token to fill in, at each place in the prompt; the grader
            receives the filled text. None (default): no infilling.
    """

    prompt: str | list[dict[str, str]]  # text, or chat messages with role and content that the tokenizer renders
    fields: Mapping[str, Any] = field(default_factory=dict)  # the grader's facts, as JSON, stored with completions
    solution: str | None = None  # a correct completion, for supervised warm-up
    blank: str | None = None  # infilling: each such piece of the prompt is one token; the grader gets the filled text


@dataclass(frozen=True)
class Reward:
    """The grade of a completion.

    A task's `reward` returns it.

    Attributes:
        value: Number that training maximizes.
        parsed: Whether the grader could read an answer; reported separately from the value.
        breakdown: Further numbers by name, averaged over completions; ratios of counts are listed in COUNTED.
        answer: Vote of maj@k: one spelling for equal answers, "" if not parsed. None (default): unknown.
    """

    value: float  # the number that training maximises
    parsed: bool  # whether the grader found an answer at all; reported separately from the value
    breakdown: Mapping[str, float] = field(default_factory=dict)  # averaged over completions; ratios: see COUNTED
    answer: str | None = None  # a vote of maj@k: one spelling of equal answers, "" if not parsed; None: not known


@dataclass(frozen=True)
class Cost:
    """The sampling cost of a completion. A grader with a parameter named in SPEED receives it.

    Args:
        forwards: Model calls that the completion's row took part in, up to its last write. Steps of other rows of the
            batch, and extra calls of a cache, do not count.
        tokens: Tokens written, up to the end token.
    """

    forwards: int
    tokens: int

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards if self.forwards else 0.0


SPEED = ("forwards", "tokens_per_forward")


def asked(function: Callable) -> list[str]:
    """Return the names of SPEED that the function has as parameters; `**kwargs` requests none."""
    return [name for name in SPEED if name in inspect.signature(function).parameters]


@runtime_checkable
class Task(Protocol):
    """A sized, indexable collection of problems with a grader.

    Implement it for problems that no other task covers; use `task_from_dataset` for rows with reward functions.
    `version` changes whenever a grade may change. Optional members: rewards(problems, completions) grades many
    completions together; reward_weights maps breakdown names to weights. Both graders may request SPEED:
    reward(problem, completion, forwards), rewards(problems, completions, forwards) with a list.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...

    def reward(self, problem: Problem, completion: str) -> Reward: ...


def check_filled(field: str, task: Task) -> None:
    """Raise ValueError if the task has no problems, such as an empty file or an empty split."""
    if not len(task):
        path = getattr(task, "path", None)
        where = "" if path is None else f" in {str(path)!r}"
        raise ValueError(f"{field}: {task.name!r} has no problems{where}; give a file with more rows, or another split")


Grader = Callable[[Mapping[str, Any], str], Reward]  # (a problem's fields, a completion) -> grade

# Ratios of counts: the mean over a set is the sum of the first count divided by the sum of the second.
COUNTED = {"cell_accuracy": ("correct_cells", "empty_cells")}


def addends(reward: Reward) -> dict[str, tuple[float, float]]:
    """Return the terms that a completion adds to numerator and denominator of each mean: (number, 1), or the counts of
    COUNTED.
    """
    added = {"reward": (reward.value, 1.0), "parsed": (float(reward.parsed), 1.0)}
    added |= {name: (number, 1.0) for name, number in reward.breakdown.items()}
    for name, counts in COUNTED.items():
        if name in added and all(count in added for count in counts):
            (above, _), (below, _) = map(
                added.pop, counts
            )  # the mean of a count is not shown: it has no meaning without the other count
            added[name] = above, below
    return added


def parts(reward: Reward) -> dict[str, float]:
    """Return `parsed` and the breakdown of one completion as its means show them, without ratios over nothing."""
    shown = {}
    for name, (above, below) in addends(reward).items():
        if below and name != "reward":
            shown[name] = float(above) / float(below)
    return shown


def grade(
    task: Task,
    problems: Sequence[Problem],
    completions: Sequence[str],
    costs: Sequence[Cost] | None = None,
    *,
    timeout: float | None = None,
) -> list[Reward]:
    """Grade completions, G consecutive completions per problem, together if the task can.

    Args:
        task: Task with the grader.
        problems: P problems.
        completions: P*G completions.
        costs: One per completion, for graders that request SPEED. None (default): unknown.
        timeout: Time limit of a grader call, in seconds; see `deadline`. None (default): no limit.

    Returns:
        One reward per completion.

    Raises:
        RuntimeError: The grader raises or exits.
        ValueError: The grader does not return a `Reward`, or a number is not finite in fp32.
    """
    group = len(completions) // len(problems)
    grading = _Grading(task, [problems[i // group] for i in range(len(completions))], completions, costs or (), timeout)
    with nullcontext(lambda: None) if timeout is None else deadline(timeout, grading.late) as restart:
        rewards, error = grading.together()
        if rewards is None:  # one by one, also to name the completion that the grader fails on
            rewards = grading.one_by_one(restart)
        if error is not None:
            texts = f"{len(completions)} texts together"
            raise RuntimeError(f"the grader of task {task.name!r} raised on {texts}: {error!r}") from error
        grading.check(rewards)
    return rewards


@dataclass
class _Grading:
    """One call of `grade`. `place` is the index of the current completion, which errors name."""

    task: Task
    problems: Sequence[Problem]  # one per completion
    completions: Sequence[str]
    costs: Sequence[Cost]
    timeout: float | None
    place: int = 0

    def current(self) -> str:
        return f"problem {self.problems[self.place]!r}, completion {self.completions[self.place]!r}"

    def late(self) -> str:
        return (
            f"process {os.environ.get('RANK', 0)}: the grader of task {self.task.name!r} did not return within "
            f"reward_timeout={self.timeout:g} s on {self.current()}; fix it or raise reward_timeout"
        )

    def speed(self, grader: Callable) -> dict[str, list[float]]:
        return {name: [getattr(cost, name) for cost in self.costs] for name in asked(grader)} if self.costs else {}

    def together(self) -> tuple[list[Reward] | None, BaseException | None]:
        """Return the rewards, or the error, or neither if the task grades one by one.

        The error is returned because a second error, raised one by one, would otherwise be shown under the first.
        """
        rewards: Callable[..., Sequence[Reward]] | None = getattr(self.task, "rewards", None)
        if rewards is None:
            return None, None
        try:
            return list(rewards(self.problems, self.completions, **self.speed(rewards))), None
        except (Exception, SystemExit) as error:
            return None, error

    def one_by_one(self, restart: Callable[[], None]) -> list[Reward]:
        speed = self.speed(self.task.reward)
        rewards = []
        for place, (problem, completion) in enumerate(zip(self.problems, self.completions, strict=True)):
            self.place = place
            restart()
            try:
                cost = {name: values[place] for name, values in speed.items()}
                rewards.append(self.task.reward(problem, completion, **cost))
            except (Exception, SystemExit) as error:  # a grader that exits must not look like a successful run
                raise RuntimeError(
                    f"the grader of task {self.task.name!r} raised on {self.current()}: {error!r}"
                ) from error
        return rewards

    def check(self, rewards: Sequence[Reward]) -> None:
        for place, reward in enumerate(rewards):
            self.place = place
            if fault := fault_of(reward):
                raise ValueError(f"the grader of task {self.task.name!r} returned {fault} on {self.current()}")


def fault_of(reward: Any) -> str | None:
    """Describe the fault of a reward, or return None: all of its numbers must be finite in fp32."""
    if not isinstance(reward, Reward):
        return f"{reward!r}, which is no Reward(value, parsed, breakdown)"
    if not isinstance(reward.breakdown, Mapping):
        return f"breakdown={reward.breakdown!r}, which is no mapping of names to numbers"
    for name, value in {"value": reward.value, "parsed": reward.parsed, **reward.breakdown}.items():
        try:  # numbers of Python, NumPy and torch (of one element), and truth values
            number = None if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, RuntimeError):
            number = None
        if number is None:
            return f"{name}={value!r}, which is no number; give a float"
        if not abs(number) <= FLOAT32_MAX:
            return f"{name}={value!r}, which is not a finite number of fp32; scale it, or leave it out of the breakdown"
    return None
