"""What a checkpoint's folder must hold: manifest.json, written last, with the size and SHA-256 of every file.

    {"format": 1, "step": 4, "processes": 2, "versions": {...},
     "files": {NAME: {"size": ..., "sha256": ...}}, "sha256": ...}

Names are relative to the folder. A file over 1 MiB has `head` too, the SHA-256 of its first 1 MiB (a safetensors header
and the first tensors), which is all of it that a quick check reads. The manifest's own `sha256` is that of its other
fields, so that no part of it changes unseen; the step binds weights, optimiser and state to one another.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

FORMAT = 1
NAME = "manifest.json"
CARD = "README.md"  # is not verified: it may be edited
HEAD = 1 << 20
Check = Literal["full", "quick"]  # quick: of files over 1 MiB, the size and the first 1 MiB only


def write(
    folder: Path,
    *,
    step: int | None,
    processes: int,
    versions: dict[str, Any],
    known: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> str:
    """Write the manifest of what the folder holds; returns its own digest. known: entries of files that others wrote,
    and described."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (NAME, CARD, *known)]
    with ThreadPoolExecutor(4) as pool:
        described = pool.map(describe, paths)
    files = {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, described, strict=True)}
    files |= known
    fields = {"format": FORMAT, "step": step, "processes": processes, "versions": versions, "files": files}
    own = _own_digest(fields)
    (folder / NAME).write_text(json.dumps(fields | {"sha256": own}, indent=1) + "\n", encoding="utf-8")
    return own


def read(folder: Path) -> dict[str, Any]:
    """The manifest. Raises ValueError where it is missing, damaged, or of a format that this version does not know."""
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"{folder}: {NAME} {_why_not(path)}")
    try:
        found = json.loads(path.read_bytes())
        own = found.pop("sha256", None) if isinstance(found, dict) else None
        signed = own is not None and own == _own_digest(found)
    except (ValueError, RecursionError):  # neither UTF-8 nor JSON, or brackets without end
        raise ValueError(f"{folder}: {NAME} is damaged: it is not JSON") from None
    if not signed:
        raise ValueError(f"{folder}: {NAME} is damaged: its own SHA-256 differs")
    if type(found.get("format")) is int and found["format"] != FORMAT:
        raise ValueError(f"{folder}: format={found['format']} is newer than {FORMAT}; upgrade dllm_rl")
    if not _has_types(found):
        raise ValueError(f"{folder}: {NAME} is damaged: its fields are missing, or of other types than `write` gives")
    return found | {"sha256": own}


def verify(folder: Path, *, quick: bool = False, also: Sequence[str] = ()) -> dict[str, Any]:
    """The manifest, after every file of the folder was held against it.

    quick  of files over 1 MiB, compare the size and the first 1 MiB only.
    also   names that the folder may hold besides; hidden files may always be there.
    Raises ValueError naming what is wrong.
    """
    found = read(folder)
    files = found["files"]
    here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for path in folder.rglob("*"):
        if not path.is_file() and not path.is_dir():  # reading a FIFO or a device would wait, or never end
            raise ValueError(f"{folder}: {path.name} is no regular file")
    for name in files:
        if name not in here:
            raise ValueError(f"{folder}: {name} {_why_not(folder / name)}")
    for name, path in here.items():
        if name not in files and name not in (NAME, CARD, *also) and not path.name.startswith("."):
            raise ValueError(f"{folder}: {name} is not in {NAME}; move it elsewhere")
    with ThreadPoolExecutor(4) as pool:
        for fault in pool.map(partial(_fault, quick=quick), (here[name] for name in files), files.values()):
            if fault:
                raise ValueError(f"{folder}: {fault}")
    return found


def verify_if_there(folder: Path, check: Check) -> None:
    """Verify a folder that has a manifest, as our checkpoints have; others' checkpoints pass. Raises ValueError."""
    if (folder / NAME).exists():
        verify(folder, quick=check == "quick")


def describe(path: Path) -> dict[str, Any]:
    """A file's entry."""
    size = path.stat().st_size
    entry = {"size": size, "sha256": digest(path)}
    return entry | ({"head": digest(path, limit=HEAD)} if size > HEAD else {})


def digest(path: Path, *, limit: int | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; of its first `limit` bytes where one is given."""
    found, left = hashlib.sha256(), limit
    with path.open("rb", buffering=0) as file:
        while part := file.read(1 << 20 if left is None else min(left, 1 << 20)):
            found.update(part)
            left = None if left is None else left - len(part)
    return found.hexdigest()


def _why_not(path: Path) -> str:
    return "is no regular file" if path.exists() else "is missing"


def _fault(path: Path, entry: dict[str, Any], *, quick: bool) -> str | None:
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{path.name} is damaged: {size} bytes, not {entry['size']}"
    if quick and "head" in entry:
        return None if digest(path, limit=HEAD) == entry["head"] else f"{path.name} is damaged: its first MiB differs"
    return None if digest(path) == entry["sha256"] else f"{path.name} is damaged: its SHA-256 differs"


def _has_types(fields: dict[str, Any]) -> bool:
    """Whether the fields are of the types that `write` gives them: who can write a manifest can sign it."""
    files = fields.get("files")
    if type(fields.get("format")) is not int or type(fields.get("step")) not in (int, type(None)):
        return False
    if "step" not in fields or not isinstance(files, dict):
        return False
    return all(isinstance(entry, dict) and _describes(entry) for entry in files.values())


def _describes(entry: dict[str, Any]) -> bool:
    digests = (entry.get("sha256"), entry.get("head", ""))
    return type(entry.get("size")) is int and all(isinstance(each, str) for each in digests)


def _own_digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
