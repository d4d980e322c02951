"""A reward whose calls cost money or hours: each text is paid for once, and a budget ends the run."""

import copy
import inspect
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import update_wrapper
from reprlib import repr as quote
from typing import Any

from dllm_rl.callbacks import Callback, RunControl
from dllm_rl.distributed.stop import run_exit_stack
from dllm_rl.files import write_text
from dllm_rl.identity import MAX_BITS
from dllm_rl.monitoring.json_lines import JsonLines, json_objects
from dllm_rl.records import Bound, describe
from dllm_rl.tasks.datasets import RewardFunction, finite_or_none, one_per_completion

MAX_DEPTH = 32  # of lists and dicts in each other


def check_json(name: str, value: Any, depth: int = 0) -> None:
    """Raise ValueError for an argument that JSON cannot hold exactly: two different ones would share one reward, or a
    resume would pay again for a known one.
    """
    is_long = isinstance(value, int) and value.bit_length() > MAX_BITS
    is_exact = not is_long and (type(value) is not float or math.isfinite(value))
    if depth < MAX_DEPTH and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, part in value.items():
            check_json(f"{name}[{key!r}]", part, depth + 1)
    elif depth < MAX_DEPTH and isinstance(value, list | tuple):
        for index, part in enumerate(value):
            check_json(f"{name}[{index}]", part, depth + 1)
    elif type(value) not in (str, int, float, bool, type(None)) or not is_exact:
        shown = f"of {value.bit_length()} bits" if is_long else quote(value)
        raise ValueError(
            f"Oracle: the column {name} has a value of type {type(value).__name__}, {shown}, and known texts are "
            "stored as JSON: give text, numbers, lists, or dicts with keys of text, such as array.tolist()"
        )


class Oracle(Callback):
    """A reward function that is expensive to call, such as a simulation or an assay.

    Wrap the function and pass the oracle to `grpo` in its place. In a recipe that you wrote yourself, pass the oracle
    to the training task and to `callbacks`, and `oracle.without_calls()` to the tasks of the evaluations.

        grpo(model, rows, Oracle(binding_energy, budget=5000))

    A call is one text that the function measures; the function is given texts in batches. Only training steps call it.
    The rehearsal and the evaluations give a known text its reward, and other texts none. Each call is written to
    oracle.jsonl in the run's folder before its reward is used, so that a resume calls no known text again, also after
    the process was killed. An exception ends the run without a further call.
    best.jsonl has the best texts. The metrics are oracle/calls, oracle/frac_repeated (share of the step's texts without
    a call), oracle/best, and oracle/top (mean of the best). A completion without a reward of the oracle, as after a
    failed measurement or beyond the budget, is skipped whatever other reward functions return. `grpo` sets no
    `reward_timeout`, which would limit all calls of a step together, and saves each step, since a repeated one may
    sample other texts: in a recipe of your own, set limits=Limits(reward_timeout=None) and
    saves=Saves(steps=1).

    Repeated texts cost no call, but they teach little. `novelty` is a second reward function, against them:

        grpo(model, rows, [oracle, oracle.novelty], reward_weights=[1.0, 0.05])

    Args:
        function: Reward function, f(completions, column, ...) -> a number or None per completion; not async. None,
            not a substitute, says that a measurement failed: it counts as a call, and the text is called again when it
            is sampled again. A text that the function rejects without a measurement is a call too: return a low number
            for it. A text is known if all arguments that the function names are the same.
        budget: Number of calls. The run then ends with a checkpoint, which a larger budget continues. None (default):
            no limit.
        cache: Whether a known text gets the reward of its first call. False: each text is called again, also by a
            resume. Default: True.
        top_k: Number of texts in best.jsonl. Default: 10.
        batch_size: Largest number of texts in a batch, such as a plate's. What raises, or is killed, loses its whole
            batch. Default: 1.

    Raises:
        ValueError: The function is async, is not a function, or accepts `**columns`, whatever it reads of them; or a
            number is below 1.
    """

    graded_once = True  # after an exception the texts are not graded again one by one
    check_argument = staticmethod(check_json)  # a task calls it for each value of the columns that the function names
    required = True  # a text without a number has no reward, whatever other functions return

    def __init__(
        self,
        function: RewardFunction,
        *,
        budget: int | None = None,
        cache: bool = True,
        top_k: int = 10,
        batch_size: int = 1,
    ) -> None:
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise ValueError(f"function={describe(function)} of Oracle must be a function that is not async")
        self.__wrapped__ = function  # a task passes what it accepts, and a resume compares its code
        if any(each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values()):
            raise ValueError(
                f"function={describe(function)} of Oracle accepts every column, and would be paid again for a known "
                "text of another prompt: name the columns that it reads, as in score(completions)"
            )
        for name, value in {"budget": budget, "top_k": top_k, "batch_size": batch_size}.items():
            Bound(at_least=1).check(name, value)
        self.function, self.cache, self.top_k, self.batch_size = function, cache, top_k, batch_size
        self.budget = budget
        self.calls = 0  # texts that the run has called the function for
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self._known: dict[str, float] = {}  # reward by the arguments, as JSON
        self._first_step: dict[str, int] = {}  # step that measured it first
        self._asked = self._repeated = 0  # texts since the last step
        self._run: RunControl | None = None
        self._log: JsonLines | None = None  # None: the function is not called

    def __repr__(self) -> str:
        return f"Oracle({describe(self.function)})"  # without the numbers, which a resume may change

    def without_calls(self) -> "Oracle":
        """Return a reward function that gives the texts known to this oracle their rewards, and other texts none."""
        reader = copy.copy(self)  # what is known is shared
        reader._log = None
        return reader

    @property
    def novelty(self) -> RewardFunction:
        """Reward function of how new a text is: 0 if an earlier step measured it, else 1 / its copies in the batch.

        The copies share one reward (fitness sharing, Goldberg and Richardson 1987), so that the mean over a step is the
        share of new texts. A repeated step, as after a kill, gives the same numbers.
        """

        def novelty(**arguments: Sequence[Any]) -> list[float]:
            keys = _rows_and_keys(arguments)[1]
            copies, step = Counter(keys), 0 if self._run is None else self._run.step
            return [0.0 if self._first_step.get(key, step) < step else 1 / copies[key] for key in keys]

        return update_wrapper(novelty, self.function, assigned=(), updated=())  # it accepts the same arguments

    def __call__(self, **arguments: Any) -> list[float | None]:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError("Oracle counts the calls of one process: start the run without a launcher")
        rows, keys = _rows_and_keys(arguments)
        fresh: dict[int, float | None] = {}
        if self._log is not None:
            to_call = [*range(len(rows))]
            if self.cache:
                first = {key: index for index, key in reversed([*enumerate(keys)])}
                to_call = sorted(index for key, index in first.items() if key not in self._known)
            to_call = to_call[: None if self.budget is None else max(0, self.budget - self.calls)]
            for start in range(0, len(to_call), self.batch_size):
                batch = to_call[start : start + self.batch_size]
                fresh |= zip(batch, self._call([rows[i] for i in batch], [keys[i] for i in batch]), strict=True)
            self._asked += len(rows)
            self._repeated += len(rows) - len(to_call)
        return [fresh.get(index, self._known.get(key)) for index, key in enumerate(keys)]

    def _call(self, rows: list[dict[str, Any]], keys: list[str]) -> list[float | None]:
        """Call the function, and store the rewards on disk before they are used."""
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        try:
            returned = self.function(**columns)
        except Exception as error:
            raise RuntimeError(f"{self.__name__} raised {error!r} on {', '.join(keys)}") from error
        rewards: list[float | None] = []
        refused: ValueError | None = None
        assert self._log is not None and self._run is not None, "`on_start` sets both"
        for key, number in zip(keys, one_per_completion(self.__name__, returned, keys), strict=True):
            try:
                reward = finite_or_none(self.__name__, number, key)
            except ValueError as error:  # raised when the others, which are paid for, are stored
                refused = refused or error
                continue
            rewards.append(reward)
            self._log.append({"step": self._run.step, "reward": reward, "arguments": json.loads(key)})
            self._remember(key, reward, self._run.step)
        self._log.flush()
        self.calls += len(rewards)
        if refused:
            raise refused
        return rewards

    def _remember(self, key: str, reward: float | None, step: int) -> None:
        if reward is not None:  # None is not a measurement: the text is called again
            self._known[key] = reward
            self._first_step.setdefault(key, step)

    def on_start(self, run: RunControl) -> None:
        """Read the calls of a resumed run; from now on the function is called."""
        path = run.directory / "oracle.jsonl"
        self._run, self._log, self.calls = run, JsonLines(path, start=run.step), 0
        run_exit_stack().callback(self._close)  # also after an error: the next run's rehearsal calls nothing
        self._known.clear()
        self._first_step.clear()
        for row in json_objects(path):
            if "arguments" in row:
                self._remember(json.dumps(row["arguments"], sort_keys=True), row["reward"], row["step"])
                self.calls += 1

    def load_state(self, state: dict[str, Any]) -> None:
        if state["calls"] > self.calls:
            raise ValueError(
                f"oracle.jsonl of this output_dir has {self.calls} of the {state['calls']} calls that the checkpoint's "
                "run paid for: copy that run's oracle.jsonl there"
            )
        self._stop_if_spent(state["calls"])  # of the checkpoint: a killed step is repeated with the rewards it paid for

    def state(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def on_step(self, run: RunControl, metrics: Mapping[str, float]) -> dict[str, float]:
        rewards = self._known
        best = sorted(rewards, key=rewards.__getitem__, reverse=True)[: self.top_k]
        lines = [json.dumps({"reward": rewards[key], "arguments": json.loads(key)}) + "\n" for key in best]
        write_text(run.directory / "best.jsonl", "".join(lines))
        self._stop_if_spent(self.calls)
        logged = {"oracle/calls": float(self.calls), "oracle/frac_repeated": self._repeated / max(1, self._asked)}
        self._asked = self._repeated = 0
        if best:
            top = math.fsum(rewards[key] for key in best) / len(best)
            logged |= {"oracle/best": rewards[best[0]], "oracle/top": top}
        return logged

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()
        self._log = None

    def _stop_if_spent(self, calls: int) -> None:
        if self._run is not None and self.budget is not None and calls >= self.budget:
            self._run.stop(f"the budget of {self.budget} calls of {self.__name__} is spent; a larger one continues")


def _rows_and_keys(arguments: Mapping[str, Sequence[Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return each text's arguments, also as JSON."""
    rows = [dict(zip(arguments, values, strict=True)) for values in zip(*arguments.values(), strict=True)]
    for row in rows:
        for name, value in row.items():
            check_json(name, value)
    return rows, [json.dumps(row, sort_keys=True) for row in rows]
