"""Stored completions: a JSONL file that grows during an evaluation, survives a kill, and can be graded again.

A row has `prompt`, `completion` and the problem's fields. Under `evaluation` it has the settings that made the row, and
`reward` and its `parts` under the latest `protocol`. Each process appends to NAME.partN.jsonl; at the beginning and at
the end of an evaluation, the parts are merged into NAME.jsonl.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from dllm_rl.distributed.collectives import Processes
from dllm_rl.evaluation.results import GradedAnswer
from dllm_rl.files import as_json, replacing, to_disk
from dllm_rl.identity import digest_of_tensors, digest_of_value
from dllm_rl.models.base import Policy, Tokenizer
from dllm_rl.quantization.linear import dequantize_packed, is_torchao_tensor
from dllm_rl.records import describe, full_name, to_json
from dllm_rl.tasks.base import Problem, completion_metrics
from dllm_rl.tasks.rows import load_rows

COSTS = ("tokens", "forwards", "seconds", "steps")
Key = tuple[int, int]  # (problem, sample)
Row = dict[str, Any]
Rows = dict[Key, Row]


class Completions:
    """The stored rows of an evaluation, and this process's part of the file. Without a path nothing is stored.

    Raises:
        ValueError: The stored rows were made with another seed, sampler or other weights than `provenance`.
    """

    def __init__(self, path: Path | None, provenance: Mapping[str, Any], accelerator: Processes) -> None:
        self.path = path
        self.accelerator = accelerator
        self.rows: Rows = {}
        if path is not None:
            self.merge_parts()  # first merge the parts that an interrupted evaluation left
            self.rows = read(path)
            self.part = path.with_name(f"{path.stem}.part{accelerator.process_index}.jsonl")
            for row in self.rows.values():
                for name, value in provenance.items():  # weights, seed and sampler must be the same
                    stored_value = row["evaluation"].get(name)
                    if stored_value != value:
                        difference = f"made with {name}={stored_value}, not {value}"
                        raise ValueError(f"{path} has completions {difference}; give another output_dir")

    def stored_rows(self, keys: Iterable[Key], problems: Mapping[int, Problem]) -> Rows:
        """Return those of the requested rows that are stored.

        Raises:
            ValueError: A row belongs to another problem.
        """
        rows = {key: self.rows[key] for key in keys if key in self.rows}
        for key, row in rows.items():
            expected = as_json(make_row(problems[key[0]], row["completion"], row["evaluation"]))
            stored = as_json(row)
            for name, value in expected.items():
                if value != stored.get(name):
                    difference = f"its {name} is {stored.get(name)!r}, the task's is {value!r}"
                    raise ValueError(f"{self.path} has another problem {key[0]}: {difference}; give another output_dir")
        return rows

    def append(self, rows: Rows) -> None:
        """Append the rows that are not stored yet to this process's part, and wait until they are on disk."""
        if self.path is not None:
            with self.part.open("a", encoding="utf-8") as file:
                for key, row in rows.items():
                    if key not in self.rows:
                        file.write(_line(row))
                to_disk(file)

    def merge_parts(self, answers: Sequence[GradedAnswer] = (), protocol: str = "") -> None:
        """Merge the parts of all processes, and store the grades. Collective: every process must call it."""
        if self.path is not None:
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                merge_parts(self.path, answers, protocol)
            self.accelerator.wait_for_everyone()


def make_row(problem: Problem, completion: str, evaluation: Mapping[str, Any]) -> Row:
    """Make a row of the file.

    Raises:
        ValueError: A field of the problem has a name that rows need.
    """
    row_fields: Row = {} if problem.blank is None else {"blank": problem.blank}
    row_fields |= {"prompt": problem.prompt, "completion": completion, "evaluation": dict(evaluation)}
    for name in problem.fields:
        if name in row_fields:
            raise ValueError(f"field {name!r} of the problem has a name that stored completions need; rename it")
    return as_json(problem.fields) | row_fields


def digest_of_problem(problem: Problem) -> str:
    """Return sixteen hex digits that identify a problem by its prompt, its blanks and its fields."""
    content = as_json({"fields": problem.fields, "prompt": problem.prompt, "blank": problem.blank})
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def merge_parts(path: Path, answers: Sequence[GradedAnswer] = (), protocol: str = "") -> None:
    """Merge the file, its parts and the grades into one file, sorted by problem and sample. Atomic: an interruption
    loses no row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_part = re.compile(rf"{re.escape(path.stem)}\.part[0-9]+\.jsonl").fullmatch
    part_files = sorted(part_file for part_file in path.parent.iterdir() if is_part(part_file.name))
    if not part_files and not answers:
        return
    rows = read(path)
    for part_file in part_files:
        with part_file.open("rb+") as file:
            # An interrupted process may have left an incomplete last line.
            file.truncate(file.read().rfind(b"\n") + 1)
        rows |= read(part_file)
    for answer in answers:
        grades = {
            "protocol": protocol,
            "reward": None if answer.reward.value is None else float(answer.reward.value),
            "parts": completion_metrics(answer.reward),
        }
        rows[answer.problem, answer.sample]["evaluation"] |= grades
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for key in sorted(rows):
            file.write(_line(rows[key]))
    for part_file in part_files:  # last: after an interruption here, the next merge removes the duplicate rows
        part_file.unlink()


def read(path: Path) -> Rows:
    """Read the rows of a file by (problem, sample); {} if there is no file.

    Raises:
        ValueError: A line is malformed. The message names the line.
    """
    rows = {}
    for location, row in load_rows(path) if path.exists() else ():
        try:
            rows[int(row["evaluation"]["problem"]), int(row["evaluation"]["sample"])] = row
        except (KeyError, TypeError, ValueError, OverflowError):  # OverflowError: an infinite number
            raise ValueError(
                f"{location}: not a stored completion (no evaluation.problem, evaluation.sample)"
            ) from None
    return rows


def fingerprint(policy: Policy) -> str:
    """Return sixteen hex digits that identify what a policy computes: all bytes of its weights, its layers' classes,
    its model's config, its spec, and its tokenizer with the chat template.

    It reads every weight, which takes seconds for a model of billions of parameters: call it once per policy.
    """
    weights = {name: weight for name, weight in policy.module.state_dict().items() if isinstance(weight, Tensor)}
    config: Any = getattr(policy.module, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(config, dict):  # without the folder that it was read from, and the version that wrote it
        config = {
            name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")
        }
    # Classes distinguish a quantized copy from its original, even if the weights are equal.
    classes = [(name, full_name(type(module))) for name, module in policy.module.named_modules()]
    settings = [classes, config, to_json(policy.spec), policy.float32_head, describe(policy.quantization)]
    parts = [digest_of_tensors(weights, _as_numbers), digest_of_value(settings), _digest_of_tokenizer(policy.tokenizer)]
    return digest_of_value(parts)[:16]


def _as_numbers(weight: Tensor) -> Tensor:
    return dequantize_packed(weight) if is_torchao_tensor(weight) else weight


def _digest_of_tokenizer(tokenizer: Tokenizer) -> str:
    """Return the digest of a tokenizer: of the files that it saves, or of the object, if it saves none."""
    if not hasattr(tokenizer, "save_pretrained"):
        return digest_of_value(tokenizer)
    content: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                content[file.name] = json.loads(file.read_bytes()) if file.suffix == ".json" else file.read_bytes()
    for values in content.values():
        if isinstance(values, dict):  # what a call of the tokenizer sets, and where it was read from
            for name in ("padding", "truncation", "name_or_path", "tokenizer_file"):
                values.pop(name, None)
    return digest_of_value(content)


def _line(row: Row) -> str:
    # UTF-8 has no half of a surrogate pair; "backslashreplace" writes it as JSON does.
    text = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")
    return text + "\n"
