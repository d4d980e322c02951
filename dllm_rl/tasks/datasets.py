"""A data set with TRL-style reward functions as a task."""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real
from typing import Any

from dllm_rl.tasks.base import SPEED, Problem, Reward, asked

HELD_OUT = 256  # rows at most
# f(prompts=[...], completions=[...], **columns) -> for each completion a number, or None: does not apply. May be async.
RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]


@dataclass(frozen=True)
class DatasetTask:
    """The rows of a data set, graded by a weighted sum of functions; see task_from_dataset."""

    dataset: Any = field(repr=False)
    reward_funcs: tuple[RewardFunction, ...]
    weights: tuple[float, ...]
    name: str
    version: str

    @property
    def reward_weights(self) -> dict[str, float]:
        return dict(zip(self._labels(), self.weights, strict=True))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        row = dict(self.dataset[index])
        prompt = row.pop("prompt")
        solution = row.pop("completion", None)
        return Problem(prompt, row, solution[-1]["content"] if isinstance(solution, list) else solution)

    def reward(
        self,
        problem: Problem,
        completion: str,
        forwards: int | None = None,
        tokens_per_forward: float | None = None,
    ) -> Reward:
        return self.rewards([problem], [completion], [forwards], [tokens_per_forward])[0]

    def rewards(
        self,
        problems: Sequence[Problem],
        completions: Sequence[str],
        forwards: Sequence[int | None] = (),
        tokens_per_forward: Sequence[float | None] = (),
    ) -> list[Reward]:
        """Grades by one call per function; a value is the sum of weight * number over functions that gave a number.
        ValueError when a function returns too few or a number that is not finite, or all return None; and when it asks
        for SPEED, and none is given."""
        told: list[Any] = []
        for problem, text in zip(problems, completions, strict=True):
            told.append(text if isinstance(problem.prompt, str) else [{"role": "assistant", "content": text}])
        columns: dict[str, list[Any]] = {"prompts": [problem.prompt for problem in problems], "completions": told}
        for name in problems[0].fields:
            columns[name] = [problem.fields[name] for problem in problems]
        breakdowns: list[dict[str, float]] = [{} for _ in problems]
        values = [0.0] * len(problems)
        labels = self._labels()
        speed = dict(zip(SPEED, (forwards, tokens_per_forward), strict=True))
        arguments = [columns | _asked_for(label, f, speed) for label, f in zip(labels, self.reward_funcs, strict=True)]
        returned = _called(self.reward_funcs, arguments)
        for label, numbers, weight in zip(labels, returned, self.weights, strict=True):
            for place, number in _numbers(label, numbers, told).items():
                breakdowns[place][label] = number
                values[place] += weight * number
        for place, breakdown in enumerate(breakdowns):
            if not breakdown:
                raise ValueError(f"every reward function returned None for completion {told[place]!r}")
        return [Reward(value, True, breakdown) for value, breakdown in zip(values, breakdowns, strict=True)]

    def _labels(self) -> list[str]:
        inner = [getattr(function, "func", function) for function in self.reward_funcs]  # of a functools.partial
        names = [getattr(function, "__name__", type(function).__name__) for function in inner]
        return [name if names.count(name) == 1 else f"{name}_{place}" for place, name in enumerate(names, 1)]


def task_from_dataset(
    dataset: Any,
    *,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    weights: Sequence[float] | None = None,
    name: str = "dataset",
    version: str = "1",
) -> DatasetTask:
    """A task from a `datasets.Dataset`, or any sequence of rows, with a `prompt` column of text or chat messages.

    reward_funcs  TRL-style functions; the other columns are keyword lists. With chat prompts a completion is a chat
                  of one message, as in TRL. A function with a parameter `forwards` or `tokens_per_forward` gets a list
                  of these, too (`tasks.base.Cost`).
    weights       one per function; 1 by default.
    version       change it when a function changes, so that stored results are not mixed up.
    A `completion` column, text or chat, becomes the solution for supervised warm-up.
    """
    functions = (reward_funcs,) if callable(reward_funcs) else tuple(reward_funcs)
    if not functions:
        raise ValueError("reward_funcs is empty: give at least one function")
    scales = (1.0,) * len(functions) if weights is None else tuple(map(float, weights))
    if len(scales) != len(functions):
        raise ValueError(f"{len(functions)} reward_funcs have {len(scales)} weights; give one for each")
    if not isinstance(dataset, Sized):
        raise ValueError("dataset has no length, as a streamed one: give its first rows, list(itertools.islice(...))")
    if not len(dataset):
        raise ValueError("dataset is empty: give at least one row")
    rows: Any = dataset
    columns = getattr(dataset, "column_names", None) or list(rows[0])
    if "prompt" not in columns:
        raise ValueError(f"dataset has no column 'prompt', only {sorted(columns)}: rename one")
    task = DatasetTask(dataset, functions, scales, name, version)
    for label, function in zip(task._labels(), functions, strict=True):
        for taken in set(asked(function)) & set(columns):
            raise ValueError(f"dataset has a column {taken!r}, and {label} asks for the sampler's: rename the column")
    return task


def in_memory(dataset: Any, max_rows: int | None = None) -> Any:
    """The data set itself if it has a length, else its first `max_rows` rows. Errors: ValueError without max_rows."""
    if isinstance(dataset, Sized):
        return dataset
    if max_rows is None:
        raise ValueError("dataset has no length, as a streamed one: give max_rows, the rows that are read into memory")
    return list(islice(iter(dataset), max_rows))


def hold_out(rows: Any) -> tuple[Any, Any]:
    """The rows without their last tenth, and the last tenth: 1 to HELD_OUT rows. Errors: ValueError below 2 rows."""
    if len(rows) < 2:
        raise ValueError(f"dataset must have 2 rows, one of them held out, and has {len(rows)}; give eval_dataset")
    kept = len(rows) - min(HELD_OUT, len(rows) // 10 or 1)  # one row at least
    parts = range(kept), range(kept, len(rows))
    if hasattr(rows, "select"):  # a `datasets.Dataset`, which gives views
        return rows.select(parts[0]), rows.select(parts[1])
    return list(map(rows.__getitem__, parts[0])), list(map(rows.__getitem__, parts[1]))


def _asked_for(label: str, function: RewardFunction, speed: dict[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """What the function asks for of SPEED. Errors: ValueError if it is not known."""
    given = {name: list(speed[name]) for name in asked(function)}
    for name, values in given.items():
        if None in values or not values:
            raise ValueError(
                f"reward function {label} asks for {name}, which a sampler knows and a text alone does not; "
                f"give task.reward(problem, text, {name}=...)"
            )
    return given


def _called(functions: Sequence[RewardFunction], arguments: Sequence[dict[str, Any]]) -> list[Any]:
    """What each function returns, given its arguments; async functions run concurrently."""
    returned: list[Any] = [function(**given) for function, given in zip(functions, arguments, strict=True)]
    waiting = [place for place, value in enumerate(returned) if inspect.isawaitable(value)]
    if waiting:

        async def all_of_them() -> list[Any]:
            return list(await asyncio.gather(*(returned[place] for place in waiting)))

        with ThreadPoolExecutor(1) as pool:  # a notebook has an event loop running in this thread
            for place, value in zip(waiting, pool.submit(asyncio.run, all_of_them()).result(), strict=True):
                returned[place] = value
    return returned


def _numbers(label: str, numbers: Any, told: Sequence[Any]) -> dict[int, float]:
    """What a function returned, by the completion's place, without None. Errors: ValueError."""
    if not isinstance(numbers, Sized) or not isinstance(numbers, Iterable):
        raise ValueError(f"reward function {label} returned {numbers!r}, not a list of numbers")
    if len(numbers) != len(told):
        raise ValueError(f"reward function {label} returned {len(numbers)} numbers for {len(told)} texts")
    found = {}
    for place, number in enumerate(numbers):
        if number is not None:  # None: the function does not apply to this completion
            if not isinstance(number, Real) or not math.isfinite(number):
                raise ValueError(f"reward function {label} returned {number!r} for completion {told[place]!r}")
            found[place] = float(number)
    return found
