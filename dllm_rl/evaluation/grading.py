"""Regrade stored completions from any source, by one protocol or by all rules of a task. Does not import torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from dllm_rl.evaluation.results import (
    RATES,
    Evaluation,
    GradedAnswer,
    compared_with,
    headline,
    sums_by_name,
    with_intervals,
)
from dllm_rl.tasks.base import Reward
from dllm_rl.tasks.protocols import PROTOCOLS, TABLE, find_grader, grade_all
from dllm_rl.tasks.rows import load_rows, text_of

MAX_IDS = 5  # maximum number of ids shown for each two sets of rules that disagree
MAX_ID_LENGTH = 40  # in characters; a longer id is cut


@dataclass(frozen=True)
class StoredCompletion:
    """A completion from a file, and its row with the fields that the task's graders read."""

    location: str  # file and line, for error messages
    id: str
    problem: int | None  # None: the row has no number of its problem
    row: Mapping[str, Any]
    completion: str


def grade_file(path: str | Path, *, task: str, protocol: str = "strict") -> dict[str, Any]:
    """Grade the rows of a file of completions under one protocol.

    Args:
        path: File of completions, as for `read_completions`.
        task: Name of the task. Fields of a row: sudoku `puzzle`, `solution`; countdown `numbers`, `target`; gsm8k,
            math500 `answer` (null: graded wrong); code `prelude`, `entry_point`, `arguments` (the number of arguments),
            `tests`.
        protocol: Name of the protocol. Default: "strict".

    Returns:
        task, version, protocol, n, `no_answer` (rows whose reference answer is null), and each of RATES with its 95 %
        interval [low, high].

    Raises:
        ValueError: The file has no rows, or a row is malformed: the message names file and line. Raised before grading.
    """
    return _summary(*_read_and_grade(path, task, protocol), task, protocol)


def _read_and_grade(
    path: str | Path, task: str, protocol: str
) -> tuple[list[StoredCompletion], list[dict[str, Any]], list[Reward]]:
    find_grader(task, protocol)
    stored = read_completions(path, task)
    fields = _fields(stored, task, protocol)
    return stored, fields, grade_all(task, protocol, fields, [completion.completion for completion in stored])


def _summary(
    stored: list[StoredCompletion], fields: list[dict[str, Any]], rewards: list[Reward], task: str, protocol: str
) -> dict[str, Any]:
    num_without_answer = sum(None in row_fields.values() for row_fields in fields)
    facts = {"task": task, "version": TABLE[task].task.version, "protocol": protocol, "n": len(rewards)}
    facts |= {"no_answer": num_without_answer} if num_without_answer else {}
    return facts | _rates_with_intervals(stored, rewards)


def compare_files(path: str | Path, before: str | Path, *, task: str, protocol: str = "strict") -> dict[str, Any]:
    """Grade two files of completions of the same problems, and compare them problem by problem.

    A row's problem is the `problem` that `dllm-rl evaluate` stores or the `doc_id` of lm-evaluation-harness, else its
    number in the file.

    Args:
        path: File of completions, as for `read_completions`.
        before: Baseline file; its metrics are subtracted from those of `path`.
        task: Name of the task.
        protocol: Name of the protocol. Default: "strict".

    Returns:
        The fields of `grade_file` for `path`; `against`, the name of `before`; and `difference`, each metric's
        difference with its paired 95 % interval [difference, low, high], over the problems that both files have.

    Raises:
        ValueError: As for `grade_file`; or the files have no problem in common, or one problem number stands for
            different problems in the two files.
    """
    graded = [_read_and_grade(file, task, protocol) for file in (path, before)]
    evaluations = [Evaluation(_answers(stored, rewards), {}) for stored, _, rewards in graded]
    now, then = (
        dict(zip(_problems(stored), zip(fields, stored, strict=True), strict=True)) for stored, fields, _ in graded
    )
    if not now.keys() & then.keys():
        raise ValueError(f"{path} and {before} have no problem in common")
    for number in now.keys() & then.keys():
        (fields_now, row), (fields_then, other_row) = now[number], then[number]
        if fields_now != fields_then:
            raise ValueError(
                f"{row.location} is a different problem from {other_row.location}; give files of the same problems"
            )
    return _summary(*graded[0], task, protocol) | compared_with(str(before), *evaluations)


def _problems(stored: Sequence[StoredCompletion]) -> list[int]:
    """Return the number of each row's problem, or of the row if it has none."""
    return [place if row.problem is None else row.problem for place, row in enumerate(stored)]


def _answers(stored: Sequence[StoredCompletion], rewards: Sequence[Reward]) -> tuple[GradedAnswer, ...]:
    numbered = zip(_problems(stored), rewards, strict=True)
    return tuple(GradedAnswer(problem, place, reward) for place, (problem, reward) in enumerate(numbered))


def grade_by_every_rule(path: str | Path, *, task: str) -> dict[str, Any]:
    """Grade the rows of a file by every rule: every protocol of the task, and `strict` with every extractor.

    Call it to see how much of a published number depends on its parser. An extractor is a function that extracts the
    answer from a completion, which `strict` then grades (see `answers.extractors`). Extractors that find no answer in
    any completion are left out.

    Args:
        path: File of completions, as for `read_completions`.
        task: Name of the task.

    Returns:
        task, version, n;
        `rules`: by name, the number of right rows (full reward) and each of RATES with its 95 % interval [low, high];
        `differences`: rules that agree on every row form a set, so that any two sets disagree on some rows; for each
        two sets, the number of these rows, the number of those that only the first set grades as right, and the ids
        of a few;
        `not_graded`: why a protocol could not grade these rows.

    Raises:
        ValueError: As for `grade_file` under strict.
    """
    find_grader(task, "strict")
    stored = read_completions(path, task)
    completions = [row.completion for row in stored]
    rewards: dict[str, Sequence[Reward]] = {}
    not_graded: dict[str, str] = {}
    for protocol, grader in PROTOCOLS[task].items():
        same_grader = next((name for name in rewards if PROTOCOLS[task][name] is grader), None)
        try:
            find_grader(task, protocol)
            fields = _fields(stored, task, protocol)
        except (ImportError, ValueError) as error:
            if protocol == "strict":
                raise
            not_graded[protocol] = str(error)
            continue
        rewards[protocol] = rewards[same_grader] if same_grader else grade_all(task, protocol, fields, completions)
    fields = _fields(stored, task, "strict")
    for name, extract in TABLE[task].extractors.items():
        answers = [extract(text) for text in completions]
        if any(answer is not None for answer in answers):
            texts = ["" if answer is None else f"<answer>{answer}</answer>" for answer in answers]
            rewards[name] = grade_all(task, "strict", fields, texts)
    is_right = {name: [reward.value >= 1 for reward in graded] for name, graded in rewards.items()}
    return {
        "task": task,
        "version": TABLE[task].task.version,
        "n": len(stored),
        "rules": {
            name: {"right": sum(is_right[name])} | _rates_with_intervals(stored, graded)
            for name, graded in rewards.items()
        },
        "differences": _differences(is_right, [row.id for row in stored]),
        "not_graded": not_graded,
    }


def _differences(is_right: Mapping[str, list[bool]], ids: Sequence[str]) -> list[dict[str, Any]]:
    """Return which sets of rules disagree and on how many rows, sorted by this number, largest first.

    Rules that agree on every row form one set.
    """
    rules_by_verdicts: dict[tuple[bool, ...], list[str]] = {}
    for name, verdicts in is_right.items():
        rules_by_verdicts.setdefault(tuple(verdicts), []).append(name)
    differences = []
    for (first, names), (second, other_names) in combinations(rules_by_verdicts.items(), 2):
        rows = [i for i in range(len(ids)) if first[i] != second[i]]
        ids_shown = [ids[i] for i in rows[:MAX_IDS]]
        num_only_first = sum(first[i] for i in rows)
        differences.append(
            {"rules": [names, other_names], "rows": len(rows), "only_first": num_only_first, "ids": ids_shown}
        )
    return sorted(differences, key=lambda difference: -difference["rows"])


def read_completions(path: str | Path, task: str) -> list[StoredCompletion]:
    """Read the completions of a file and the fields that their graders need, under the task's names.

    A .jsonl file has one object per line: a row of this library, a sample of lm-evaluation-harness, or a row of any
    other source. A row of another source has `completion` and the task's fields. In place of these fields it may have
    one field `reference`, which holds the reference answer, or an object with the task's fields. A .json file has a
    list of such objects, or is a file of d1.

    Raises:
        ValueError: The file has no rows, or a row has no completion. The message names file and line.
    """
    if Path(path).suffix not in (".jsonl", ".json"):
        raise ValueError(f"{path} must be a .jsonl file (an object a line), or a .json file (a list of objects)")
    steps_and_rows: list[tuple[int, StoredCompletion]] = []
    for location, row in load_rows(path):
        if isinstance(start := row.get("resume_from"), int):
            # A resumed run repeats the steps from `start` on: drop their earlier rows.
            steps_and_rows = [earlier for earlier in steps_and_rows if earlier[0] < start]
            continue
        step = row["step"] if isinstance(row.get("step"), int) else -1
        try:
            fields = _with_our_names(row, task)
            row_id = _id(row, location.removeprefix(f"{path}, "))
            stored = StoredCompletion(location, row_id, _problem(row), fields, text_of(fields, "completion"))
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from None
        steps_and_rows.append((step, stored))
    if not steps_and_rows:
        raise ValueError(f"{path} has no rows")
    return [stored for _, stored in steps_and_rows]


def _with_our_names(row: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the row's fields under this library's names for the completion and the reference answer."""
    fields = dict(row)
    if isinstance(doc := row.get("doc"), dict) and "resps" in row:
        # A sample of lm-evaluation-harness. `doc` has the fields of the problem. The sample's own `target` is not used:
        # it is a rendered text, not a field of the task.
        resps = row["resps"]
        while isinstance(resps, list) and len(resps) == 1:
            resps = resps[0]
        if not isinstance(resps, str):
            raise ValueError("resps has several texts; write a row for each")
        fields = doc | {"completion": resps}
    elif "completion" not in row and "generations" in row:  # a row of d1
        fields["completion"] = row["generations"]
    reference_names = [name for name in ("reference", "ground_truth") if name in fields]
    if not reference_names:
        return fields
    reference = fields[reference_names[0]]
    if isinstance(reference, dict):
        return reference | fields
    if task == "countdown" and isinstance(reference, list) and len(reference) == 2:
        return {"numbers": reference[0], "target": reference[1]} | fields
    if task == "sudoku":
        digits = re.search(r"(?<!\d)(?:\d{81}|\d{16})(?!\d)", str(fields.get("question", "")))
        return {"solution": reference} | ({"puzzle": digits[0]} if digits else {}) | fields
    return {"answer": reference} | fields


def _id(row: Mapping[str, Any], default: str) -> str:
    """Return a readable id of a row: PROBLEM.SAMPLE, else its `id` or `doc_id`, else the default."""
    evaluation = row.get("evaluation")
    if isinstance(evaluation, dict) and "problem" in evaluation:
        return f"{evaluation['problem']}.{evaluation.get('sample')}"[:MAX_ID_LENGTH]
    return next((str(row[name])[:MAX_ID_LENGTH] for name in ("id", "doc_id") if name in row), default)


def _problem(row: Mapping[str, Any]) -> int | None:
    """Return the number of a row's problem, as `dllm-rl evaluate` or lm-evaluation-harness stores it."""
    evaluation = row.get("evaluation")
    number = evaluation.get("problem") if isinstance(evaluation, dict) else row.get("doc_id")
    return number if type(number) is int else None


def _fields(stored: Sequence[StoredCompletion], task: str, protocol: str) -> list[dict[str, Any]]:
    """Read the fields of all rows before grading, so that a malformed row is reported without delay."""
    fields = []
    for completion in stored:
        try:
            fields.append(TABLE[task].read_fields(completion.row, protocol))
        except ValueError as error:
            raise ValueError(f"{completion.location}: {error}") from None
    return fields


def _rates_with_intervals(stored: Sequence[StoredCompletion], rewards: Sequence[Reward]) -> dict[str, Any]:
    sums = sums_by_name(_answers(stored, rewards))
    return with_intervals({name: sums[name] for name in (*RATES, headline(sums)) if name in sums})
