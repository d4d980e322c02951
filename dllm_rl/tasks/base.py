"""What a task is: text in, numbers out. Nothing here, nor in any task, imports torch."""

from collections.abc import Mapping, Sequence
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
    breakdown  further numbers, each averaged over problems under its own name ("solve_rate", "cell_accuracy" ...).
    """

    value: float
    parsed: bool
    breakdown: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """A sized, indexable collection of problems with a grader. `version` changes whenever a grade could."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...

    def reward(self, problem: Problem, completion: str) -> Reward: ...


def grade(task: Task, problems: Sequence[Problem], completions: Sequence[str]) -> list[Reward]:
    """Grade completions, G in a row for each problem. A grader that raises stops the run, with what it was given."""
    group, graded = len(completions) // len(problems), []
    for i, completion in enumerate(completions):
        problem = problems[i // group]
        try:
            graded.append(task.reward(problem, completion))
        except Exception as error:
            raise RuntimeError(
                f"the grader of task {task.name!r} raised on problem {problem!r}, completion {completion!r}"
            ) from error
    return graded
