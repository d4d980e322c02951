"""JSON-lines files that a run only appends to: metrics.jsonl and completions.jsonl."""

import json
import math
import os
from collections.abc import Iterator
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any


class JsonLines:
    """An open file of JSON objects, one per line. Opening it deletes an incomplete last line.

    Args:
        path: The file.
        start: Step that a resumed run begins with; rows of this step and later ones become invalid.
    """

    def __init__(self, path: Path, *, start: int) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._size, self._digest = 0, sha256()  # of all complete lines
        if size := os.fstat(self._file).st_size:
            if os.pread(self._file, 1, size - 1) != b"\n":  # an interrupted process may leave an incomplete line
                os.ftruncate(self._file, path.read_bytes().rfind(b"\n") + 1)
            with path.open("rb") as file:
                self._digest = file_digest(file, "sha256")
            self._size = os.fstat(self._file).st_size
            self._write(json.dumps({"resume_from": start}) + "\n")  # makes older rows of these steps invalid

    def append(self, row: dict[str, Any]) -> None:
        self._write(json.dumps(row, allow_nan=False) + "\n")  # NaN or infinity, which JSON lacks, raises ValueError

    def _write(self, text: str) -> None:
        waiting = text.encode()
        try:
            while waiting:
                waiting = waiting[os.write(self._file, waiting) :]
        except OSError as error:
            raise OSError(error.errno, f"{self.path}: {error.strerror}; free disk space and resume") from error
        self._size += len(text.encode())
        self._digest.update(text.encode())

    def flush(self) -> tuple[int, str]:
        """Force the lines to disk. Return their number of bytes and their digest, for `is_continued`."""
        os.fsync(self._file)
        return self._size, self._digest.hexdigest()

    def close(self) -> None:
        os.close(self._file)


def is_continued(path: Path, size: int, digest: str) -> bool:
    """Return whether a file still begins with the bytes that `JsonLines.flush` has forced to disk."""
    if not path.exists():
        return size == 0
    found = sha256()
    with path.open("rb") as file:
        while size > 0 and (part := file.read(min(size, 2**20))):
            found.update(part)
            size -= len(part)
    return found.hexdigest() == digest


def current_rows(path: Path) -> list[dict[str, Any]]:
    """Read the valid rows of a log: skip incomplete lines, and rows that a later resume has replaced."""
    rows: list[dict[str, Any]] = []
    for row in json_objects(path):
        if "resume_from" in row:
            rows = [earlier for earlier in rows if earlier["step"] < row["resume_from"]]
        elif "step" in row:
            rows.append(row)
    return rows


def warmup_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of the last warm-up."""
    rows: list[dict[str, Any]] = []
    for row in json_objects(path):
        if "warmup_step" in row:
            rows = [*rows, row] if row["warmup_step"] else [row]  # step 0 begins a new warm-up
    return rows


def finite_numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row that are finite, as floats. NaN and infinity are null in the file."""
    numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file; skip all other lines."""
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # not UTF-8 or not JSON
            continue
        if isinstance(row, dict):
            yield row
