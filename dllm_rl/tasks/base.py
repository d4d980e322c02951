"""What a task is: text in, numbers out. Nothing here, nor in any task, imports torch."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from dllm_rl.tasks.deadline import deadline, unlimited

FLOAT32_MAX = 3.4028234663852886e38


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


def grade(
    task: Task, problems: Sequence[Problem], completions: Sequence[str], *, timeout: float | None = None
) -> list[Reward]:
    """Grade completions, G in a row for each problem.

    timeout  seconds for one completion; see `deadline` for what happens then. None: no limit.

    A grader that raises, or that would end the process, stops the run with what it was given, as RuntimeError; one that
    returns no reward, or a number that training could not hold, does as ValueError.
    """
    group, graded, place = len(completions) // len(problems), [], 0

    def given() -> str:
        return f"problem {problems[place // group]!r}, completion {completions[place]!r}"

    def late() -> str:
        return (
            f"process {os.environ.get('RANK', 0)}: the grader of task {task.name!r} did not return within "
            f"reward_timeout={timeout:g} s on {given()}; mend it or raise reward_timeout"
        )

    with unlimited() if timeout is None else deadline(timeout, late) as restart:
        for place, completion in enumerate(completions):
            restart()
            try:
                reward = task.reward(problems[place // group], completion)
            except (Exception, SystemExit) as error:
                raise RuntimeError(f"the grader of task {task.name!r} raised on {given()}: {error!r}") from error
            if fault := fault_of(reward):
                raise ValueError(f"the grader of task {task.name!r} returned {fault} on {given()}")
            graded.append(reward)
    return graded


def fault_of(reward: Any) -> str | None:
    """What is wrong with a reward, if anything: every number of it must be finite, also in fp32, and `value` is one."""
    if not isinstance(reward, Reward):
        return f"{reward!r}, which is no Reward(value, parsed, breakdown)"
    if not isinstance(reward.breakdown, Mapping):
        return f"breakdown={reward.breakdown!r}, which is no mapping of names to numbers"
    for name, value in {"value": reward.value, "parsed": reward.parsed, **reward.breakdown}.items():
        if not _is_number(value):
            return f"{name}={value!r}, which is no number; give a float"
        if not abs(float(value)) <= FLOAT32_MAX:
            return f"{name}={value!r}, which is not a finite number of fp32; scale it, or leave it out of the breakdown"
    return None


def _is_number(value: Any) -> bool:
    """Numbers of Python, NumPy and torch (of one element), and truth values."""
    if isinstance(value, str | bytes):
        return False
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True
