"""Writing so that a kill leaves no half file: what bears its final name is whole, and on disk."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields `.NAME.partial` beside `path`, to be written as a file or a folder; then flushes it and renames it to
    `path`.

    A file is replaced atomically; of a folder that is there already, the old one is deleted first. When the block
    raises, what it wrote is deleted and `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)
    try:
        yield partial
        for part in [*sorted(partial.rglob("*")), partial] if partial.is_dir() else [partial]:
            flush(part)
    except BaseException:
        remove(partial)
        raise
    if partial.is_dir() and path.exists():
        remove(path)
    partial.replace(path)
    flush(path.parent)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the file's content at once, so that a reader never sees half of it."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """`write_text` of the value as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def flush(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_disk(file: IO[Any]) -> None:
    """Force what was written to an open file to disk."""
    file.flush()
    os.fsync(file.fileno())
