"""Regrading of stored completions from any source, by one protocol or by every rule that a task has. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from dllm_rl.evaluation.results import RATES, Graded, headline, sums_by_name, with_intervals
from dllm_rl.tasks.base import Reward
from dllm_rl.tasks.protocols import PROTOCOLS, TABLE, find_grader, grade_all
from dllm_rl.tasks.rows import load_rows, text_of

MOST_IDS = 5  # ids shown of rows that two rules grade differently
LONGEST_ID = 40  # characters


@dataclass(frozen=True)
class StoredCompletion:
    """A completion of a file, with the fields that its task's graders read."""

    place: str  # file and line, for errors
    id: str
    row: Mapping[str, Any]
    completion: str


def grade_file(path: str | Path, *, task: str, protocol: str = "strict") -> dict[str, Any]:
    """Grade the rows of a file of completions under one protocol.

    Args:
        path: File of completions, as for `read_completions`.
        task: Name of the task. Fields of a row: sudoku `puzzle`, `solution`; countdown `numbers`, `target`; gsm8k,
            math500 `answer` (null: graded wrong); code `prelude`, `entry_point`, `arguments` (their number), `tests`.
        protocol: Name of the protocol. Default: "strict".

    Returns:
        task, version, protocol, n, `no_answer` (rows with null), and each of RATES with its 95 % interval [low, high].

    Raises:
        ValueError: The file has no rows, or a row is malformed. The message names file and line, before any grading.
    """
    find_grader(task, protocol)
    stored = read_completions(path, task)
    fields = _fields(stored, task, protocol)
    rewards = grade_all(task, protocol, fields, [each.completion for each in stored])
    without = sum(None in each.values() for each in fields)
    facts = {"task": task, "version": TABLE[task].task.version, "protocol": protocol, "n": len(rewards)}
    return facts | ({"no_answer": without} if without else {}) | _rates(rewards)


def grade_by_every_rule(path: str | Path, *, task: str) -> dict[str, Any]:
    """Grade the rows of a file under every protocol of the task, and under `strict` with every reading of the answer.

    Call it to see how much of a published number depends on its parser. A reading (see `answers.readings`) is left out
    if no completion has it.

    Args:
        path: File of completions, as for `read_completions`.
        task: Name of the task.

    Returns:
        task, version, n; `rules`: by name, the number of right rows (full marks) and each of RATES with its 95 %
        interval [low, high]; `differences`: for each two sets of rules that disagree, the number of rows, the number of
        these rows in which only the first is right, and a few ids; `not_graded`: why a protocol could not grade these
        rows.

    Raises:
        ValueError: As for `grade_file` under strict.
    """
    find_grader(task, "strict")
    stored = read_completions(path, task)
    completions = [each.completion for each in stored]
    rewards: dict[str, Sequence[Reward]] = {}
    not_graded: dict[str, str] = {}
    for protocol, grader in PROTOCOLS[task].items():
        same = next((name for name in rewards if PROTOCOLS[task][name] is grader), None)
        try:
            find_grader(task, protocol)
            fields = _fields(stored, task, protocol)
        except (ImportError, ValueError) as error:
            if protocol == "strict":
                raise
            not_graded[protocol] = str(error)
            continue
        rewards[protocol] = rewards[same] if same else grade_all(task, protocol, fields, completions)
    fields = _fields(stored, task, "strict")
    for name, reading in TABLE[task].readings.items():
        answers = [reading(text) for text in completions]
        if any(answer is not None for answer in answers):
            texts = ["" if answer is None else f"<answer>{answer}</answer>" for answer in answers]
            rewards[name] = grade_all(task, "strict", fields, texts)
    right = {name: [reward.value >= 1 for reward in graded] for name, graded in rewards.items()}
    return {
        "task": task,
        "version": TABLE[task].task.version,
        "n": len(stored),
        "rules": {name: {"right": sum(right[name])} | _rates(graded) for name, graded in rewards.items()},
        "differences": _differences(right, [each.id for each in stored]),
        "not_graded": not_graded,
    }


def _differences(right: Mapping[str, list[bool]], ids: Sequence[str]) -> list[dict[str, Any]]:
    """Return the pairs of verdicts that differ, sorted by their number of rows; rules that agree on every row count as
    one.
    """
    agreeing: dict[tuple[bool, ...], list[str]] = {}
    for name, verdicts in right.items():
        agreeing.setdefault(tuple(verdicts), []).append(name)
    found = []
    for (first, names), (second, others) in combinations(agreeing.items(), 2):
        rows = [i for i in range(len(ids)) if first[i] != second[i]]
        some = [ids[i] for i in rows[:MOST_IDS]]
        only = sum(first[i] for i in rows)
        found.append({"rules": [names, others], "rows": len(rows), "only_first": only, "ids": some})
    return sorted(found, key=lambda each: -each["rows"])


def read_completions(path: str | Path, task: str) -> list[StoredCompletion]:
    """Read the completions of a file and the fields that their graders need, under the task's names.

    A .jsonl file has one object per line: this library's rows; rows of any source with `completion` and the task's
    fields, or these fields as one `reference`; or samples of lm-evaluation-harness. A .json file has a list of such
    objects, or is a file of d1.

    Raises:
        ValueError: The file has no rows, or a row has no completion. The message names file and line.
    """
    if Path(path).suffix not in (".jsonl", ".json"):
        raise ValueError(f"{path} must be a .jsonl file (an object a line), or a .json file (a list of objects)")
    found: list[tuple[int, StoredCompletion]] = []
    for place, row in load_rows(path):
        if isinstance(start := row.get("resume_from"), int):  # a resumed run repeats the steps from here on
            found = [known for known in found if known[0] < start]
            continue
        step = row["step"] if isinstance(row.get("step"), int) else -1
        try:
            named = _named(row, task)
            stored = StoredCompletion(
                place, _id(row, place.removeprefix(f"{path}, ")), named, text_of(named, "completion")
            )
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        found.append((step, stored))
    if not found:
        raise ValueError(f"{path} holds no rows")
    return [stored for _, stored in found]


def _named(row: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the row with this package's names of the completion and the reference."""
    names = dict(row)
    if isinstance(doc := row.get("doc"), dict) and "resps" in row:  # lm-evaluation-harness, whose `target` is a text
        resps = row["resps"]
        while isinstance(resps, list) and len(resps) == 1:
            resps = resps[0]
        if not isinstance(resps, str):
            raise ValueError("resps holds several texts; write a row for each")
        names = doc | {"completion": resps}
    elif "completion" not in row and "generations" in row:  # a row of d1
        names["completion"] = row["generations"]
    known = [name for name in ("reference", "ground_truth") if name in names]
    if not known:
        return names
    reference = names[known[0]]
    if isinstance(reference, dict):
        return reference | names
    if task == "countdown" and isinstance(reference, list) and len(reference) == 2:
        return {"numbers": reference[0], "target": reference[1]} | names
    if task == "sudoku":
        digits = re.search(r"(?<!\d)(?:\d{81}|\d{16})(?!\d)", str(names.get("question", "")))
        return {"solution": reference} | ({"puzzle": digits[0]} if digits else {}) | names
    return {"answer": reference} | names


def _id(row: Mapping[str, Any], place: str) -> str:
    made = row.get("evaluation")
    if isinstance(made, dict) and "problem" in made:
        return f"{made['problem']}.{made.get('sample')}"[:LONGEST_ID]
    return next((str(row[name])[:LONGEST_ID] for name in ("id", "doc_id") if name in row), place)


def _fields(stored: Sequence[StoredCompletion], task: str, protocol: str) -> list[dict[str, Any]]:
    """Read the fields of all rows before any row is graded: a broken line 900 must not waste the work on 899 rows."""
    fields = []
    for each in stored:
        try:
            fields.append(TABLE[task].read_fields(each.row, protocol))
        except ValueError as error:
            raise ValueError(f"{each.place}: {error}") from None
    return fields


def _rates(rewards: Sequence[Reward]) -> dict[str, Any]:
    sums = sums_by_name([Graded(i, 0, reward) for i, reward in enumerate(rewards)])  # each row counts as a problem
    return with_intervals({name: sums[name] for name in (*RATES, headline(sums)) if name in sums})
