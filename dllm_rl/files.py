"""Writing so that a kill leaves no half file."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write aside and rename, so that a reader never sees half a file."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    aside.replace(path)


def flush(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())
