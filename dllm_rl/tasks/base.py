"""What a task is: text in, numbers out. Nothing here, nor in any task, imports torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Problem:
    """One problem: what the model reads, and what a grader needs to know.

    prompt    text, or chat messages [{"role": ..., "content": ...}] that the policy's tokenizer renders.
    fields    JSON-serialisable facts for the grader (a puzzle, a target ...); they travel with stored completions.
    solution  a correct completion, for supervised warm-up; None where there is none.
    """

    prompt: str | list[dict[str, str]]
    fields: Mapping[str, Any] = field(default_factory=dict)
    solution: str | None = None


@dataclass(frozen=True)
class Reward:
    """A graded completion.

    value      the number that training maximises.
    parsed     whether an answer was found at all; False is counted and shown, never hidden in the value.
    breakdown  further numbers, each averaged over completions under its own name ("solve_rate", "accuracy" ...);
               "cell_accuracy" comes with the counts that it is a ratio of, and is averaged as COUNTED says.
    """

    value: float
    parsed: bool
    breakdown: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """A sized, indexable collection of problems with a grader. `version` changes whenever a grade could.

    A task may also have rewards(problems, completions), which grades many at once as reward would one by one.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...

    def reward(self, problem: Problem, completion: str) -> Reward: ...


Grader = Callable[[Mapping[str, Any], str], Reward]  # (a problem's fields, a completion) -> its grade

# Ratios of counts: their mean over a set is the sum of one count over the sum of the other.
COUNTED = {"cell_accuracy": ("correct_cells", "empty_cells")}


def addends(reward: Reward) -> dict[str, tuple[float, float]]:
    """What a graded completion adds to the numerator and the denominator of each mean over a set, by name.

    "reward", "parsed" and each name of the breakdown add (number, 1). A ratio of COUNTED whose counts are in the
    breakdown adds the counts, which have no mean of their own: cell_accuracy of a set is all correct cells over all
    empty ones.
    """
    added = {"reward": (reward.value, 1.0), "parsed": (float(reward.parsed), 1.0)}
    added |= {name: (number, 1.0) for name, number in reward.breakdown.items()}
    for name, counts in COUNTED.items():
        if name in added and all(count in added for count in counts):
            (above, _), (below, _) = (added.pop(count) for count in counts)
            added[name] = above, below
    return added


def grade(task: Task, problems: Sequence[Problem], completions: Sequence[str]) -> list[Reward]:
    """Grade completions, G in a row for each problem, at once where the task can.

    A grader that raises stops the run, with what it was given: RuntimeError.
    """
    group, graded = len(completions) // len(problems), []
    own = [problems[i // group] for i in range(len(completions))]
    many, failed = getattr(task, "rewards", None), None
    if many is not None:
        try:
            return list(many(own, completions))
        except Exception as error:
            failed = error  # one by one, the grader says on what
    for problem, completion in zip(own, completions, strict=True):
        try:
            graded.append(task.reward(problem, completion))
        except Exception as error:
            raise RuntimeError(
                f"the grader of task {task.name!r} raised on problem {problem!r}, completion {completion!r}"
            ) from error
    if failed is not None:
        raise RuntimeError(f"the grader of task {task.name!r} raised on {len(own)} texts, on none alone") from failed
    return graded
