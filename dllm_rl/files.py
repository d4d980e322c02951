"""Crash-safe writes: a file under its final name is always complete and on disk, even if the process is killed."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system: folders are not locked there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, `.NAME.partial`, for the block to write a file or folder to; then rename it to `path`.

    If the block raises, `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, previous = _hidden_sibling(path, "partial"), _hidden_sibling(path, "old")
    recover(path)
    try:
        yield partial
        for written in [*sorted(partial.rglob("*")), partial] if partial.is_dir() else [partial]:
            flush(written)
    except BaseException as error:  # also an interrupt
        remove(partial)
        # An error of `write`, such as a full disk, does not name the file.
        if isinstance(error, OSError) and error.errno and error.filename is None:
            remedy = "; free disk space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise OSError(error.errno, f"{error.strerror}{remedy}", str(path)) from error
        raise
    if partial.is_dir() and path.exists():
        path.rename(previous)  # a rename cannot replace a folder; if the process is killed here, `recover` restores it
    partial.replace(path)
    flush(path.parent)
    remove(previous)


def recover(path: Path) -> None:
    """Clean up after an interrupted `replacing(path)` or `remove_whole(path)`.

    Afterwards `path` is the complete old version, the complete new version, or absent.
    """
    partial, previous = _hidden_sibling(path, "partial"), _hidden_sibling(path, "old")
    if previous.exists() and not path.exists():
        previous.rename(path)  # interrupted between the two renames
    remove(previous)
    remove(partial)


def remove_whole(path: Path) -> None:
    """Delete a folder. If the process is killed, either the complete folder or nothing remains under its name."""
    partial = _hidden_sibling(path, "partial")
    remove(partial)
    if path.exists():
        path.rename(partial)
        flush(path.parent)
        remove(partial)


def _hidden_sibling(path: Path, kind: str) -> Path:
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
    """Replace the file's content by a JSON value, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError, with the folder, if the file is missing or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: {path.name} is missing") from None
    except ValueError:  # not UTF-8 or not JSON
        raise ValueError(f"{path.parent}: {path.name} is damaged: it is not JSON") from None


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as a JSON file has them: a tuple is a list, and what JSON lacks, such as dates and NaN, is text."""
    try:
        return json.loads(json.dumps(dict(values), default=str, skipkeys=True), parse_constant=str)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes, or a list in itself
        if len(values) > 1:
            return {name: part for pair in values.items() for name, part in as_json(dict([pair])).items()}
        ((name, value),) = values.items()
        return {name: hex(value) if isinstance(value, int) else f"a {type(value).__name__} that JSON cannot hold"}


def flush(path: Path) -> bool:
    """Write a closed file, or a folder's list of entries, to disk (fsync).

    Return False for a folder of a file system that has no fsync of folders, such as CIFS and some in user space. A
    rename there is still atomic for other processes, but a power failure may undo it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # a rename may reach the disk before the content
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return False
    finally:
        os.close(handle)
    return True


def to_disk(file: IO[Any]) -> None:
    """Write the buffers of an open file to disk (flush and fsync)."""
    file.flush()
    os.fsync(file.fileno())


def folder_size(folder: Path) -> int:
    """Return the number of bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# The locked files by process id and path; by process id, because a forked child does not have its parent's locks.
_LOCKS: dict[tuple[int, Path], IO[str]] = {}


def lock(path: Path) -> bool:
    """Lock the file until `unlock` or the end of the process; return False if the file system has no locks.

    A network file system may keep the lock of a node that failed. SLURM starts a job again only after its earlier start
    has ended, so a later start of the same job takes the lock over.

    Raises BlockingIOError, which names the process that holds the lock.
    """
    job, start = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    path = path.resolve()
    if fcntl is None or (os.getpid(), path) in _LOCKS:
        return fcntl is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")  # not "w", which would erase the name of the process that holds the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder, *lines = file.read().splitlines() or ["another process"]
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            if lines in [[f"SLURM job {job}, start {earlier}"] for earlier in range(start)]:
                path.unlink()  # the next file has a lock of its own
                return lock(path)
            raise BlockingIOError(error.errno, f"held by {holder}") from None
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise
    file.truncate(0)  # erase the name of an earlier process
    of_job = f"SLURM job {job}, start {start}\n" if job else ""
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n{of_job}")
    file.flush()
    _LOCKS[os.getpid(), path] = file
    return True


def holder_of(path: Path) -> str | None:
    """Return the first line of a file that a process has locked, which names the process; None if none has locked it.
    The lock is neither taken nor changed.
    """
    # Closing any handle of a file would release this process's own lock.
    is_own = (os.getpid(), path.resolve()) in _LOCKS
    if is_own or fcntl is None or not path.is_file():
        return f"process {os.getpid()} on {socket.gethostname()}" if is_own else None
    with path.open() as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return file.readline().rstrip("\n")
    return None


def unlock(path: Path) -> None:
    """Release the lock of this process, if it has one."""
    file = _LOCKS.pop((os.getpid(), path.resolve()), None)
    if file is not None:
        file.close()
