"""Re-grading stored completions under a named protocol. No torch, and no text is ever evaluated."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dllm_rl.evaluation.intervals import bootstrap_mean, wilson
from dllm_rl.tasks.base import Reward
from dllm_rl.tasks.loading import load_rows
from dllm_rl.tasks.math.graders import reference_number
from dllm_rl.tasks.protocols import VERSIONS, find_grader
from dllm_rl.tasks.sudoku.grids import completions, is_completion


def grade_file(path: str | Path, *, task: str, protocol: str = "strict") -> dict[str, Any]:
    """Grades the rows of a JSONL file: `completion` and the task's fields.

    Fields: sudoku `puzzle`, `solution`; countdown `numbers`, `target`; gsm8k and math500 `answer`. Others are ignored.
    Returns the task, its version, the protocol, n, and the rates of summarise with 95 % intervals.
    Errors: ValueError naming file and line for the first malformed row, before anything is graded, and for no rows.
    """
    grader = find_grader(task, protocol)
    if Path(path).suffix != ".jsonl":
        raise ValueError(f"{path} must be a .jsonl file: one JSON object a line")
    rows = []
    for place, row in load_rows(path):
        try:
            rows.append((_FIELDS[task](row, protocol), _text(row, "completion")))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no rows")
    rewards = [grader(fields, completion) for fields, completion in rows]
    return {"task": task, "version": VERSIONS[task], "protocol": protocol, **summarise(rewards)}


def summarise(rewards: Sequence[Reward]) -> dict[str, Any]:
    """n, and for `parsed` and each rate of the breakdowns its mean and a 95 % interval, [low, high].

    accuracy, solve_rate, undecided (math-verify found no end) and parsed: proportions, with Wilson's interval.
    cell_accuracy: where cells were counted, all correct cells over all empty cells, else the mean over problems;
    bootstrap over problems, from a fixed seed.
    """
    n = len(rewards)
    shown: dict[str, Any] = {"n": n}
    rates: dict[str, list[float]] = {"parsed": [reward.parsed for reward in rewards]}
    rates |= {
        name: [reward.breakdown[name] for reward in rewards]
        for name in ("accuracy", "solve_rate", "undecided")
        if name in rewards[0].breakdown
    }
    for name, hits in rates.items():
        shown[name] = sum(hits) / n
        shown[f"{name}_interval"] = list(wilson(round(sum(hits)), n))
    if "cell_accuracy" in rewards[0].breakdown:
        counted = "empty_cells" in rewards[0].breakdown
        cells = [_cells(reward) if counted else (reward.breakdown["cell_accuracy"], 1.0) for reward in rewards]
        values, weights = zip(*[(value, weight) for value, weight in cells if weight] or [(0.0, 1.0)], strict=True)
        shown["cell_accuracy"] = sum(values) / sum(weights)
        interval = bootstrap_mean(values, np.random.default_rng(0), weights=weights)
        shown["cell_accuracy_interval"] = list(interval)
    return shown


def _cells(reward: Reward) -> tuple[float, float]:
    return reward.breakdown["correct_cells"], reward.breakdown["empty_cells"]


def _sudoku_fields(row: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    puzzle, solution = _text(row, "puzzle").replace(".", "0"), _text(row, "solution")
    if protocol != "strict" and len(puzzle) != 16:
        raise ValueError(f"puzzle={puzzle!r}: protocol {protocol} is for 4x4, 16 characters; use strict for 9x9")
    valid = completions(puzzle)
    if not is_completion(puzzle, solution):
        raise ValueError(f"solution={solution!r} does not complete puzzle={puzzle!r} by the rules")
    if protocol == "spg" and len(valid) > 1:
        raise ValueError(f"puzzle={puzzle!r} has {len(valid)} completions; protocol spg has unique ones only")
    return {"puzzle": puzzle, "solution": solution}


def _countdown_fields(row: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    numbers, target = _present(row, "numbers"), _present(row, "target")
    if not isinstance(numbers, list) or not numbers or not all(type(number) is int for number in numbers):
        raise ValueError(f"numbers={numbers!r} must be a list of integers")
    if type(target) is not int:
        raise ValueError(f"target={target!r} must be an integer")
    return {"numbers": numbers, "target": target}


def _gsm8k_fields(row: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    answer = _present(row, "answer")
    if type(answer) not in (str, int, float):
        raise ValueError(f"answer={answer!r} must be a number or a text")
    reference_number(answer)
    return {"answer": str(answer)}


def _math500_fields(row: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    answer = _present(row, "answer")
    if type(answer) not in (str, int, float) or not str(answer).strip():
        raise ValueError(f"answer={answer!r} must be a number or a text that is not empty")
    return {"answer": str(answer)}


def _text(row: Mapping[str, Any], name: str) -> str:
    value = _present(row, name)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {type(value).__name__}")
    return value


def _present(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise ValueError(f"no field {name!r}")
    return row[name]


_FIELDS = {
    "sudoku": _sudoku_fields,
    "countdown": _countdown_fields,
    "gsm8k": _gsm8k_fields,
    "math500": _math500_fields,
}
