"""Interface of a task: problems, and a grader that maps text to numbers. Tasks never import torch."""

import faulthandler
import inspect
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from dllm_rl.tasks.user_code import children_end, own_copy, process_restored

FLOAT32_MAX = 3.4028234663852886e38
TIMEOUT_STATUS = 124  # exit status of a process whose grader did not return in time, like that of timeout(1)
# C code that never checks for signals is ended by faulthandler's timer, which runs without the interpreter.
GRACE = 5.0  # seconds from the limit until this timer fires
REARM_SECONDS = 1.0  # the timer is set again only after this time


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
    """The sampling cost of a completion.

    Args:
        forwards: Model calls for this completion up to its last written token. Steps that only other rows of the batch
            took, and extra calls of a cache, are not counted.
        tokens: Tokens before the first end token; all that the sampler wrote if there is none.
    """

    forwards: int
    tokens: int


COST_ARGUMENTS = ("forwards", "num_tokens")  # parameters with which a grader requests sampling costs


def requested_costs(grader: Callable, costs: Sequence[Cost]) -> dict[str, list[int]]:
    """Return those of COST_ARGUMENTS that a grader has as parameters, a number per completion; {} without costs.

    `**kwargs` does not request any.
    """
    parameters = inspect.signature(grader).parameters if costs else {}
    per_completion = {
        "forwards": [cost.forwards for cost in costs],
        "num_tokens": [cost.tokens for cost in costs],
    }
    return {name: per_completion[name] for name in COST_ARGUMENTS if name in parameters}


@runtime_checkable
class Task(Protocol):
    """A sized, indexable collection of problems with a grader.

    Implement it for problems that no other task covers; use `task_from_dataset` for rows with reward functions. Change
    `version` whenever a grade may change.

    Optional members: rewards(problems, completions) grades many completions together; if it raises, they are graded
    again one by one, unless graded_once is true. infill is true if the problems have blanks, so that `grpo` appends
    no tokens by default. reward_weights maps names in the breakdown to weights. A grader may
    request COST_ARGUMENTS, as in reward(problem, completion, forwards), or rewards(problems, completions, forwards)
    with a list.
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
    fractions = {"reward": (float(reward.value), 1.0), "parsed": (float(reward.parsed), 1.0)}
    components = component_fractions(reward)
    if components.keys() == {"reward"}:
        return fractions
    return fractions | {f"{name}_part" if name in fractions else name: components[name] for name in components}


def component_fractions(reward: Reward) -> dict[str, tuple[float, float]]:
    """Return numerator and denominator of each metric of the breakdown: (value, 1), or the two counts of
    RATIO_METRICS.
    """
    fractions = {name: (float(value), 1.0) for name, value in reward.breakdown.items()}
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

    If the task has a method `rewards`, all completions are graded in one call. The grader gets copies of the problems,
    and the process is as before when it returns (`tasks.user_code`).

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
        RuntimeError: The grader raises or exits, does not return a `Reward`, or a number is not finite in fp32.
        ValueError: The numbers of problems and completions differ.
    """
    if len(problems) != len(completions):
        raise ValueError(f"{len(problems)} problems for {len(completions)} completions: give the problem of each")
    index = 0  # of the completion that is being graded; while all are graded together it is 0

    def begin(at: int) -> None:
        nonlocal index
        index = at
        restart()

    def late() -> str:
        shown = _shown(problems[index], completions[index])
        return (
            f"process {os.environ.get('RANK', 0)}: the grader of task {task.name!r} did not return within "
            f"reward_timeout={timeout:g} s on {shown}; fix it or raise reward_timeout"
        )

    batch_grader = getattr(task, "rewards", None)
    rewards = error_together = None
    limit = nullcontext(lambda: None) if timeout is None else deadline(timeout, late)
    with process_restored(), limit as restart:
        if batch_grader is not None:
            try:
                given = list(map(_own_problem, problems)), list(completions)
                with children_end():
                    rewards = list(batch_grader(*given, **requested_costs(batch_grader, costs or ())))
            except (Exception, SystemExit) as error:
                error_together = error
        if rewards is None:  # no batch grader, or it failed: grade one by one, to name the completion that fails
            rewards = _grade_one_by_one(task, problems, completions, costs or (), begin, error_together)
        for problem, completion, reward in zip(problems, completions, rewards, strict=True):
            if reason := invalid_reason(reward):
                raise RuntimeError(
                    f"the grader of task {task.name!r} returned {reason} on {_shown(problem, completion)}"
                )
    return rewards


def _own_problem(problem: Problem) -> Problem:
    return replace(problem, prompt=own_copy(problem.prompt), fields=own_copy(problem.fields))


def _shown(problem: Problem, completion: str) -> str:
    return f"problem {problem!r}, completion {completion!r}"


def _grade_one_by_one(
    task: Task,
    problems: Sequence[Problem],
    completions: Sequence[str],
    costs: Sequence[Cost],
    begin: Callable[[int], None],
    error_together: BaseException | None,
) -> list[Reward]:
    """Grade each completion by a separate call, after begin(its index).

    Raises RuntimeError that names the completion for which the grader raises; or all, if only grading them together
    raised, with `error_together`, or if that is not to be repeated (`graded_once`).
    """
    once = error_together is not None and getattr(task, "graded_once", False)
    requested = requested_costs(task.reward, costs)
    rewards = []
    for index, (problem, completion) in enumerate(() if once else zip(problems, completions, strict=True)):
        begin(index)
        try:
            arguments = {name: values[index] for name, values in requested.items()}
            with children_end():
                rewards.append(task.reward(_own_problem(problem), completion, **arguments))
        except (Exception, SystemExit) as error:  # a grader that exits must not look like a successful run
            message = f"the grader of task {task.name!r} raised on {_shown(problem, completion)}: {error!r}"
            if error_together is not None and repr(error_together) != repr(error):
                message += f"; on all {len(completions)} completions in one call: {error_together!r}"
            raise RuntimeError(message) from error
    if error_together is not None:
        count = f"{len(completions)} completions in one call"
        raise RuntimeError(
            f"the grader of task {task.name!r} raised on {count}: {error_together!r}"
        ) from error_together
    return rewards


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


_BEFORE_DEADLINES: list[Any] = []  # the handlers of SIGVTALRM that deadlines have replaced


def _without_deadlines() -> None:
    """Give a forked process the handler from before all deadlines; it has none of their timers and threads."""
    if _BEFORE_DEADLINES:
        signal.signal(signal.SIGVTALRM, _BEFORE_DEADLINES[0] or signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_without_deadlines)


@contextmanager
def deadline(seconds: float, describe: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Yield restart(), to be called before each piece of work.

    If a piece of work takes longer than `seconds`, `describe()` and the stacks of all threads are printed on standard
    error, and the process ends with status 124, without cleanup.
    """
    start = time.monotonic()
    timer_set_at = -math.inf
    done = threading.Event()

    def restart() -> None:
        nonlocal start, timer_set_at
        start = time.monotonic()
        # Setting the timer starts one thread and joins another, which costs more than grading a short completion.
        if start - timer_set_at >= REARM_SECONDS:
            timer_set_at = start
            # If it fires, 4 to 5 s after the limit, it prints the stacks without `describe()` and exits with status 1.
            faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=2)

    def stop_if_late(*_: object) -> None:
        if time.monotonic() - start >= seconds:
            os.write(2, f"{describe()}\n".encode(errors="replace"))
            faulthandler.dump_traceback(file=2)
            os._exit(TIMEOUT_STATUS)

    def watch() -> None:
        while not done.wait(max(0.0, start + seconds - time.monotonic())):
            stop_if_late()

    threading.Thread(target=watch, daemon=True).start()  # stops work that sleeps, waits or runs Python
    restart()
    # A timer of processor time interrupts C code that holds the interpreter's lock, such as regular expressions.
    has_timer = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if has_timer:
        _BEFORE_DEADLINES.append(signal.signal(signal.SIGVTALRM, stop_if_late))
        signal.setitimer(signal.ITIMER_VIRTUAL, *[min(1.0, seconds)] * 2)
    try:
        yield restart
    finally:
        if has_timer:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, _BEFORE_DEADLINES.pop())
        done.set()
        faulthandler.cancel_dump_traceback_later()
