"""Make a task from a data set and TRL-style reward functions."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real
from typing import Any

from dllm_rl.tasks.base import FLOAT32_MAX, SPEED, Problem, Reward, asked

HELD_OUT = 256  # largest number of rows that are held out by default
PASSED = ("prompts", "completions")  # arguments that every reward function receives, besides the columns
# TRL passes these to functions that name them. A column with such a name would replace them.
TRL_PASSES = ("prompt_ids", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
TEXT = (str, bytes, bytearray, memoryview)
# f(prompts=[...], completions=[...], **columns) -> a number, or None (does not apply), per completion. May be async.
RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]


@dataclass(frozen=True)
class DatasetTask:
    """The rows of a data set, graded by a weighted sum of functions. Make it with `task_from_dataset`."""

    dataset: Any = field(repr=False)
    reward_funcs: tuple[RewardFunction, ...]
    weights: tuple[float, ...]
    name: str
    version: str
    columns: tuple[str, ...] = field(default=(), repr=False)  # names in any row, except prompt and completion

    @property
    def reward_weights(self) -> dict[str, float]:
        return dict(zip(self._labels(), self.weights, strict=True))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        row = dict(_row(self.dataset, index))
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
        """Grade completions by one call per function.

        A value is the sum of weight * number over the functions that return a number.

        Raises:
            ValueError: A function returns too few numbers or a non-finite number, all functions return None, or a
                function requests SPEED that is unknown.
        """
        told: list[Any] = []
        for problem, text in zip(problems, completions, strict=True):
            told.append(text if isinstance(problem.prompt, str) else [{"role": "assistant", "content": text}])
        columns: dict[str, list[Any]] = {"prompts": [problem.prompt for problem in problems], "completions": told}
        for name in self.columns:  # None if a row lacks it, as in a `datasets.Dataset`
            columns[name] = [problem.fields.get(name) for problem in problems]
        breakdowns: list[dict[str, float]] = [{} for _ in problems]
        values = [0.0] * len(problems)
        labels = self._labels()
        speed = dict(zip(SPEED, (forwards, tokens_per_forward), strict=True))
        arguments = [
            _accepted(f, columns) | _asked_for(label, f, speed)
            for label, f in zip(labels, self.reward_funcs, strict=True)
        ]
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
        inner = [getattr(function, "func", function) for function in self.reward_funcs]  # unwrap functools.partial
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
    """Make a task from a `datasets.Dataset`, or any sequence of rows, and reward functions.

    Use it for your rows and graders; write a `Task` if problems are generated. Each row needs a `prompt` column of text
    or chat messages. A `completion` column, text or chat, becomes the solution for supervised warm-up.

    Args:
        dataset: Rows with a length: a `datasets.Dataset` or a list of dicts.
        reward_funcs: One or several TRL-style functions; the other columns are passed as keyword lists. With chat
            prompts a completion is a chat of one message, as in TRL. A function with a parameter `forwards` or
            `tokens_per_forward` also receives a list of these (`tasks.base.Cost`).
        weights: One number per function. None (default): 1 each.
        name: Name of the task. Default: "dataset".
        version: Version of the grading; change it when a function changes, so that stored results are not mixed up.

    Returns:
        A task.

    Raises:
        ValueError: The rows lack a prompt or a length, a function is not callable, the number of weights differs, a
            function needs an argument that no column provides, or a column's name is reserved.
    """
    functions = _functions(reward_funcs)
    if weights is not None and (not isinstance(weights, list | tuple) or not all(isinstance(w, Real) for w in weights)):
        raise ValueError(
            f"weights={weights!r} of reward_funcs are no list of numbers; give one number for each function"
        )
    scales = (1.0,) * len(functions) if weights is None else tuple(map(float, weights))
    if len(scales) != len(functions):
        raise ValueError(f"{len(functions)} reward_funcs have {len(scales)} weights; give one for each")
    names = _column_names(dataset)
    task = DatasetTask(
        dataset, functions, scales, name, version, tuple(c for c in names if c not in ("prompt", "completion"))
    )
    for label, function in zip(task._labels(), functions, strict=True):
        parameters = inspect.signature(function).parameters
        for taken in [c for c in names if c in SPEED and c in parameters]:
            raise ValueError(f"dataset has a column {taken!r}, and {label} asks for the sampler's: rename the column")
        for taken in [c for c in names if c in TRL_PASSES and c in parameters]:
            raise ValueError(
                f"dataset has a column {taken!r}, and {label} asks for what TRL passes by that name: rename the column"
            )
        for lacking, parameter in parameters.items():
            required = parameter.default is parameter.empty and parameter.kind in (
                parameter.POSITIONAL_ONLY,
                parameter.POSITIONAL_OR_KEYWORD,
                parameter.KEYWORD_ONLY,
            )
            if required and (parameter.kind is parameter.POSITIONAL_ONLY or lacking not in {*PASSED, *SPEED, *names}):
                raise ValueError(
                    f"reward function {label} needs {lacking!r}, which is none of {', '.join((*PASSED, *task.columns))}"
                    ": name a column, or give the parameter a default"
                )
    return task


def _functions(reward_funcs: Any) -> tuple[RewardFunction, ...]:
    """Return the reward functions as a tuple. Raises ValueError if one is not callable."""
    if isinstance(reward_funcs, TEXT):
        raise ValueError(
            f"reward_funcs={reward_funcs!r} is text; give a function of prompts, completions and **columns, which "
            "may call a reward model"
        )
    if not callable(reward_funcs) and not isinstance(reward_funcs, list | tuple):
        raise ValueError(f"reward_funcs={reward_funcs!r} is no function; give a function, or a list of functions")
    functions = (reward_funcs,) if callable(reward_funcs) else tuple(reward_funcs)
    if not functions:
        raise ValueError("reward_funcs is empty: give at least one function")
    for place, function in enumerate(functions):
        if not callable(function) or isinstance(function, type):
            raise ValueError(f"reward_funcs[{place}]={function!r} is no function of prompts, completions and **columns")
    return functions


def _column_names(dataset: Any) -> list[str]:
    """Return the column names of all rows, in order. Raises ValueError unless `dataset` is a sequence of rows with a
    prompt.
    """
    check_is_rows("dataset", dataset)
    if not isinstance(dataset, Sized):
        raise ValueError("dataset has no length, as a streamed one: give its first rows, list(itertools.islice(...))")
    if not len(dataset):
        raise ValueError("dataset is empty: give at least one row")
    names = getattr(dataset, "column_names", None)
    if names is None:
        rows = [_row(dataset, number) for number in range(len(dataset))]
        names = list(dict.fromkeys(name for row in rows for name in row))
        if "prompt" in names:
            for number, row in enumerate(rows):
                if "prompt" not in row:
                    raise ValueError(f"dataset: row {number} has no 'prompt', only {sorted(map(str, row))}; add one")
    if "prompt" not in names:
        raise ValueError(f"dataset has no column 'prompt', only {sorted(map(str, names))}: rename one")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"dataset has a column {name!r}, whose name is no text: rename it")
        if name in PASSED:
            raise ValueError(f"dataset has a column {name!r}, and reward functions get the run's: rename the column")
    return list(names)


def check_is_rows(name: str, dataset: Any) -> None:
    """Raise ValueError, with the remedy, for data that is not a sequence of rows: text, a dict of columns, a pandas
    table.
    """
    if isinstance(dataset, TEXT):
        raise ValueError(f"{name}={dataset!r} is text; give rows, as datasets.load_dataset or a list of dicts has them")
    if isinstance(dataset, Mapping):
        if all(hasattr(part, "column_names") for part in dataset.values()):  # a DatasetDict
            splits = list(dataset)
            raise ValueError(
                f"{name} holds the splits {splits}; give one of them, as {name}[{(splits or ['train'])[0]!r}]"
            )
        raise ValueError(
            f"{name} is a dict of columns {sorted(map(str, dataset))}; give datasets.Dataset.from_dict(...), "
            "or a list of dicts"
        )
    if hasattr(dataset, "iterrows"):
        raise ValueError(f"{name} is a table of pandas; give datasets.Dataset.from_pandas(...)")


def _row(dataset: Any, number: int) -> Mapping[str, Any]:
    try:
        row = dataset[number]
    except (KeyError, TypeError) as error:
        kind = type(dataset).__name__
        raise ValueError(f"dataset of type {kind} has no row [{number}] ({error!r}); give a list of dicts") from None
    if not isinstance(row, Mapping):
        remedy = "give {'prompt': ...} for each row, with the columns that the reward needs"
        raise ValueError(f"dataset: row {number} is {str(row)[:60]!r} of type {type(row).__name__}; {remedy}")
    return row


def in_memory(dataset: Any, max_rows: int | None = None) -> Any:
    """Return the data set if it has a length, else a list of its first `max_rows` rows.

    Raises:
        ValueError: The data set has no length, and max_rows is None.
    """
    check_is_rows("dataset", dataset)
    if isinstance(dataset, Sized):
        return dataset
    if max_rows is None:
        raise ValueError("dataset has no length, as a streamed one: give max_rows, the rows that are read into memory")
    return list(islice(iter(dataset), max_rows))


def hold_out(rows: Any, eval_split: float | None = None) -> tuple[Any, Any]:
    """Split off the last rows for evaluation.

    Args:
        rows: Data set with a length.
        eval_split: Share of the rows to hold out, if below 1, else their number. None (default): a tenth, 1 to
            HELD_OUT.

    Returns:
        The rows to train on, and the held-out rows.

    Raises:
        ValueError: There are fewer than 2 rows, or one part would be empty.
    """
    if len(rows) < 2:
        raise ValueError(f"dataset must have 2 rows, one of them held out, and has {len(rows)}; give eval_dataset")
    count: float = min(HELD_OUT, len(rows) // 10 or 1)  # one row at least
    if eval_split is not None:
        count = round(eval_split * len(rows)) if 0 < eval_split < 1 else eval_split
    if not 0 < count < len(rows) or count != int(count):
        raise ValueError(
            f"eval_split={eval_split} of {len(rows)} rows is not possible: give a share between 0 and 1, or a number "
            f"from 1 to {len(rows) - 1}"
        )
    kept = len(rows) - int(count)
    parts = range(kept), range(kept, len(rows))
    if hasattr(rows, "select"):  # a `datasets.Dataset` returns views
        return rows.select(parts[0]), rows.select(parts[1])
    return list(map(rows.__getitem__, parts[0])), list(map(rows.__getitem__, parts[1]))


def training_and_held_out(rows: Any, eval_dataset: Any, eval_split: float | None) -> tuple[Any, Any]:
    """Return the rows to train on and the held-out rows: `eval_dataset` if it is passed, else split by `hold_out`.

    Raises:
        ValueError: Both eval_dataset and eval_split are passed.
    """
    if eval_dataset is None:
        return hold_out(rows, eval_split)
    if eval_split is not None:
        raise ValueError(
            f"eval_split={eval_split} holds out training rows, and eval_dataset is given too: leave one of them out"
        )
    return rows, eval_dataset


def _accepted(function: RewardFunction, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the columns that the function accepts: all with `**columns`, else the columns that it names."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return columns
    return {parameter.name: columns[parameter.name] for parameter in parameters if parameter.name in columns}


def _asked_for(label: str, function: RewardFunction, speed: dict[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Return the values of SPEED that the function requests. Raises ValueError if one is unknown."""
    given = {name: list(speed[name]) for name in asked(function)}
    for name, values in given.items():
        if None in values or not values:
            raise ValueError(
                f"reward function {label} asks for {name}, which a sampler knows and a text alone does not; "
                f"give task.reward(problem, text, {name}=...)"
            )
    return given


def _called(functions: Sequence[RewardFunction], arguments: Sequence[dict[str, Any]]) -> list[Any]:
    """Call each function with its arguments and return the results; async functions run concurrently."""
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
    """Return a function's numbers by completion index, without None. Raises ValueError if they do not fit the
    completions.
    """
    if hasattr(numbers, "tolist") and hasattr(numbers, "ndim"):  # an array, a tensor, a pandas series
        if numbers.ndim != 1:
            shape = tuple(numbers.shape)
            raise ValueError(f"reward function {label} returned numbers of shape {shape}; give one number a completion")
        numbers = numbers.tolist()
    # A set has no order, a dict would be read as its keys, and text as its characters.
    if not isinstance(numbers, Sequence) or isinstance(numbers, TEXT):
        raise ValueError(
            f"reward function {label} returned {_shortened(numbers)} of type {type(numbers).__name__}, not a list of "
            "numbers; give one number a completion, in the order of completions"
        )
    if len(numbers) != len(told):
        raise ValueError(
            f"reward function {label} returned {len(numbers)} numbers for {len(told)} texts; give one number a "
            "completion, and None where it does not apply"
        )
    rewards = {}
    for place, number in enumerate(numbers):
        if getattr(number, "ndim", None) == 0 and hasattr(number, "item"):  # a NumPy scalar or a tensor
            number = number.item()
        if number is None:  # the function does not apply to this completion
            continue
        if not isinstance(number, Real) or not -FLOAT32_MAX <= number <= FLOAT32_MAX:  # type: ignore[operator]
            raise ValueError(
                f"reward function {label} returned {_shortened(number)} for completion {told[place]!r}; give a finite "
                "number, or None"
            )
        rewards[place] = float(number)
    return rewards


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
