"""Crash-safe writing: a file with its final name is complete and on disk, even after a kill."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system: folders are not locked there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield `.NAME.partial`, a file or folder to write; then rename it to `path`, which is unchanged if the block
    raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _aside(path, "partial"), _aside(path, "old")
    recover(path)
    try:
        yield partial
        for part in [*sorted(partial.rglob("*")), partial] if partial.is_dir() else [partial]:
            flush(part)
    except BaseException as error:  # also an interrupt
        remove(partial)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a failed write names no file
            remedy = "; make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise OSError(error.errno, f"{error.strerror}{remedy}", str(path)) from error
        raise
    if partial.is_dir() and path.exists():
        path.rename(old)  # a rename cannot replace a folder; after a kill at this point `recover` restores the old one
    partial.replace(path)
    flush(path.parent)
    remove(old)


def recover(path: Path) -> None:
    """Clean up after a killed `replacing(path)` or `remove_whole(path)`: `path` is the old or the new version,
    complete.
    """
    partial, old = _aside(path, "partial"), _aside(path, "old")
    if old.exists() and not path.exists():
        old.rename(path)  # the kill came before the new folder was renamed
    remove(old)
    remove(partial)


def remove_whole(path: Path) -> None:
    """Delete a folder. A kill leaves either all of it or nothing under its name."""
    partial = _aside(path, "partial")
    remove(partial)
    if path.exists():
        path.rename(partial)
        flush(path.parent)
        remove(partial)


def _aside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the file's content atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Return a JSON file's content. Raises ValueError naming its folder if the file is missing or not JSON."""
    if not path.is_file():  # reading a FIFO would wait
        raise ValueError(f"{path.parent}: {path.name} is {'no regular file' if path.exists() else 'missing'}")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # neither UTF-8 nor JSON, or brackets without end
        raise ValueError(f"{path.parent}: {path.name} is damaged: it is not JSON") from None


def flush(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # a rename may reach the disk before the content
    finally:
        os.close(handle)


def to_disk(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def folder_size(folder: Path) -> int:
    """Return the number of bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


_LOCKS: dict[tuple[int, Path], IO[str]] = {}  # by process: a forked child does not have its parent's locks


def lock(path: Path) -> bool:
    """Lock the file until `unlock` or the end of the process; False if the system or file system has no such locks.

    Raises BlockingIOError naming the process that has the lock.
    """
    path = path.resolve()
    if fcntl is None or (os.getpid(), path) in _LOCKS:
        return fcntl is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")  # not w: the file names the process that has the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(error.errno, f"held by {holder}") from None
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise
    file.truncate(0)  # the name of an ended process
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _LOCKS[os.getpid(), path] = file
    return True


def keep_lock(path: Path) -> None:
    """Lock the file again if it was removed or replaced since `lock`, because the old lock no longer protects it.

    Raises BlockingIOError if another process was faster.
    """
    file = _LOCKS.get((os.getpid(), path.resolve()))
    if file is not None and not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
        unlock(path)
        lock(path)


def unlock(path: Path) -> None:
    file = _LOCKS.pop((os.getpid(), path.resolve()), None)
    if file is not None:
        file.close()
