"""What a task is: text in, numbers out. Nothing here, nor in any task, imports torch."""

from collections.abc import Mapping
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

    name: str
    version: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...

    def reward(self, problem: Problem, completion: str) -> Reward: ...
