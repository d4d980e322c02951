"""Grading stored completions again under a named protocol. No torch, and no text is ever evaluated."""

from pathlib import Path
from typing import Any

from dllm_rl.evaluation.results import Graded, sums_by_name, with_intervals
from dllm_rl.tasks.protocols import TABLE, find_grader, grade_all
from dllm_rl.tasks.rows import load_rows, text_of

RATES = ("parsed", "accuracy", "solve_rate", "undecided", "cell_accuracy")  # what is shown, where a grader has it


def grade_file(path: str | Path, *, task: str, protocol: str = "strict") -> dict[str, Any]:
    """Grade the rows of a JSONL file: `completion` and the task's fields; other fields are ignored.

    Fields: sudoku `puzzle`, `solution`; countdown `numbers`, `target`; gsm8k and math500 `answer` (null: graded wrong).
    Returns task, version, protocol, n, `no_answer` (rows with null), and each of RATES with its 95 % [low, high].
    Errors: ValueError naming file and line for the first malformed row, before anything is graded, and for no rows.
    """
    find_grader(task, protocol)
    entry = TABLE[task]
    if Path(path).suffix != ".jsonl":
        raise ValueError(f"{path} must be a .jsonl file: one JSON object a line")
    rows = []
    # All rows are read before any is graded: a broken line 900 must not cost the work on 899.
    for place, row in load_rows(path):
        try:
            rows.append((entry.read_fields(row, protocol), text_of(row, "completion")))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no rows")
    fields, completions = zip(*rows, strict=True)
    rewards = grade_all(task, protocol, fields, completions)
    sums = sums_by_name([Graded(i, 0, reward) for i, reward in enumerate(rewards)])  # each row is a problem
    facts = {"task": task, "version": entry.task.version, "protocol": protocol, "n": len(rewards)}
    without = sum(None in each.values() for each in fields)
    if without:
        facts["no_answer"] = without
    return facts | with_intervals({name: sums[name] for name in RATES if name in sums})
