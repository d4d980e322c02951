"""math-verify in separate processes: symbolic equality of LaTeX answers, bounded in time, memory and length."""

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from threading import Lock
from time import monotonic

from dllm_rl.tasks.math.latex import normalize

# Longest answer, in characters, that is compared symbolically. A reference may have ten times as many.
MAX_SYMBOLIC_LENGTH = 300
SECONDS = 1.0  # limit of processor time for one comparison
MAX_ATTEMPTS = 2  # attempts at a comparison whose worker ends
REPLY_SECONDS = 60.0  # seconds without a reply after which all workers are replaced
START_SECONDS = 300.0  # time limit for the start of the workers, for a busy machine
MAX_CACHED = 65536  # cached verdicts

# For each connection to a busy worker: index of the pair that it compares, id of the request, and its deadline.
Pending = dict[Connection, tuple[int, int, float]]


def require() -> None:
    """Raise ImportError if math-verify is not installed."""
    if find_spec("math_verify") is None:
        raise ImportError("grading by math-verify needs the math-verify package: pip install 'dllm_rl[math]'")


def equal(reference: str, answer: str) -> bool | None:
    """Return whether math-verify finds the two equal; None if undecided within the limits. Raises ImportError."""
    return equal_all([(reference, answer)])[0]


def equal_all(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """Compare (reference, answer) pairs as `equal` does, in parallel on all `cores`."""
    if len(_VERDICTS) > MAX_CACHED:
        _VERDICTS.clear()
    to_compare = []
    for pair in pairs:
        if pair not in _VERDICTS:
            reference, answer = pair
            # Equal spellings need no algebra.
            _VERDICTS[pair] = True if normalize(reference) == normalize(answer) else None
            is_short = len(answer) <= MAX_SYMBOLIC_LENGTH and len(reference) <= 10 * MAX_SYMBOLIC_LENGTH
            if _VERDICTS[pair] is None and is_short and "\n" not in answer:
                to_compare.append(pair)
    if to_compare:
        _VERDICTS.update(zip(to_compare, _POOL.compare(to_compare), strict=True))
    return list(map(_VERDICTS.__getitem__, pairs))


def cores() -> int:
    """Return the number of cores that this process may use: its share if a launcher started several processes."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class _Pool:
    """Workers, one per core. math_verify_worker.py forks them when this process first compares a pair."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.connections: Sequence[Connection] = []  # one per worker
        self.request_id = 0  # id of the last request, which tells its reply from a late reply to an earlier one
        self.lock = Lock()

    def forget(self) -> None:
        """In a forked process, close the connections and leave the workers to the parent."""
        self._close()
        self.lock = Lock()  # the parent's lock may be locked

    def _close(self) -> None:
        for connection in self.connections:
            connection.close()
        self.process = None
        self.connections = []

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Return a verdict per pair; None if its worker ended in MAX_ATTEMPTS attempts."""
        verdicts: list[bool | None] = [None] * len(pairs)
        failures = [0] * len(pairs)
        waiting = deque(range(len(pairs)))
        pending: Pending = {}
        with self.lock:
            while waiting or pending:
                if self.process is None:
                    self.start()
                try:
                    self.send_pairs(pairs, waiting, pending)
                    failed = self.receive_verdicts(pending, verdicts)
                except (OSError, EOFError):  # the workers have ended, or do not reply
                    self.stop()
                    failed = [index for index, _, _ in pending.values()]
                    pending.clear()
                for index in failed:
                    failures[index] += 1
                    if failures[index] < MAX_ATTEMPTS:  # try again: the worker may have ended for another reason
                        waiting.append(index)
        return verdicts

    def send_pairs(self, pairs: Sequence[tuple[str, str]], waiting: deque[int], pending: Pending) -> None:
        """Send a waiting pair to each idle worker."""
        for connection in self.connections:
            if waiting and connection not in pending:
                index = waiting.popleft()
                self.request_id += 1
                # Before sending, so that the pair counts as pending if the connection breaks.
                pending[connection] = index, self.request_id, monotonic() + REPLY_SECONDS
                self.send(connection, self.request_id, pairs[index])

    def receive_verdicts(self, pending: Pending, verdicts: list[bool | None]) -> list[int]:
        """Wait for replies and store their verdicts; return the indices of pairs whose worker ended.

        Raises:
            TimeoutError: No reply came before the earliest deadline.
        """
        _, _, earliest = next(iter(pending.values()))  # entries are in the order of sending
        ready = wait(list(pending), max(0.0, earliest - monotonic()))
        if not ready:
            raise TimeoutError
        # Read all replies before storing a verdict: if a connection breaks here, every pair stays pending.
        replies = [(connection, connection.recv_bytes()) for connection in pending if connection in ready]
        failed = []
        for connection, reply in replies:
            index, request_id, _ = pending[connection]
            if reply == b"ended":
                failed.append(index)
            elif reply.startswith(b"%d " % request_id):
                verdicts[index] = reply.endswith(b" 1")
            else:
                continue  # a late reply to an earlier request
            del pending[connection]
        return failed

    def start(self) -> None:
        """Start the workers. Raises RuntimeError if they do not start."""
        require()
        self.connections, worker_ends = zip(*(Pipe() for _ in range(cores())), strict=True)
        worker_fds = [worker_end.fileno() for worker_end in worker_ends]
        script = Path(__file__).with_name("math_verify_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(SECONDS), *map(str, worker_fds)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=worker_fds,
            start_new_session=True,  # so that Ctrl-C does not signal the workers
        )
        for worker_end in worker_ends:
            worker_end.close()  # otherwise a connection would stay open after its worker has ended
        try:
            ready = all(
                connection.poll(START_SECONDS) and connection.recv_bytes() == b"ready"
                for connection in self.connections
            )
        except (OSError, EOFError):
            ready = False
        if not ready:
            self.stop()
            raise RuntimeError("math-verify did not start; try: python -c 'import math_verify'")

    def send(self, connection: Connection, request_id: int, pair: tuple[str, str]) -> None:
        while connection.poll():  # the report that an idle worker ended
            connection.recv_bytes()
        connection.send_bytes(json.dumps([request_id, *pair]).encode())

    def stop(self) -> None:
        process = self.process
        self._close()
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


_VERDICTS: dict[tuple[str, str], bool | None] = {}
_POOL = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.forget)
