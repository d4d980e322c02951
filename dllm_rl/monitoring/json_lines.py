"""JSON-lines files that a run appends to and never rewrites: metrics.jsonl, completions.jsonl."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class JsonLines:
    """An open file of JSON objects, one per line, which only grows; opening it cuts off half a line."""

    def __init__(self, path: Path, *, start: int, patient: bool = False) -> None:
        self.path = path
        self.patient = patient  # on a full disk keep the rows and write them later, rather than raise OSError
        self._waiting = b""  # rows that are not written yet
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if size := os.fstat(self._file).st_size:
            if os.pread(self._file, 1, size - 1) != b"\n":  # a kill may leave half a line
                os.ftruncate(self._file, path.read_bytes().rfind(b"\n") + 1)
            self._write(json.dumps({"resume_from": start}) + "\n")  # older rows from here on do not count

    def append(self, row: dict[str, Any]) -> None:
        self._write(json.dumps(row, allow_nan=False) + "\n")  # JSON has neither NaN nor infinity: ValueError

    def _write(self, text: str) -> None:
        self._waiting += text.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            if not self.patient:
                raise OSError(error.errno, f"{self.path}: {error.strerror}; make room and resume") from error

    def flush(self) -> None:
        self._write("")
        os.fsync(self._file)

    def close(self) -> None:
        self._write("")
        os.close(self._file)


def current_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that count: none that a resume repeats, and no torn line."""
    rows: list[dict[str, Any]] = []
    for row in _objects(path):
        if is_count(row.get("resume_from")):
            rows = [other for other in rows if other["step"] < row["resume_from"]]
        elif is_count(row.get("step")):
            rows.append(row)
    return rows


def warmup_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row in _objects(path):
        if is_count(step := row.get("warmup_step")):
            rows = [*rows, row] if step else [row]  # a second step 0 begins the warm-up again
    return rows


def is_count(value: Any) -> bool:
    """Whether a value may be a step's number: JSON's integers may be of any length."""
    return type(value) is int and 0 <= value < 1 << 53


def number(value: Any) -> float | None:
    """A value of a row as a float; None where it is no number, not finite, or an integer that is no float."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None


def known(row: dict[str, Any]) -> dict[str, float]:
    """A row's numbers; NaN and infinity are null in the file."""
    return {name: found for name, value in row.items() if (found := number(value)) is not None}


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists() and not path.is_file():  # reading a FIFO would wait
        raise ValueError(f"{path} is no regular file; remove it")
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # neither UTF-8 nor JSON, or brackets without end
            continue
        if isinstance(row, dict):
            yield row
