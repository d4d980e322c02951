"""The tasks by name, and how each is graded under the protocols of the papers. No text is ever evaluated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dllm_rl.tasks.base import Problem, Reward, Task
from dllm_rl.tasks.countdown.graders import countdown_d1, countdown_strict
from dllm_rl.tasks.countdown.task import Countdown
from dllm_rl.tasks.math import verify as math_check
from dllm_rl.tasks.math.graders import (
    gsm8k_d1,
    gsm8k_espo,
    gsm8k_spg,
    gsm8k_strict,
    math500_d1,
    math500_math_verify,
    math500_strict,
)
from dllm_rl.tasks.math.gsm8k import GSM8K
from dllm_rl.tasks.math.math500 import MATH500
from dllm_rl.tasks.sorting import Mini
from dllm_rl.tasks.sudoku.graders import sudoku_d1, sudoku_strict
from dllm_rl.tasks.sudoku.task import Sudoku

Grader = Callable[[Mapping[str, Any], str], Reward]

# SPG grades Sudoku, Countdown and MATH500 as d1 does; ESPO grades Sudoku and Countdown as d1 does, mathematics by
# binary rewards of its own. Their other differences are of prompt, split and training.
PROTOCOLS: dict[str, dict[str, Grader]] = {
    "sudoku": {"strict": sudoku_strict, "d1": sudoku_d1, "spg": sudoku_d1, "espo": sudoku_d1},
    "countdown": {"strict": countdown_strict, "d1": countdown_d1, "spg": countdown_d1, "espo": countdown_d1},
    "gsm8k": {"strict": gsm8k_strict, "d1": gsm8k_d1, "spg": gsm8k_spg, "espo": gsm8k_espo},
    "math500": {
        "strict": math500_strict,
        "d1": math500_d1,
        "spg": math500_d1,
        "espo": math500_math_verify,
        "math-verify": math500_math_verify,
    },
}
VERSIONS = {task.name: task.version for task in (Sudoku, Countdown, GSM8K, MATH500)}


@dataclass(frozen=True)
class UnderProtocol:
    """A task whose problems are the given task's and whose reward is a protocol's; made by under_protocol."""

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
        return PROTOCOLS[self.name][self.protocol](problem.fields, completion)


def under_protocol(task: Task, protocol: str) -> UnderProtocol:
    """The task as a protocol grades it. Errors: ValueError for a protocol that the task does not have."""
    find_grader(task.name, protocol)
    return UnderProtocol(task, protocol)


def find_grader(task: str, protocol: str) -> Grader:
    if task not in PROTOCOLS:
        raise ValueError(f"task={task!r} has no protocols; those that have: {', '.join(PROTOCOLS)}")
    if protocol not in PROTOCOLS[task]:
        raise ValueError(f"protocol={protocol!r} is none of {task}'s: {', '.join(PROTOCOLS[task])}")
    if PROTOCOLS[task][protocol] is math500_math_verify:
        math_check.require()
    return PROTOCOLS[task][protocol]


TASKS = {task.name: task for task in (Sudoku, Countdown, GSM8K, MATH500, Mini)}
