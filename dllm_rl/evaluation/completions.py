"""Stored completions: a JSONL file that grows during an evaluation, survives a kill, and can be graded again.

A row has `prompt`, `completion` and the problem's fields. Under `evaluation` it has the settings that made the row, and
`reward` and its `parts` under the latest `protocol`. Each process appends to NAME.partN.jsonl; at the beginning and at
the end of an evaluation, the parts are merged into NAME.jsonl.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_rl.distributed.collectives import Processes
from dllm_rl.evaluation.results import Graded
from dllm_rl.files import replacing, to_disk
from dllm_rl.members import same_setting
from dllm_rl.models.base import Policy
from dllm_rl.quantization.linear import dequantize_packed, is_packed
from dllm_rl.tasks.base import Problem, parts
from dllm_rl.tasks.rows import load_rows

COSTS = ("tokens", "forwards", "seconds", "steps")
Key = tuple[int, int]  # (problem, sample)
Row = dict[str, Any]
Rows = dict[Key, Row]


class Completions:
    """The rows of the file and of this process's part. Without a path nothing is stored.

    Raises:
        ValueError: The stored rows were made with other settings than `made_with`.
    """

    def __init__(self, path: Path | None, made_with: Mapping[str, Any], accelerator: Processes) -> None:
        self.path = path
        self.accelerator = accelerator
        self.rows: Rows = {}
        if path is not None:
            self.fold()  # parts of a killed run count as stored, whatever its number of processes
            self.rows = read(path)
            self.part = path.with_name(f"{path.stem}.part{accelerator.process_index}.jsonl")
            for row in self.rows.values():
                if "steps" not in row["evaluation"]:
                    older = "holds completions without `steps`, of an older version"
                    raise ValueError(f"{path} {older}; give another output_dir")
                check_types(path, row)
                for name, value in made_with.items():  # facts that old and new rows must share: weights, seed, sampler
                    before = row["evaluation"].get(name)
                    if not same_setting(before, value):
                        made = f"made with {name}={before}, not {value}"
                        raise ValueError(f"{path} holds completions {made}; give another output_dir")

    def held(self, keys: Iterable[Key], problems: Mapping[int, Problem]) -> Rows:
        """Return the stored rows of `keys`.

        Raises:
            ValueError: A row belongs to another problem.
        """
        rows = {key: self.rows[key] for key in keys if key in self.rows}
        for key, row in rows.items():
            # Through JSON, like the stored row: a tuple becomes a list.
            now = json.loads(json.dumps(make_row(problems[key[0]], row["completion"], row["evaluation"])))
            for name, value in now.items():
                if value != row.get(name):
                    differs = f"its {name} is {row.get(name)!r}, the task's is {value!r}"
                    raise ValueError(f"{self.path} holds another problem {key[0]}: {differs}; give another output_dir")
        return rows

    def append(self, rows: Rows) -> None:
        """Append the rows that are not stored yet to this process's part. They are on disk when it returns."""
        if self.path is not None:
            with self.part.open("a", encoding="utf-8") as file:
                for key, row in rows.items():
                    if key not in self.rows:
                        file.write(_line(row))
                to_disk(file)

    def fold(self, answers: Sequence[Graded] = (), protocol: str = "") -> None:
        if self.path is not None:
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                fold(self.path, answers, protocol)
            self.accelerator.wait_for_everyone()


def check_types(path: Path, row: Row) -> None:
    """Raise ValueError on a stored row whose completion is not a text, or whose costs are not numbers."""
    made = row["evaluation"]
    odd = [] if isinstance(row.get("completion"), str) else ["completion"]
    # NaN fails too, and so do integers beyond all floats, which JSON can contain
    odd += [name for name in COSTS if type(made.get(name)) not in (int, float) or not 0 <= made[name] < 1e30]
    if odd:
        raise ValueError(f"{path} is damaged: {odd[0]} is missing, or of another type; give another output_dir")


def make_row(problem: Problem, completion: str, evaluation: Mapping[str, Any]) -> Row:
    """Return a row of the file.

    Raises:
        ValueError: A field of the problem has a name that rows need.
    """
    own: Row = {} if problem.blank is None else {"blank": problem.blank}
    own |= {"prompt": problem.prompt, "completion": completion, "evaluation": dict(evaluation)}
    for name in problem.fields:
        if name in own:
            raise ValueError(f"field {name!r} of the problem has a name that stored completions need; rename it")
    return {**problem.fields, **own}


def fold(path: Path, answers: Sequence[Graded] = (), protocol: str = "") -> None:
    """Merge the file, its parts and the grades into one file, sorted by problem and sample. Atomic: a kill loses
    nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = sorted(path.parent.glob(f"{path.stem}.part*.jsonl"))
    if not pieces and not answers:
        return
    rows = read(path)
    for part in pieces:
        with part.open("rb+") as file:
            # A killed process may have left half of a last line.
            file.truncate(file.read().rfind(b"\n") + 1)
        rows |= read(part)
    for answer in answers:
        grades = {"protocol": protocol, "reward": float(answer.reward.value), "parts": parts(answer.reward)}
        rows[answer.problem, answer.sample]["evaluation"] |= grades
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for key in sorted(rows):
            file.write(_line(rows[key]))
    for part in pieces:  # last: a kill before this leaves duplicate rows, which the next fold merges
        part.unlink()


def read(path: Path) -> Rows:
    """Return the file's rows by (problem, sample), and {} without a file.

    Raises:
        ValueError: A line is malformed. The message names the line.
    """
    rows = {}
    for place, row in load_rows(path) if path.exists() else ():
        try:
            rows[int(row["evaluation"]["problem"]), int(row["evaluation"]["sample"])] = row
        except (KeyError, TypeError, ValueError, OverflowError):  # OverflowError: JSON has numbers beyond all floats
            raise ValueError(f"{place}: not a stored completion (no evaluation.problem, evaluation.sample)") from None
    return rows


def fingerprint(policy: Policy) -> str:
    """Return sixteen hex digits that identify the weights, from each layer's kind and each parameter's first 1024
    numbers.
    """
    digest = hashlib.sha256()
    # The kinds distinguish a quantized copy, whose first numbers may be the same.
    for name, module in policy.module.named_modules():
        digest.update(f"{name} {type(module).__name__}\n".encode())
    for parameter in policy.module.parameters():
        values = dequantize_packed(parameter.detach()) if is_packed(parameter) else parameter.detach()
        digest.update(values.flatten()[:1024].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
