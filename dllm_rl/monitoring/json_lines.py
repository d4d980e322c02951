"""Files of JSON lines that a run adds to and never rewrites: metrics.jsonl, completions.jsonl."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class JsonLines:
    """Owns an open file of JSON objects, a line each, which only grows."""

    def __init__(self, path: Path, *, start: int, patient: bool = False) -> None:
        """start    the first step; rows of it and of later ones, from before, count no longer.
        patient  keep a row that the disk has no room for, and write it later, rather than raise OSError.
        """
        self.path, self.patient = path, patient
        self._waiting = b""  # rows that are not written yet
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if size := os.fstat(self._file).st_size:
            # A kill may have left half a line. What is there stays: readers skip what the resume runs again.
            torn = os.pread(self._file, 1, size - 1) != b"\n"
            self._write("\n" * torn + json.dumps({"resume_from": start}) + "\n")

    def append(self, row: dict[str, Any]) -> None:
        """Add a row. Raises ValueError on a number that JSON has not: NaN, infinity."""
        self._write(json.dumps(row, allow_nan=False) + "\n")

    def _write(self, text: str) -> None:
        self._waiting += text.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            if not self.patient:
                raise OSError(error.errno, f"{self.path}: {error.strerror}; make room and resume") from error

    def flush(self) -> None:
        """Force the rows to disk."""
        self._write("")
        os.fsync(self._file)

    def close(self) -> None:
        self._write("")
        os.close(self._file)


def current_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file that count, in order; those of metrics.jsonl are a step each.

    `{"resume_from": N}` says that the steps from N on were run again after it. A line that is no JSON object with a
    step, as a kill may leave one, is none.
    """
    rows: list[dict[str, Any]] = []
    for row in _objects(path):
        if isinstance(row.get("resume_from"), int):
            rows = [other for other in rows if other["step"] < row["resume_from"]]
        elif isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def warmup_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl that are the warm-up's, a step each; one that was run again counts once."""
    rows: list[dict[str, Any]] = []
    for row in _objects(path):
        if isinstance(step := row.get("warmup_step"), int):
            rows = [*rows, row] if step else [row]  # from 0 on it was begun again
    return rows


def known(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a row that are numbers: those that were not finite are null there."""
    return {name: float(value) for name, value in row.items() if isinstance(value, int | float)}


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # neither UTF-8 nor JSON
            continue
        if isinstance(row, dict):
            yield row
