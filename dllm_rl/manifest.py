"""A checkpoint's manifest.json: sizes and digests of its files.

Its content is {"format": 1, "step", "processes", "versions", "files": {NAME: {"size", "sha256"}}, "sha256"}, where the
last field is the digest of the other fields. A file over 1 MiB also has `head`, the SHA-256 of its first 1 MiB (a
safetensors header and the first tensors).
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

FORMAT = 1
NAME = "manifest.json"
CARD = "README.md"  # not verified: users may edit it
HEAD = 1 << 20
Check = Literal["full", "quick"]  # quick: only the size and the first 1 MiB of files over 1 MiB


def write(
    folder: Path,
    *,
    step: int | None,
    processes: int,
    versions: dict[str, Any],
    known: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> str:
    """Write the folder's manifest and return its digest.

    Args:
        folder: Folder of the checkpoint.
        step: Training step.
        processes: Number of processes of the run.
        versions: Versions of packages.
        known: Entries of files that other processes wrote and described. Default: none.
    """
    files = {}
    with ThreadPoolExecutor(4) as pool:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (NAME, CARD, *known)]
        for path, entry in zip(paths, pool.map(describe, paths), strict=True):
            files[path.relative_to(folder).as_posix()] = entry
    files |= known
    fields = {"format": FORMAT, "step": step, "processes": processes, "versions": versions, "files": files}
    own_digest = _own_digest(fields)
    # The manifest is written last: a folder with a manifest is complete.
    (folder / NAME).write_text(json.dumps(fields | {"sha256": own_digest}, indent=1) + "\n", encoding="utf-8")
    return own_digest


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest. Raises ValueError if it is missing, damaged, or of another format."""
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"{folder}: {NAME} is missing")
    try:
        content = json.loads(path.read_bytes())
        stored_digest = content.pop("sha256", None)
    except (ValueError, AttributeError):  # not UTF-8, or not a JSON object
        raise ValueError(f"{folder}: {NAME} is damaged: it is not JSON") from None
    if stored_digest != _own_digest(content):
        raise ValueError(f"{folder}: {NAME} is damaged: its own SHA-256 differs")
    if missing := [name for name in ("format", "step", "files") if name not in content]:
        raise ValueError(f"{folder}: {NAME} has no {missing[0]!r}: this library did not write it; delete it")
    if content["format"] != FORMAT:
        raise ValueError(f"{folder}: format={content['format']} is newer than {FORMAT}; upgrade dllm_rl")
    return content | {"sha256": stored_digest}


def verify(folder: Path, *, quick: bool = False, unread: str | None = None) -> dict[str, Any]:
    """Return the manifest if all files match it, else raise ValueError.

    Args:
        folder: Folder of the checkpoint.
        quick: Whether to read only the first MiB of files over 1 MiB. Default: False.
        unread: Pattern of the names of files to check as with `quick`. None (default): no such files.
    """
    content = read(folder)
    files = content["files"]
    paths_by_name = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in files:
        if name not in paths_by_name:
            raise ValueError(f"{folder}: {name} is missing")
    for name, path in paths_by_name.items():  # hidden files are allowed too
        if name not in files and name not in (NAME, CARD) and not path.name.startswith("."):
            raise ValueError(f"{folder}: {name} is not in {NAME}; move it elsewhere")
    # hashlib releases the GIL, so that four files are read and hashed at a time.
    with ThreadPoolExecutor(4) as pool:
        is_quick = [quick or (unread is not None and fnmatchcase(name, unread)) for name in files]
        for problem in pool.map(_problem, map(paths_by_name.__getitem__, files), files.values(), is_quick):
            if problem:
                raise ValueError(f"{folder}: {problem}")
    return content


def verify_if_present(folder: Path, check: Check) -> None:
    """Call `verify` on a folder with a manifest, such as this library's checkpoints; other folders pass."""
    if (folder / NAME).exists():
        verify(folder, quick=check == "quick")


def describe(path: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest."""
    size = path.stat().st_size
    entry = {"size": size, "sha256": digest(path)}
    return entry | ({"head": digest(path, limit=HEAD)} if size > HEAD else {})


def digest(path: Path, *, limit: int | None = None) -> str:
    """Return the SHA-256, in hexadecimal, of a file or of its first `limit` bytes."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256") if limit is None else hashlib.sha256(file.read(limit))
    return sha256.hexdigest()


def _problem(path: Path, entry: dict[str, Any], quick: bool) -> str | None:
    """Return how a file differs from its entry, or None."""
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{path.name} is damaged: {size} bytes, not {entry['size']}"
    if quick and "head" in entry:
        return None if digest(path, limit=HEAD) == entry["head"] else f"{path.name} is damaged: its first MiB differs"
    return None if digest(path) == entry["sha256"] else f"{path.name} is damaged: its SHA-256 differs"


def _own_digest(fields: dict[str, Any]) -> str:
    # Sorted keys, because the order of JSON fields has no meaning.
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
