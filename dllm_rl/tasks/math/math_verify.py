"""math-verify behind a wall: symbolic equality of LaTeX answers, within bounds of time, memory and length."""

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

from dllm_rl.tasks.math.latex import normalise

LONGEST = 300  # characters of an answer that is worth comparing symbolically; ten times as many of a reference
SECONDS = 1.0  # of processor time for one comparison
TRIES = 2  # a comparison whose worker ended is asked once more
PATIENCE = 60.0  # seconds without a reply after which all workers are replaced: a guard against a hang
STARTING = 300.0  # seconds that they may take to start, on a busy machine
MOST_KNOWN = 65536  # verdicts that are remembered


def require() -> None:
    """Errors: ImportError when math-verify is not installed."""
    if find_spec("math_verify") is None:
        raise ImportError("grading by math-verify needs the math-verify package: pip install 'dllm_rl[math]'")


def equal(reference: str, answer: str) -> bool | None:
    """Whether math-verify holds the answer equal to the reference; None when it has not decided within the bounds.

    Errors: ImportError when math-verify is not installed.
    """
    return equal_all([(reference, answer)])[0]


def equal_all(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """As `equal`, for many pairs of (reference, answer) at once: on as many cores as there are."""
    if len(_KNOWN) > MOST_KNOWN:
        _KNOWN.clear()
    new = [pair for pair in dict.fromkeys(pairs) if pair not in _KNOWN]
    _KNOWN.update({pair: _without_algebra(*pair) for pair in new})
    asked = [pair for pair in new if _KNOWN[pair] is None and _comparable(*pair)]
    if asked:
        _KNOWN.update(zip(asked, _POOL.ask(asked), strict=True))
    return [_KNOWN[pair] for pair in pairs]


def forget() -> None:
    """Drops the verdicts that are remembered."""
    _KNOWN.clear()


def stop() -> None:
    """Ends the workers; the next comparison starts others."""
    _POOL.stop()


def _without_algebra(reference: str, answer: str) -> bool | None:
    return True if normalise(reference) == normalise(answer) else None


def _comparable(reference: str, answer: str) -> bool:
    return len(answer) <= LONGEST and len(reference) <= 10 * LONGEST and "\n" not in answer


def cores() -> int:
    """The processor cores of this process; its share, where a launcher started several on the machine."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class _Pool:
    """One worker per core: processes that math_verify_worker.py forks at this process's first question."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lines: list[Connection] = []
        self.number = 0  # of the last question, so that a late reply does not pass for another question's
        self.lock = Lock()

    def forget(self) -> None:
        """Lets go of the workers without ending them: in a forked process they are the parent's."""
        self._close()
        self.lock = Lock()  # the parent's may be held

    def _close(self) -> None:
        for line in self.lines:
            line.close()
        self.process, self.lines = None, []

    def ask(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        verdicts: list[bool | None] = [None] * len(pairs)
        tries = [0] * len(pairs)
        waiting = deque(range(len(pairs)))
        asked: dict[Connection, tuple[int, int, float]] = {}  # line -> question, its number, its deadline
        with self.lock:
            while waiting or asked:
                if self.process is None:
                    self.start()
                again = []
                try:
                    for line in self.lines:
                        if waiting and line not in asked:
                            question = waiting.popleft()
                            tries[question] += 1
                            self.number += 1
                            asked[line] = question, self.number, monotonic() + PATIENCE
                            self.send(line, self.number, pairs[question])
                    for line, reply in self.receive(asked):
                        question, number, _ = asked[line]
                        if reply == b"ended":
                            again.append(asked.pop(line)[0])
                        elif reply.startswith(b"%d " % number):
                            verdicts[question] = reply.endswith(b" 1")
                            del asked[line]
                except (OSError, EOFError):  # the workers are gone, or hang
                    self.stop()
                    again += [question for question, _, _ in asked.values()]
                    asked.clear()
                waiting.extend(question for question in again if tries[question] < TRIES)
        return verdicts

    def start(self) -> None:
        """Errors: RuntimeError when the workers do not start."""
        require()
        pairs = [Pipe() for _ in range(cores())]
        theirs = [end.fileno() for _, end in pairs]
        script = Path(__file__).with_name("math_verify_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(SECONDS), *map(str, theirs)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=theirs,
            start_new_session=True,  # Ctrl-C is for this process to handle
        )
        self.lines = [line for line, _ in pairs]
        for _, end in pairs:
            end.close()
        try:
            ready = all(line.poll(STARTING) and line.recv_bytes() == b"ready" for line in self.lines)
        except (OSError, EOFError):
            ready = False
        if not ready:
            self.stop()
            raise RuntimeError("math-verify did not start; try: python -c 'import math_verify'")

    def send(self, line: Connection, number: int, pair: tuple[str, str]) -> None:
        while line.poll():  # what is said of a worker that ended without a question
            line.recv_bytes()
        line.send_bytes(json.dumps([number, *pair]).encode())

    def receive(self, asked: dict[Connection, tuple[int, int, float]]) -> list[tuple[Connection, bytes]]:
        """The replies that have come, at least one. Errors: OSError when a question is past its deadline."""
        deadline = min(deadline for _, _, deadline in asked.values())
        ready = wait(list(asked), max(0.0, deadline - monotonic()))
        if not ready:
            raise TimeoutError
        return [(line, line.recv_bytes()) for line in asked if line in ready]

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
