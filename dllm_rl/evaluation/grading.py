"""Regrade stored completions from any source, by one protocol or by all of a task. Does not import torch."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dllm_rl.evaluation.results import (
    RATES,
    Evaluation,
    GradedAnswer,
    compared_with,
    headline,
    with_intervals,
)
from dllm_rl.tasks.base import Reward
from dllm_rl.tasks.protocols import PROTOCOLS, TABLE, find_grader, grade_all
from dllm_rl.tasks.rows import MissingField, load_rows, parse_rows, require_field

PROBLEM_TEXTS = ("prompt", "question", "problem")  # fields with the text of a problem
PROBLEM_IDS = ("problem_id", "question_id", "task_id", "id")


@dataclass(frozen=True)
class StoredCompletion:
    """A completion from a file, and its row with the fields that the task's graders read."""

    location: str  # file and line, for error messages
    row: dict[str, Any]
    completion: str
    given: tuple[str, ...]  # names of the fields in the file, for error messages

    def read_fields(self, task: str, protocol: str) -> dict[str, Any]:
        """Return the fields that the task's graders read. Raise ValueError if one is missing or malformed."""
        try:
            return TABLE[task].read_fields(self.row, protocol)
        except MissingField as error:
            raise MissingField(error.name, self.given) from None


@dataclass(frozen=True)
class GradedFile:
    """The completions of a file, the fields that their graders read, and their grades."""

    stored: Sequence[StoredCompletion]
    fields: Sequence[Mapping[str, Any]]
    rewards: Sequence[Reward]

    @cached_property
    def problems(self) -> list[int | str]:
        """What identifies each row's problem (see `_problem`); the number of the row if nothing does."""
        keys = [_problem(completion.row, fields) for completion, fields in zip(self.stored, self.fields, strict=True)]
        places = {
            location: place for place, location in enumerate(dict.fromkeys(each.location for each in self.stored))
        }
        return [places[each.location] if key is None else key for each, key in zip(self.stored, keys, strict=True)]

    def evaluation(self, problems: Sequence[int | str]) -> Evaluation:
        """Return the grades as an evaluation in which a problem has the number of its place in `problems`."""
        numbers = {problem: number for number, problem in enumerate(dict.fromkeys(problems))}
        pairs = zip(self.problems, self.rewards, strict=True)
        answers = (GradedAnswer(numbers[problem], place, reward) for place, (problem, reward) in enumerate(pairs))
        return Evaluation(tuple(answers), {})

    def rates(self) -> dict[str, Any]:
        """Return each of RATES and pass@k with its interval."""
        evaluation = self.evaluation(self.problems)
        sums = evaluation.sums
        rates = {name: sums[name] for name in (*RATES, headline(sums)) if name in sums}
        return with_intervals(rates | evaluation.pass_sums())

    def summary(self, task: str, protocol: str) -> dict[str, Any]:
        """Return what `grade_file` returns."""
        num_without_answer = sum(None in row_fields.values() for row_fields in self.fields)
        facts = {"task": task, "version": TABLE[task].task.version, "protocol": protocol, "n": len(self.rewards)}
        facts |= {"problems": len(set(self.problems))}
        facts |= {"no_answer": num_without_answer} if num_without_answer else {}
        return facts | self.rates()


def grade_file(path: str | Path, *, task: str, protocol: str = "strict") -> dict[str, Any]:
    """Grade the rows of a file of completions under one protocol.

    Rows of the same problem are its samples. A row's problem is the `problem` that `dllm-rl evaluate` stores or the
    `doc_id` of lm-evaluation-harness; else its `prompt`, `question` or `problem` together with the task's fields; else
    these fields, if they have more than the answer; else its `problem_id`, `question_id`, `task_id` or `id`; else each
    row is a problem.

    Args:
        path: File of completions, as for `read_completions`.
        task: Name of the task. Fields of a row: sudoku `puzzle`, `solution`; countdown `numbers`, `target`; gsm8k,
            math500 `answer` (null: graded wrong); code `prelude`, `entry_point`, `arguments` (the number of arguments),
            `tests`.
        protocol: Name of the protocol. Default: "strict".

    Returns:
        task, version, protocol, `n` completions, `problems`, `no_answer` (completions whose reference answer is null),
        and each of RATES with its 95 % interval [low, high]; with several samples per problem also pass@k.

    Raises:
        ValueError: The file has no rows, or a row is malformed: the message names file and line. Raised before grading.
    """
    return _read_and_grade(path, task, protocol).summary(task, protocol)


def _read_and_grade(path: str | Path, task: str, protocol: str) -> GradedFile:
    find_grader(task, protocol)
    stored = read_completions(path, task)
    # All rows before grading, so that a malformed row is reported without delay.
    rows = ((completion.location, completion) for completion in stored)
    fields = parse_rows(rows, lambda completion: completion.read_fields(task, protocol))
    prompts = [completion.row.get("prompt") for completion in stored]
    rewards = grade_all(task, protocol, fields, [completion.completion for completion in stored], prompts)
    return GradedFile(stored, fields, rewards)


def compare_files(path: str | Path, before: str | Path, *, task: str, protocol: str = "strict") -> dict[str, Any]:
    """Grade two files of completions of the same problems, and compare them problem by problem.

    Args:
        path: File of completions, as for `read_completions`. A row's problem is that of `grade_file`.
        before: Baseline file; its metrics are subtracted from those of `path`.
        task: Name of the task.
        protocol: Name of the protocol. Default: "strict".

    Returns:
        The fields of `grade_file` for `path`; `against`, the name of `before`; `problems_compared`, the number of
        problems that both files have; and `difference`, each metric's difference over these problems with its paired
        95 % interval [difference, low, high].

    Raises:
        ValueError: As for `grade_file`; or the files have no problem in common, or one problem number stands for
            different problems in the two files, or they differ in length and nothing says which problem a row has.
    """
    graded, baseline = (_read_and_grade(file, task, protocol) for file in (path, before))
    now, then = (
        dict(zip(each.problems, zip(each.fields, each.stored, strict=True), strict=True)) for each in (graded, baseline)
    )
    common = now.keys() & then.keys()
    if not common:
        raise ValueError(f"{path} and {before} have no problem in common")
    for problem in common:
        (fields_now, row), (fields_then, other_row) = now[problem], then[problem]
        if fields_now != fields_then:
            raise ValueError(
                f"{row.location} is a different problem from {other_row.location}; give files of the same problems"
            )
    if len(graded.stored) != len(baseline.stored):
        for completion, fields in zip(graded.stored, graded.fields, strict=True):
            if _problem(completion.row, fields) is None:
                raise ValueError(
                    f"{path} has {len(graded.stored)} completions and {before} has {len(baseline.stored)}, and nothing "
                    f"in {completion.location} says which problem it is; add the problem's text or number as question "
                    "or doc_id"
                )
    problems = graded.problems + baseline.problems
    evaluations = (each.evaluation(problems) for each in (graded, baseline))
    compared = compared_with(str(before), *evaluations) | {"problems_compared": len(common)}
    return graded.summary(task, protocol) | compared


def grade_by_every_protocol(path: str | Path, *, task: str) -> dict[str, Any]:
    """Grade the rows of a file by every protocol of the task.

    Call it to see how much of a published number depends on its parser.

    Args:
        path: File of completions, as for `read_completions`.
        task: Name of the task.

    Returns:
        task, version, n, problems;
        `protocols`: by name, the number of right rows (full reward) and each of RATES with its 95 % interval;
        `not_graded`: why a protocol could not grade these rows.

    Raises:
        ValueError: As for `grade_file` under strict.
    """
    find_grader(task, "strict")
    graded: dict[str, GradedFile] = {}
    not_graded: dict[str, str] = {}
    for protocol in PROTOCOLS[task]:
        try:
            graded[protocol] = _read_and_grade(path, task, protocol)
        except (ImportError, ValueError) as error:
            if protocol == "strict":
                raise
            not_graded[protocol] = str(error)
    rows: dict[str, dict[str, Any]] = {}
    for protocol, each in graded.items():
        num_right = sum(reward.value is not None and reward.value >= 1 for reward in each.rewards)
        rows[protocol] = {"right": num_right} | each.rates()
    problems = len(set(graded["strict"].problems))
    facts = {"task": task, "version": TABLE[task].task.version, "n": len(graded["strict"].rewards)}
    return facts | {"problems": problems, "protocols": rows, "not_graded": not_graded}


def read_completions(path: str | Path, task: str) -> list[StoredCompletion]:
    """Read the completions of a file and the fields that their graders need, under the task's names.

    A .jsonl file has one object per line: a row of this library, a sample of lm-evaluation-harness, or a row of any
    other source. A row of another source has `completion` and the task's fields. In place of these fields it may have
    one field `reference`, which holds the reference answer, or an object with the task's fields. `completion` may be a
    list of texts: the samples of a problem. A .json file has a list of such objects, or is a file of d1.

    Raises:
        ValueError: The file has no rows, or a row has no completion. The message names file and line.
    """
    if Path(path).suffix not in (".jsonl", ".json"):
        raise ValueError(f"{path} must be a .jsonl file (an object a line), or a .json file (a list of objects)")
    steps_and_rows: list[tuple[int, StoredCompletion]] = []
    first_filter = None
    for location, row in load_rows(path):
        first_filter = first_filter or row.get("filter")
        if "resps" in row and row.get("filter") != first_filter:
            continue  # lm-evaluation-harness writes a sample once for each of its filters
        if isinstance(start := row.get("resume_from"), int):
            # A resumed run repeats the steps from `start` on: drop their earlier rows.
            steps_and_rows = [earlier for earlier in steps_and_rows if earlier[0] < start]
            continue
        step = row["step"] if isinstance(row.get("step"), int) else -1
        try:
            fields = _with_our_names(row, task)
            texts = _texts(fields)
        except MissingField as error:
            raise ValueError(f"{location}: {MissingField(error.name, _names(row))}") from None
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from None
        steps_and_rows += [(step, StoredCompletion(location, fields, text, _names(row))) for text in texts]
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
        fields = doc | {name: row[name] for name in ("doc_id",) if name in row} | {"completion": resps}
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


def _names(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a row's fields in its file; those inside of `doc` or of a reference as "doc.question"."""
    is_lm_eval = isinstance(row.get("doc"), dict) and "resps" in row
    outer = ["resps"] if is_lm_eval else [name for name in row if name != "doc"]
    inner = ["doc"] if is_lm_eval else ["reference", "ground_truth"]
    inside = [f"{name}.{field}" for name in inner if isinstance(row.get(name), dict) for field in row[name]]
    return (*outer, *inside)


def _texts(fields: Mapping[str, Any]) -> list[str]:
    """Return the completions of a row: its `completion`, a text or a list of texts."""
    value = require_field(fields, "completion")
    texts = value if isinstance(value, list) else [value]
    wrong_types = {type(text).__name__ for text in texts if not isinstance(text, str)}
    if wrong_types or not texts:
        raise ValueError(
            f"completion must be text or a list of texts, not {' or '.join(sorted(wrong_types)) or 'empty'}"
        )
    return texts


def _problem(row: Mapping[str, Any], fields: Mapping[str, Any]) -> int | str | None:
    """Return what identifies a row's problem, as `grade_file` describes; None if nothing does."""
    evaluation = row.get("evaluation")
    number = evaluation.get("problem") if isinstance(evaluation, dict) else row.get("doc_id")
    if type(number) in (int, str):
        return number
    text = next((row[name] for name in PROBLEM_TEXTS if row.get(name)), None)
    if text is not None or "answer" not in fields:
        return json.dumps([text, fields], sort_keys=True)
    return next((row[name] for name in PROBLEM_IDS if type(row.get(name)) in (int, str)), None)
