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

MAX_SYMBOLIC_LENGTH = (
    300  # characters of an answer that is compared symbolically; a reference may have ten times as many
)
SECONDS = 1.0  # processor time of one comparison
TRIES = 2  # attempts per comparison if its worker ends
REPLY_SECONDS = 60.0  # seconds without a reply after which all workers are replaced
STARTING = 300.0  # seconds that the workers may take to start, on a busy machine
MOST_KNOWN = 65536  # cached verdicts

Asked = dict[Connection, tuple[int, int, float]]  # line -> question, its number, its deadline


def require() -> None:
    """Raise ImportError if math-verify is not installed."""
    if find_spec("math_verify") is None:
        raise ImportError("grading by math-verify needs the math-verify package: pip install 'dllm_rl[math]'")


def equal(reference: str, answer: str) -> bool | None:
    """Return whether math-verify finds both equal; None: undecided within the bounds. Raises ImportError."""
    return equal_all([(reference, answer)])[0]


def equal_all(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """Compare many pairs of (reference, answer) as `equal` does, on all `cores`."""
    if len(_KNOWN) > MOST_KNOWN:
        _KNOWN.clear()
    asked = []
    for pair in pairs:
        if pair not in _KNOWN:
            reference, answer = pair
            _KNOWN[pair] = True if normalize(reference) == normalize(answer) else None  # no algebra is needed
            short = len(answer) <= MAX_SYMBOLIC_LENGTH and len(reference) <= 10 * MAX_SYMBOLIC_LENGTH
            if _KNOWN[pair] is None and short and "\n" not in answer:
                asked.append(pair)
    if asked:
        _KNOWN.update(zip(asked, _POOL.ask(asked), strict=True))
    return list(map(_KNOWN.__getitem__, pairs))


def cores() -> int:
    """Return the processor cores of this process, or its share if a launcher started several processes."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class _Pool:
    """One worker per core: processes that math_verify_worker.py forks at this process's first question."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lines: Sequence[Connection] = []
        self.number = 0  # number of the last question: a late reply has another number
        self.lock = Lock()

    def forget(self) -> None:
        """Close the lines in a forked process, and leave the workers to the parent."""
        self._close()
        self.lock = Lock()  # the parent's lock may be locked

    def _close(self) -> None:
        for line in self.lines:
            line.close()
        self.process = None
        self.lines = []

    def ask(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        verdicts: list[bool | None] = [None] * len(pairs)
        failures = [0] * len(pairs)
        waiting = deque(range(len(pairs)))
        asked: Asked = {}
        with self.lock:
            while waiting or asked:
                if self.process is None:
                    self.start()
                try:
                    self.hand_out(pairs, waiting, asked)
                    failed = self.take_in(asked, verdicts)
                except (OSError, EOFError):  # the workers have ended or hang
                    self.stop()
                    failed = [question for question, _, _ in asked.values()]
                    asked.clear()
                for question in failed:
                    failures[question] += 1
                    if failures[question] < TRIES:  # a worker may have ended by accident, which is not a verdict
                        waiting.append(question)
        return verdicts

    def hand_out(self, pairs: Sequence[tuple[str, str]], waiting: deque[int], asked: Asked) -> None:
        """Send a question to each idle line."""
        for line in self.lines:
            if waiting and line not in asked:
                question = waiting.popleft()
                self.number += 1
                asked[line] = (
                    question,
                    self.number,
                    monotonic() + REPLY_SECONDS,
                )  # before sending: a line that breaks counts as asked
                self.send(line, self.number, pairs[question])

    def take_in(self, asked: Asked, verdicts: list[bool | None]) -> list[int]:
        """Wait for a reply; return the questions whose worker ended. Raises TimeoutError past a question's deadline."""
        _, _, earliest = next(iter(asked.values()))  # entries are in the order of asking
        ready = wait(list(asked), max(0.0, earliest - monotonic()))
        if not ready:
            raise TimeoutError
        # All replies are read before any counts: if a line breaks now, every question stays asked.
        replies = [(line, line.recv_bytes()) for line in asked if line in ready]
        ended = []
        for line, reply in replies:
            question, number, _ = asked[line]
            if reply == b"ended":
                ended.append(question)
            elif reply.startswith(b"%d " % number):
                verdicts[question] = reply.endswith(b" 1")
            else:
                continue  # a late reply to an earlier question of this line
            del asked[line]
        return ended

    def start(self) -> None:
        """Start the workers. Raises RuntimeError if they do not start."""
        require()
        self.lines, ends = zip(*(Pipe() for _ in range(cores())), strict=True)
        theirs = [end.fileno() for end in ends]
        script = Path(__file__).with_name("math_verify_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(SECONDS), *map(str, theirs)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=theirs,
            start_new_session=True,  # Ctrl-C is for this process to handle
        )
        for end in ends:
            end.close()  # otherwise a line would not end with its worker
        try:
            ready = all(line.poll(STARTING) and line.recv_bytes() == b"ready" for line in self.lines)
        except (OSError, EOFError):
            ready = False
        if not ready:
            self.stop()
            raise RuntimeError("math-verify did not start; try: python -c 'import math_verify'")

    def send(self, line: Connection, number: int, pair: tuple[str, str]) -> None:
        while line.poll():  # the report of a worker that ended without a question
            line.recv_bytes()
        line.send_bytes(json.dumps([number, *pair]).encode())

    def stop(self) -> None:
        process = self.process
        self._close()
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


_KNOWN: dict[tuple[str, str], bool | None] = {}
_POOL = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.forget)
