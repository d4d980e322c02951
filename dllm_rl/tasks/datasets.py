"""Make a task from a data set and TRL-style reward functions."""

import asyncio
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from dllm_rl.identity import digest_of_code, digest_of_rows, full_name, rows_in_order
from dllm_rl.tasks.base import COST_ARGUMENTS, FLOAT32_MAX, Problem, Reward, Task
from dllm_rl.tasks.user_code import children_end, own_copy

MAX_HELD_OUT = 256  # largest number of rows that are held out by default
ALWAYS_PASSED = ("prompts", "completions")  # arguments of every reward function, besides the columns
# TRL passes these to functions with parameters of these names. A column of such a name would replace them.
TRL_ARGUMENTS = ("prompt_ids", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
TEXT_TYPES = (str, bytes, bytearray, memoryview)
_LOOPS: dict[int, asyncio.AbstractEventLoop] = {}  # by process id
# f(prompts=[...], completions=[...], **columns) -> per completion a number, or None if it does not apply. May be async.
RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]


class Source(NamedTuple):
    """Where the user gave the rows of a data set, for error messages: an argument, and which of its rows is first."""

    name: str = "dataset"
    first: int = 0

    def row(self, index: int) -> str:
        return f"{self.name}: row {self.first + index}"


DATASET = Source()


@dataclass(frozen=True)
class DatasetTask:
    """The rows of a data set, graded by a weighted sum of functions. Make it with `task_from_dataset`."""

    dataset: Any = field(repr=False)
    reward_funcs: tuple[RewardFunction, ...]
    weights: tuple[float, ...]
    name: str
    version: str
    columns: tuple[str, ...] = field(default=(), repr=False)  # names in any row, except prompt, completion and blank
    blank: str | None = None  # of rows without a blank of their own
    source: Source = field(default=DATASET, repr=False, compare=False)
    rows: str | None = field(init=False)  # which rows the data set has: a resume compares it

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", digest_of(self.dataset))

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weight of each reward function, by its name."""
        return dict(zip(self._labels, self.weights, strict=True))

    @property
    def graders(self) -> dict[str, str]:
        """What tells whether two tasks grade alike: the code of each reward function, or of a library's its name."""
        functions = zip(self._labels, self.reward_funcs, strict=True)
        return {
            label: digest_of_code(function) or full_name(getattr(function, "func", function))
            for label, function in functions
        }

    @property
    def graded_once(self) -> bool:
        """Whether no function may be called again after an exception, because a call is paid (`Oracle`)."""
        return any(getattr(function, "graded_once", False) for function in self.reward_funcs)

    @cached_property
    def _labels(self) -> list[str]:
        functions = [getattr(function, "func", function) for function in self.reward_funcs]  # unwrap functools.partial
        names = [getattr(function, "__name__", type(function).__name__) for function in functions]
        return [name if names.count(name) == 1 else f"{name}_{position}" for position, name in enumerate(names, 1)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        row = dict(self.dataset[index])
        prompt = row.pop("prompt")
        solution = row.pop("completion", None)
        blank = row.pop("blank", None)
        blank = self.blank if blank is None else blank
        if not isinstance(blank, str | None):
            raise ValueError(
                f"{self.source.row(index)} has blank={blank!r}, which is not text: give text, or rename the column"
            )
        return Problem(prompt, row, solution[-1]["content"] if isinstance(solution, list) else solution, blank)

    def reward(
        self,
        problem: Problem,
        completion: str,
        forwards: int | None = None,
        num_tokens: int | None = None,
    ) -> Reward:
        return self.rewards([problem], [completion], [forwards], [num_tokens])[0]

    def rewards(
        self,
        problems: Sequence[Problem],
        completions: Sequence[str],
        forwards: Sequence[int | None] = (),
        num_tokens: Sequence[int | None] = (),
    ) -> list[Reward]:
        """Grade completions, with one call per reward function. The value of a completion is the weighted sum of the
        numbers that the functions return for it; a completion for which all, or an `Oracle`, return None has no reward
        (value None).

        Raises:
            ValueError: A function returns too few numbers or a number that is not finite, or requests a cost that is
                not available.
        """
        # As in TRL, a completion is text if its prompt is text, else a chat of one message.
        shown_completions: list[Any] = []
        for problem, text in zip(problems, completions, strict=True):
            is_text = isinstance(problem.prompt, str)
            shown_completions.append(text if is_text else [{"role": "assistant", "content": text}])
        columns: dict[str, list[Any]] = {
            "prompts": [problem.prompt for problem in problems],
            "completions": shown_completions,
        }
        for name in self.columns:  # None if a row lacks the column, as in a `datasets.Dataset`
            columns[name] = [problem.fields.get(name) for problem in problems]
        breakdowns: list[dict[str, float]] = [{} for _ in problems]
        values = [0.0] * len(problems)
        costs = dict(zip(COST_ARGUMENTS, (forwards, num_tokens), strict=True))
        results = _call_functions(zip(self._labels, self.reward_funcs, strict=True), columns, costs)
        for label, numbers, weight in zip(self._labels, results, self.weights, strict=True):
            for index, number in numbers_by_completion(label, numbers, shown_completions).items():
                breakdowns[index][label] = number
                values[index] += weight * number
        functions = zip(self._labels, self.reward_funcs, strict=True)
        required = {label for label, function in functions if getattr(function, "required", False)}
        breakdowns = [breakdown if required <= breakdown.keys() else {} for breakdown in breakdowns]
        return [
            Reward(value, True, breakdown) if breakdown else Reward(None, False)
            for value, breakdown in zip(values, breakdowns, strict=True)
        ]


def task_from_dataset(
    dataset: Any,
    *,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    weights: Sequence[float] | None = None,
    name: str = "dataset",
    version: str = "1",
    blank: str | None = None,
) -> DatasetTask:
    """Make a task from a `datasets.Dataset`, or any sequence of rows, and reward functions.

    Use it for your rows and graders; write a `Task` if problems are generated. Each row needs a `prompt` column of text
    or chat messages. A `completion` column, text or chat, becomes the solution for supervised warm-up. A `blank` column
    is for infilling: each occurrence of its text in the row's prompt is one token to fill in (`tasks.base.Problem`).

    Args:
        dataset: Rows with a length: a `datasets.Dataset` or a list of dicts.
        reward_funcs: One or several TRL-style functions; the other columns are passed as keyword lists. With chat
            prompts a completion is a chat of one message, as in TRL. A function with a parameter `num_tokens` or
            `forwards` also receives a list of these, as `tasks.base.Cost` counts them.
        weights: One number per function. None (default): 1 each.
        name: Name of the task. Default: "dataset".
        version: Version of the grading; change it when a function changes, so that stored results are not mixed up.
        blank: Blank of the rows that have none of their own. None (default): no infilling.

    Returns:
        A task.

    Raises:
        ValueError: The rows lack a prompt or a length, a function is not callable, the number of weights differs, a
            function needs an argument that no column provides, or a column's name is reserved.
    """
    return dataset_task(dataset, reward_funcs, weights=weights, name=name, version=version, blank=blank)


def dataset_task(
    dataset: Any,
    reward_funcs: RewardFunction | Sequence[RewardFunction],
    *,
    name: str,
    weights: Sequence[float] | None = None,
    version: str = "1",
    blank: str | None = None,
    source: Source = DATASET,
) -> DatasetTask:
    """Make the task of `task_from_dataset`; error messages name the rows as `source` does."""
    functions = _as_functions(reward_funcs)
    if weights is not None and (not isinstance(weights, list | tuple) or not all(isinstance(w, Real) for w in weights)):
        raise ValueError(f"weights={weights!r} of reward_funcs is not a list of numbers; give one number per function")
    all_weights = (1.0,) * len(functions) if weights is None else tuple(map(float, weights))
    if len(all_weights) != len(functions):
        raise ValueError(f"{len(functions)} reward_funcs have {len(all_weights)} weights; give one per function")
    column_names = _column_names(dataset, source)
    passed_columns = tuple(column for column in column_names if column not in ("prompt", "completion", "blank"))
    task = DatasetTask(dataset, functions, all_weights, name, version, passed_columns, blank, source)
    for label, function in zip(task._labels, functions, strict=True):
        _check_parameters(label, function, dataset, column_names, source)
    return task


def _check_parameters(
    label: str, function: RewardFunction, dataset: Any, column_names: Sequence[str], source: Source
) -> None:
    """Raise ValueError if the function needs an argument that no column provides, or a column has a reserved name."""
    columns = [column for column in column_names if column not in ("prompt", "completion", "blank")]
    check_argument: Any = getattr(function, "check_argument", None)  # of an `Oracle`
    named = [name for name in columns if name in inspect.signature(function).parameters]
    for row in rows_in_order(dataset) if check_argument and named else ():
        for name in named:
            check_argument(name, row.get(name))
    for name, parameter in inspect.signature(function).parameters.items():
        if name in column_names and name in (*COST_ARGUMENTS, *TRL_ARGUMENTS):
            raise ValueError(
                f"{source.name} has a column {name!r}, and {label} requests what the run or TRL passes by that name: "
                "rename the column"
            )
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        is_passed = name in (*ALWAYS_PASSED, *COST_ARGUMENTS, *columns)
        if parameter.kind is parameter.POSITIONAL_ONLY or not is_passed:
            hint = " (for the length of a completion, take num_tokens)" if name == "completion_ids" else ""
            raise ValueError(
                f"{source.name}: reward function {label} needs {name!r}, which is not one of "
                f"{', '.join((*ALWAYS_PASSED, *columns))}: name a column, or give the parameter a default{hint}"
            )
        for index in range(len(dataset) if name in columns and not hasattr(dataset, "column_names") else 0):
            if name not in dataset[index]:
                raise ValueError(
                    f"{source.row(index)} has no {name!r}, which reward function {label} needs: add "
                    "it, as None where it does not apply, or give the parameter a default"
                )


def _as_functions(reward_funcs: Any) -> tuple[RewardFunction, ...]:
    """Return the reward functions as a tuple. Raises ValueError if one is not callable."""
    if not callable(reward_funcs) and not isinstance(reward_funcs, list | tuple):
        raise ValueError(
            f"reward_funcs={reward_funcs!r} is not a function; give a function of prompts, completions and **columns, "
            "which may call a reward model, or a list of functions"
        )
    functions = (reward_funcs,) if callable(reward_funcs) else tuple(reward_funcs)
    if not functions:
        raise ValueError("reward_funcs is empty: give at least one function")
    for index, function in enumerate(functions):
        if not callable(function) or isinstance(function, type):
            raise ValueError(
                f"reward_funcs[{index}]={function!r} is not a function of prompts, completions and **columns"
            )
    return functions


def _column_names(dataset: Any, source: Source) -> list[str]:
    """Return the column names of all rows, in order.

    Raises ValueError unless `dataset` is a sequence of rows with a prompt.
    """
    if not len(in_memory(dataset, name=source.name)):
        raise ValueError(f"{source.name} is empty: give at least one row")
    names = getattr(dataset, "column_names", None)
    if names is None:
        rows = [_row(dataset, index, source) for index in range(len(dataset))]
        names = list(dict.fromkeys(name for row in rows for name in row))
        if "prompt" in names:
            for index, row in enumerate(rows):
                if "prompt" not in row:
                    raise ValueError(f"{source.row(index)} has no 'prompt', only {sorted(map(str, row))}; add one")
    if "prompt" not in names:
        raise ValueError(f"{source.name} has no column 'prompt', only {sorted(map(str, names))}: rename one")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{source.name} has a column {name!r}, whose name is not text: rename it")
        if name in ALWAYS_PASSED:
            raise ValueError(
                f"{source.name} has a column {name!r}, a name of what the run passes to reward functions: rename "
                "the column"
            )
    return list(names)


def check_is_rows(dataset: Any, name: str = "dataset") -> None:
    """Raise ValueError with advice if the data set is text, a path, a dict of columns or splits, or a pandas table."""
    if isinstance(dataset, (*TEXT_TYPES, Path)):
        kind = "a path" if isinstance(dataset, Path) else "text"
        raise ValueError(
            f"{name}={dataset!r} is {kind}; give rows, for example a list of dicts or datasets.load_dataset(...)"
        )
    if isinstance(dataset, Mapping):
        if all(hasattr(split, "column_names") for split in dataset.values()):  # a DatasetDict
            splits = list(dataset)
            raise ValueError(
                f"{name} has the splits {splits}; give one of them, for example dataset[{(splits or ['train'])[0]!r}]"
            )
        raise ValueError(
            f"{name} is a dict of columns {sorted(map(str, dataset))}; give datasets.Dataset.from_dict(...), "
            "or a list of dicts"
        )
    if hasattr(dataset, "to_pylist"):
        raise ValueError(f"{name} is a table of pyarrow; give table.to_pylist(), or datasets.Dataset(table)")
    if hasattr(dataset, "iterrows"):
        raise ValueError(f"{name} is a pandas table; give datasets.Dataset.from_pandas(...)")


def _row(dataset: Any, index: int, source: Source) -> Mapping[str, Any]:
    try:
        row = dataset[index]
    except (KeyError, TypeError) as error:
        kind = type(dataset).__name__
        raise ValueError(
            f"{source.name} of type {kind} has no row [{index}] ({error!r}); give a list of dicts"
        ) from None
    if not isinstance(row, Mapping):
        remedy = "give {'prompt': ...} for each row, with the columns that the reward needs"
        raise ValueError(f"{source.row(index)} is {str(row)[:60]!r} of type {type(row).__name__}; {remedy}")
    return row


def in_memory(dataset: Any, max_rows: int | None = None, *, name: str = "dataset") -> Any:
    """Return a data set with a length unchanged; of a streamed one, return a list of its first `max_rows` rows. Error
    messages call it `name`.

    Raises:
        ValueError: The data set has no length, and max_rows is None.
    """
    check_is_rows(dataset, name)
    if isinstance(dataset, Sized):
        return dataset
    if max_rows is None:
        raise ValueError(
            f"{name} has no length (it is streamed): give its first rows, list(itertools.islice(dataset, N)); grpo "
            "also takes max_rows=N"
        )
    return list(islice(iter(dataset), max_rows))


def digest_of(dataset: Any) -> str | None:
    """Return a text that identifies a data set: its path, or its number of rows and a digest of all of them."""
    if dataset is None or isinstance(dataset, str):
        return dataset
    return f"{len(dataset)} rows, {digest_of_rows(rows_in_order(dataset))[:16]}"


def training_and_held_out(
    rows: Any, eval_dataset: Any = None, eval_split: float | None = None, *, name: str = "dataset"
) -> tuple[Any, Any]:
    """Return the rows to train on, and the held-out rows: `eval_dataset`, or without it the last of `rows`.

    A single row is returned as both. Error messages call the rows `name`.

    Args:
        rows: Data set with a length.
        eval_dataset: Held-out rows. None (default): split them off.
        eval_split: Share of the rows to hold out, if below 1, else their number. None (default): a tenth, 1 to
            MAX_HELD_OUT.

    Raises:
        ValueError: Both eval_dataset and eval_split are passed, there are no rows, or one part would be empty.
    """
    if not len(rows):
        raise ValueError(f"{name} is empty: give at least one row")
    if eval_dataset is not None:
        if eval_split is not None:
            raise ValueError(
                f"eval_split={eval_split} holds out training rows, and eval_dataset is passed too: leave one of them "
                "out"
            )
        return rows, eval_dataset
    if len(rows) == 1 and eval_split is None:
        return rows, rows
    num_held_out: float = min(MAX_HELD_OUT, len(rows) // 10 or 1)
    if eval_split is not None:
        num_held_out = round(eval_split * len(rows)) if 0 < eval_split < 1 else eval_split
    if not 0 < num_held_out < len(rows) or num_held_out != int(num_held_out):
        raise ValueError(
            f"eval_split={eval_split} of {len(rows)} rows is not possible: give a share between 0 and 1, or a number "
            f"from 1 to {len(rows) - 1}"
        )
    num_training = len(rows) - int(num_held_out)
    ranges = range(num_training), range(num_training, len(rows))
    if hasattr(rows, "select"):  # a `datasets.Dataset` returns views
        return rows.select(ranges[0]), rows.select(ranges[1])
    return list(map(rows.__getitem__, ranges[0])), list(map(rows.__getitem__, ranges[1]))


def num_in_training(training: Iterable[Any], held_out: Iterable[Any]) -> int:
    """Return how many of the held-out rows or prompts, as JSON values, are in training too."""
    trained = set(map(repr, training))
    return sum(repr(each) in trained for each in held_out)


def num_problems_in_training(task: Task, eval_task: Task) -> int:
    """Return how many held-out prompts a data set's training has too; 0 for tasks that split problems themselves."""
    if not isinstance(task, DatasetTask) or not isinstance(eval_task, DatasetTask):
        return 0
    return num_in_training(*([row["prompt"] for row in rows_in_order(each.dataset)] for each in (task, eval_task)))


def _call_functions(
    functions: Iterable[tuple[str, RewardFunction]], columns: dict[str, list[Any]], costs: dict[str, Sequence[Any]]
) -> list[Any]:
    """Call the functions, each given with its label, and return their results. Async functions run concurrently.

    A function receives the columns that it accepts, all if it has `**columns`, and the COST_ARGUMENTS that it requests.
    Each value is a copy of its own: a function may extend the chat of a prompt, or sort a list in place. Raises
    ValueError, before any call, if one of those costs is not available.
    """
    calls = []
    for label, function in functions:
        parameters = inspect.signature(function).parameters
        accepts_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        accepted = [name for name in columns if accepts_all or name in parameters]
        arguments: dict[str, Any] = {name: list(map(own_copy, columns[name])) for name in accepted}
        for name in filter(parameters.__contains__, costs):
            if None in costs[name] or not costs[name]:
                raise ValueError(
                    f"reward function {label} requests {name}, which only a sampler provides; "
                    f"pass it: task.reward(problem, text, {name}=...)"
                )
            arguments[name] = list(costs[name])
        calls.append((function, arguments))
    results: list[Any] = [function(**arguments) for function, arguments in calls]
    awaitable_indices = [index for index, value in enumerate(results) if inspect.isawaitable(value)]
    if awaitable_indices:
        loop = _event_loop()
        with suppress(RuntimeError):  # no event loop runs in this thread
            if asyncio.get_running_loop() is loop:
                for value in filter(inspect.iscoroutine, results):
                    value.close()
                raise ValueError("an async reward function called a task with async functions: await those instead")
        coroutine = _gather([results[index] for index in awaitable_indices])
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            for index, value in zip(awaitable_indices, future.result(), strict=True):
                results[index] = value
        finally:
            future.cancel()  # after an interrupt
    return results


async def _gather(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Await all concurrently. After an error the others are canceled."""

    async def awaited(awaitable: Awaitable[Any]) -> Any:
        with children_end():
            return await awaitable

    tasks = list(map(asyncio.ensure_future, map(awaited, awaitables)))
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _event_loop() -> asyncio.AbstractEventLoop:
    """Return this process's event loop of async functions, so that they may keep clients and locks between calls.

    It runs in a thread, because a notebook has an event loop in the main one.
    """
    process = os.getpid()  # a forked child does not have its parent's threads
    if process not in _LOOPS:
        loop = asyncio.new_event_loop()
        if _LOOPS.setdefault(process, loop) is loop:  # not if another thread was faster
            threading.Thread(target=_run_forever, args=(loop,), daemon=True).start()
        else:
            loop.close()
    return _LOOPS[process]


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        with suppress(SystemExit, KeyboardInterrupt):  # a function exits: its caller gets the error, others continue
            loop.run_forever()


def numbers_by_completion(label: str, numbers: Any, completions: Sequence[Any]) -> dict[int, float]:
    """Return a reward function's numbers by index of the completion, without those that are None.

    Raises ValueError unless there is one finite number or None per completion.
    """
    listed = one_per_completion(label, numbers, completions)
    found = (finite_or_none(label, *pair) for pair in zip(listed, completions, strict=True))
    return {index: number for index, number in enumerate(found) if number is not None}


def one_per_completion(label: str, numbers: Any, completions: Sequence[Any]) -> Sequence[Any]:
    """Return what a reward function returned as a sequence. Raises ValueError unless it has one item per completion."""
    if hasattr(numbers, "tolist"):  # an array, a tensor or a pandas series
        numbers = numbers.tolist()
    # Not a set, which has no order; a dict would be read as its keys, and text as its characters.
    if not isinstance(numbers, Sequence) or isinstance(numbers, TEXT_TYPES):
        raise ValueError(
            f"reward function {label} returned {numbers!r:.80} of type {type(numbers).__name__}, not a list of "
            "numbers; give one number per completion, in the same order"
        )
    if len(numbers) != len(completions):
        raise ValueError(
            f"reward function {label} returned {len(numbers)} numbers for {len(completions)} texts; give one number "
            "per completion, or None where it does not apply"
        )
    return numbers


def finite_or_none(label: str, number: Any, completion: Any) -> float | None:
    """Return a completion's number, or None if the function does not apply to it. Raises ValueError for all else."""
    if getattr(number, "ndim", None) == 0 and hasattr(number, "item"):  # a NumPy scalar or a tensor
        number = number.item()
    if number is None:
        return None
    if not isinstance(number, Real) or not -FLOAT32_MAX <= number <= FLOAT32_MAX:  # type: ignore[operator]
        raise ValueError(
            f"reward function {label} returned {number!r:.80} for completion {completion!r}; give a finite number, or "
            "None"
        )
    return float(number)
