"""Graders that raise, return what is no reward, or never return: each is named with its problem and completion."""

import faulthandler
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch

from dllm_rl.tasks import base, task_from_dataset
from dllm_rl.tasks.base import (
    GRACE,
    TIMEOUT_STATUS,
    Cost,
    Problem,
    Reward,
    completion_metrics,
    deadline,
    grade,
    metric_fractions,
    shown_prompt,
)


@dataclass(frozen=True)
class Returning:
    """A task whose grader returns, or raises, what it is given."""

    result: Any
    name: str = "odd"
    version: str = "1"

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Problem:
        return Problem("2+2=")

    def reward(self, problem: Problem, completion: str) -> Any:
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def odd(value: Any, parsed: Any = True, breakdown: Any = ()) -> Reward:
    """A Reward of values that its types do not allow, as a user's grader makes it."""
    reward = object.__new__(Reward)
    vars(reward).update(value=value, parsed=parsed, breakdown={} if breakdown == () else breakdown)
    return reward


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, "returned None, which is not a Reward"),
        (1.0, "returned 1.0, which is not a Reward"),
        (odd("1", True), "returned value='1', which is not a number"),
        (odd([1.0], True), r"returned value=\[1.0\], which is not a number"),
        (odd(1e39, True), r"returned value=1e\+39, which is not a finite number of fp32"),
        (odd(-1e39, True), r"returned value=-1e\+39, which is not a finite number of fp32"),
        (odd(float("nan"), True), "returned value=nan, which is not a finite number"),
        (odd(1.0, None), "returned parsed=None, which is not a number"),
        (odd(1.0, True, None), "returned breakdown=None, which is not a mapping"),
        (odd(1.0, True, {"accuracy": float("nan")}), "returned accuracy=nan, which is not a finite number"),
        (odd(1.0, True, {"accuracy": "yes"}), "returned accuracy='yes', which is not a number"),
        (odd(float("nan"), True, {"value": 1.0}), "returned value=nan, which is not a finite number"),
        (odd(1.0, None, {"parsed": 1.0}), "returned parsed=None, which is not a number"),
    ],
)
def test_what_is_no_reward_is_refused_in_one_line(result, said):
    with pytest.raises(RuntimeError, match=rf"grader of task 'odd' {said}.*prompt='2\+2='.*completion '5'") as raised:
        grade(Returning(result), [Problem("2+2=")], ["5"])
    assert "\n" not in str(raised.value)


def test_numbers_of_any_kind_are_rewards():
    for value in (1, True, 3.4e38, -3.4e38):
        assert grade(Returning(odd(value, True, {"a": value})), [Problem("2+2=")], ["5"])[0].value == value


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("bye"), ZeroDivisionError("by zero")])
def test_a_grader_cannot_end_the_run_quietly(error):
    with pytest.raises(RuntimeError, match=r"raised on problem .*2\+2=.*, completion '5': (SystemExit|ZeroDivision)"):
        grade(Returning(error), [Problem("2+2=")], ["5"])


class Quick(Returning):
    def reward(self, problem, completion, forwards):
        return Reward(1 / forwards, True)


class Together(Returning):
    """Asks for both numbers, and grades many at once, unless one of them is worth nothing."""

    def reward(self, problem, completion, *, num_tokens, **others):
        assert not others
        return Reward(num_tokens, True)

    def rewards(self, problems, completions, num_tokens, forwards):
        assert list(forwards) == [2, 4]
        if "bad" in completions:
            raise KeyError("no")
        return [Reward(each, True) for each in num_tokens]


def long(completions, num_tokens):
    return num_tokens


def test_a_grader_is_given_what_it_asks_for():
    costs = [Cost(2, 6), Cost(4, 5)]
    given = (Problem("2+2="),) * 2, ("a", "b"), costs
    assert [reward.value for reward in grade(Quick(None), *given)] == [0.5, 0.25]
    assert [reward.value for reward in grade(Together(None), *given)] == [6, 5]
    assert [reward.value for reward in grade(Returning(Reward(1.0, True)), *given)] == [1.0, 1.0]  # asks for nothing
    with pytest.raises(RuntimeError, match="raised on 2 completions in one call"):  # one by one no text fails
        grade(Together(None), (Problem("2+2="),) * 2, ("a", "bad"), costs)
    with pytest.raises(RuntimeError, match="missing 1 required positional argument: 'forwards'"):
        grade(Quick(None), (Problem("2+2="),), ("a",))
    empty = grade(task_from_dataset([{"prompt": "2="}], reward_funcs=long), (Problem("2="),), ("",), [Cost(0, 0)])
    assert empty[0].value == 0


def test_an_interrupt_passes_through():
    with pytest.raises(KeyboardInterrupt):
        grade(Returning(KeyboardInterrupt()), [Problem("2+2=")], ["5"])


STUCK = """
import re, sys, time
from dllm_rl.tasks import base
from dllm_rl.tasks.base import Problem, Reward, grade

base.GRACE = {grace}

class Task:
    name = "stuck"
    def reward(self, problem, completion):
        if completion == "good":
            return Reward(1.0, True)
        {body}

print("graded", len(grade(Task(), [Problem("p0"), Problem("p1")], ["good", "good"], timeout={timeout})), flush=True)
grade(Task(), [Problem("p0"), Problem("p1")], ["good", "bad"], timeout={timeout})
"""


def run_stuck(body: str, timeout: float = 0.3, grace: float = 600.0) -> subprocess.CompletedProcess:
    """grace: seconds until the last resort. A busy machine may need many for a fraction of a second of CPU time."""
    program = STUCK.format(body=body, timeout=timeout, grace=grace)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize(
    "body",
    ["time.sleep(1e6)", pytest.param("while True: pass", marks=pytest.mark.slow), "re.match('(a+)+$', 'a' * 60 + 'b')"],
    ids=["sleeps", "loops", "regex"],
)
def test_a_reward_that_never_returns_ends_the_process_by_name(body):
    done = run_stuck(body)
    assert done.returncode == TIMEOUT_STATUS and done.stdout == "graded 2\n"
    line = done.stderr.splitlines()[0]
    assert line.startswith(
        "process 0: the grader of task 'stuck' did not return within reward_timeout=0.3 s on problem"
    )
    assert "'p1'" in line and "completion 'bad'" in line and "in reward" in done.stderr


@pytest.mark.slow
def test_c_code_that_cannot_be_interrupted_ends_with_its_stack():
    done = run_stuck("max(__import__('itertools').repeat(1))", grace=1.0)
    assert done.returncode == 1 and "in reward" in done.stderr


def test_graders_in_time_are_left_alone(capfd, monkeypatch):
    handler, cancel, cancelled = signal.getsignal(signal.SIGVTALRM), faulthandler.cancel_dump_traceback_later, []
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: cancelled.append(cancel()))
    assert len(grade(Returning(Reward(0.0, True)), [Problem("p0"), Problem("p1")], ["a", "b"], timeout=600)) == 2
    assert capfd.readouterr().err == "" and len(cancelled) == 1
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0) and signal.getsignal(signal.SIGVTALRM) == handler


def test_what_a_completion_adds_to_a_mean() -> None:
    counts = {"correct_cells": 3.0, "empty_cells": 4.0}
    added = metric_fractions(Reward(2.5, False, {"solve_rate": 0.0, "cell_accuracy": 0.75, **counts}))
    assert added == {"reward": (2.5, 1.0), "parsed": (0.0, 1.0), "solve_rate": (0.0, 1.0), "cell_accuracy": (3.0, 4.0)}
    assert metric_fractions(Reward(0.0, True, {"cell_accuracy": 0.75}))["cell_accuracy"] == (0.75, 1.0)
    assert metric_fractions(Reward(0.0, True, counts))["correct_cells"] == (3.0, 1.0)


def test_a_component_hides_neither_the_reward_nor_parsed() -> None:
    graded = Reward(0.25, False, {"parsed": 7.0, "reward": 3.0, "value": 5.0})
    means = {name: value for name, (value, _) in metric_fractions(graded).items()}
    assert means == {"reward": 0.25, "parsed": 0.0, "reward_part": 3.0, "parsed_part": 7.0, "value": 5.0}
    assert completion_metrics(graded) == {name: means[name] for name in means if name != "reward"}
    for value in (0.0, 0.5):
        assert metric_fractions(Reward(value, True, {"reward": 0.5})).keys() == {"reward", "parsed"}


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("2+2=", "2+2="),
        ([{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "So:"}], "2+2="),
        ([{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2="}]}], "2+2="),
        ([{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "2="}]}], "2="),
        ([{"role": "user", "content": [{"type": "image"}]}], ""),
        ([{"role": "system", "content": "Add."}, {"role": "assistant", "content": [{"text": "2="}]}], "Add."),
        ([{"role": "assistant", "content": "2="}], ""),
        ([{"role": "user", "content": None, "tool_calls": [1]}], ""),
    ],
)
def test_the_prompt_that_is_shown_is_text(prompt, shown) -> None:
    assert shown_prompt(Problem(prompt)) == shown


def test_a_ratio_over_nothing_is_not_shown() -> None:
    """A puzzle without an empty cell has no share of them that is right."""
    breakdown = {"cell_accuracy": 0.0, "correct_cells": 0.0, "solve_rate": 0.0}
    assert completion_metrics(Reward(1.0, True, breakdown | {"empty_cells": 0.0})) == {"parsed": 1.0, "solve_rate": 0.0}
    shown = {"parsed": 1.0, "solve_rate": 0.0, "cell_accuracy": 0.0}
    assert completion_metrics(Reward(1.0, True, breakdown | {"empty_cells": 4.0})) == shown, "a share of 0 is one"


def test_each_completion_has_the_time_limit_for_itself(monkeypatch) -> None:
    """A task that grades one by one may take longer for all of them than for one."""
    begun = []

    @contextmanager
    def counted(seconds: float, late: Any) -> Any:
        yield lambda: begun.append(seconds)

    monkeypatch.setattr("dllm_rl.tasks.base.deadline", counted)
    task = Returning(Reward(1.0, True))
    assert len(grade(task, [Problem("1"), Problem("2")] * 2, ["a", "b", "c", "d"], timeout=7.0)) == 4
    assert begun == [7.0] * 4


class StillThread(threading.Thread):
    """The watch, which never looks: the clock of these tests is none that it could wait by."""

    def start(self):
        pass


def test_the_last_resort_is_armed_at_most_once_a_second_and_moves_with_the_work(monkeypatch):
    clock = [100.0]
    armed = []
    monkeypatch.setattr(base.threading, "Thread", StillThread)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda after, **_: armed.append((clock[0], after)))
    with deadline(7.0, lambda: "late") as restart:
        for _ in range(40):  # a quarter of a second each: ten seconds of work
            clock[0] += 0.25
            restart()
    assert armed == [(100.0 + second, 7.0 + GRACE) for second in range(11)]


def test_numbers_of_torch_and_numpy_become_pythons():
    for kind in (numpy.float32, numpy.int64, torch.tensor):
        added = metric_fractions(Reward(kind(2), True, {"good": kind(1)}))
        assert added == {"reward": (2.0, 1.0), "parsed": (1.0, 1.0), "good": (1.0, 1.0)}
        assert {type(number) for pair in added.values() for number in pair} == {float}
