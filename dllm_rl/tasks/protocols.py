"""The tasks by name, and their graders by protocol (the grading rules of a paper)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from dllm_rl.tasks.base import Grader, Problem, Reward, Task
from dllm_rl.tasks.code import task as code
from dllm_rl.tasks.countdown import Countdown
from dllm_rl.tasks.countdown import graders as countdown
from dllm_rl.tasks.countdown.task import PROMPTS
from dllm_rl.tasks.math import GSM8K, MATH500
from dllm_rl.tasks.math import graders as math
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.tasks.sudoku import graders as sudoku


@dataclass(frozen=True)
class Entry:
    """A task's class, its graders by protocol, and what the graders need."""

    task: type[Any]
    graders: Mapping[str, Grader]
    read_fields: Callable[[Mapping[str, Any], str], dict[str, Any]]  # (stored row, protocol) -> fields, or ValueError
    # By protocol: a function that raises ImportError if a package that the grader needs is not installed.
    require: Mapping[str, Callable[[], None]] = field(default_factory=dict)
    # By protocol: a function (fields, completions) -> None that computes the slow part of many grades in parallel, and
    # caches it for the grader.
    prepare: Mapping[str, Callable[[Sequence[Mapping[str, Any]], Sequence[str]], None]] = field(default_factory=dict)
    # By protocol: the prompt that replaces the built-in one, whose answers the grader would not find.
    prompts: Mapping[str, str] = field(default_factory=dict)


# SPG grades Sudoku, Countdown and MATH500 as d1 does; ESPO grades Sudoku and Countdown as d1 does.
TABLE = {
    "sudoku": Entry(Sudoku, sudoku.GRADERS, sudoku.read_fields),
    "countdown": Entry(Countdown, countdown.GRADERS, countdown.read_fields, prompts=PROMPTS),
    "gsm8k": Entry(GSM8K, math.GSM8K_GRADERS, math.read_gsm8k),
    "math500": Entry(MATH500, math.MATH500_GRADERS, math.read_math500, math.MATH500_REQUIRE, math.MATH500_PREPARE),
    "code": Entry(code.Code, code.GRADERS, code.read_fields, code.REQUIRE, code.PREPARE),
}
TASKS = {name: entry.task for name, entry in TABLE.items()}
PROTOCOLS = {name: entry.graders for name, entry in TABLE.items()}
SOURCES = {"strict": "dllm_rl", "d1": "arXiv 2504.12216", "spg": "arXiv 2510.09541", "espo": "arXiv 2512.03759"}
SOURCES |= {"dream": "arXiv 2508.15487", "math-verify": "huggingface/Math-Verify", "sandbox": "dllm_rl"}


@dataclass(frozen=True)
class UnderProtocol:
    """The problems of a task with the reward of a protocol. Made by `under_protocol`."""

    task: Task
    protocol: str

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def version(self) -> str:
        return self.task.version

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> Problem:
        return self.task[index]

    def reward(self, problem: Problem, completion: str) -> Reward:
        opened = TABLE[self.name].task.opened_layout(problem.prompt)
        return PROTOCOLS[self.name][self.protocol](problem.fields, opened + completion)

    def rewards(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Reward]:
        fields = [problem.fields for problem in problems]
        return grade_all(self.name, self.protocol, fields, completions, [problem.prompt for problem in problems])


def under_protocol(task: Task, protocol: str) -> UnderProtocol:
    """Return the task, graded by a protocol. prompt_format="text" then asks for the form that the protocol reads.

    Raises the errors of find_grader, and ValueError if the problems do not fit the protocol.
    """
    find_grader(task.name, protocol)
    is_stored = getattr(task, "path", None) is not None
    for index in range(len(task) if is_stored else min(1, len(task))):  # all generated problems have the same fields
        try:
            TABLE[task.name].read_fields(task[index].fields, protocol)
        except ValueError as error:
            raise ValueError(f"problem {index} of {task.name} does not fit protocol={protocol!r}: {error}") from None
    prompts = TABLE[task.name].prompts
    if protocol in prompts and getattr(task, "prompt_format", None) == "text":
        task = replace(cast("Any", task), prompt_format=prompts[protocol])
    return UnderProtocol(task, protocol)


def find_grader(task: str, protocol: str) -> Grader:
    """Return the grader. Raises ValueError for an unknown protocol, ImportError if its package is not installed."""
    if task not in PROTOCOLS:
        raise ValueError(f"task={task!r} has no protocols; those that have: {', '.join(PROTOCOLS)}")
    if protocol not in PROTOCOLS[task]:
        raise ValueError(f"protocol={protocol!r} is not one of {task}'s: {', '.join(PROTOCOLS[task])}")
    if protocol in TABLE[task].require:
        TABLE[task].require[protocol]()  # raise ImportError now, before any grading
    return PROTOCOLS[task][protocol]


def grade_all(
    task: str,
    protocol: str,
    fields: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    prompts: Sequence[object],
) -> list[Reward]:
    """Grade completions by a protocol, each after what its prompt opens (see `Prompted.opened_layout`). Raises the
    errors of find_grader.
    """
    grader = find_grader(task, protocol)
    opened = TABLE[task].task.opened_layout
    completions = [opened(prompt) + completion for prompt, completion in zip(prompts, completions, strict=True)]
    if protocol in TABLE[task].prepare:
        TABLE[task].prepare[protocol](fields, completions)
    return [grader(*pair) for pair in zip(fields, completions, strict=True)]


def protocol_names() -> list[str]:
    """Return every protocol once, in the order of the tasks."""
    return list(dict.fromkeys(name for graders in PROTOCOLS.values() for name in graders))
