"""math-verify in separate processes: symbolic equality of LaTeX answers, bounded in time, memory and length."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

from dllm_rl.tasks.math.latex import as_list, normalize, rational

# Longest answer, in characters, that is compared symbolically. A reference may have ten times as many.
MAX_SYMBOLIC_LENGTH = 300
SECONDS = 1.0  # limit of processor time for one comparison
MAX_CACHED = 65536  # cached verdicts


def require() -> None:
    """Raise ImportError if math-verify is not installed."""
    if find_spec("math_verify") is None:
        raise ImportError("grading by math-verify needs the math-verify package: pip install -e '.[math]'")


def equal(reference: str, answer: str) -> bool | None:
    """Return whether math-verify finds the two equal; None if undecided within the limits. Raises ImportError."""
    return equal_all([(reference, answer)])[0]


def equal_all(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """Compare (reference, answer) pairs as `equal` does, in parallel on all `cores`, each `as_list`."""
    pairs = [(as_list(reference), as_list(answer)) for reference, answer in pairs]
    if len(_VERDICTS) > MAX_CACHED:
        _VERDICTS.clear()
    to_compare = []
    for pair in pairs:
        if pair not in _VERDICTS:
            reference, answer = pair
            # Equal spellings need no algebra. Those of the list 12, 345 and of 12,345 are equal, and their values not.
            is_equal = normalize(reference) == normalize(answer) and rational(reference) == rational(answer)
            _VERDICTS[pair] = True if is_equal else None
            is_short = len(answer) <= MAX_SYMBOLIC_LENGTH and len(reference) <= 10 * MAX_SYMBOLIC_LENGTH
            if _VERDICTS[pair] is None and is_short and "\n" not in answer:
                to_compare.append(pair)
    if to_compare:
        _VERDICTS.update(zip(to_compare, _SERVER.compare(to_compare), strict=True))
    return list(map(_VERDICTS.__getitem__, pairs))


def cores() -> int:
    """Return the number of cores that this process may use: its share if a launcher started several processes."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class _Server:
    """The process of math_verify_worker.py, which is started when this process first compares a pair."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lock = Lock()

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Return a verdict per pair; None if two workers ended at it. Raises RuntimeError if the process ends twice."""
        require()
        with self.lock:
            reply = self.ask(pairs) or self.ask(pairs)  # a process that was killed meanwhile costs no run
        if not reply:
            raise RuntimeError("the process of math-verify has ended; try: python -c 'import math_verify'")
        verdicts: list[bool | None] = json.loads(reply)
        return verdicts

    def ask(self, pairs: Sequence[tuple[str, str]]) -> str:
        """Return the reply of the process, which is started if none is running; "" if it ends meanwhile."""
        if self.process is None or self.process.poll() is not None:
            self.process = self.start()
        process = self.process
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        reply = ""
        try:
            print(json.dumps(pairs), file=process.stdin, flush=True)
            reply = process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not reply:  # it has ended, or this call is interrupted, and its reply would answer a later call
                self.stop()
        return reply

    def start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("math_verify_worker.py")), str(SECONDS), str(cores())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # so that Ctrl-C does not signal the workers
        )

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # before `wait`, so that the id is still this process's
            self.process.wait()
            self.process = None


_VERDICTS: dict[tuple[str, str], bool | None] = {}
_SERVER = _Server()
if hasattr(os, "register_at_fork"):
    # A forked process starts a server of its own; the parent's lock may be locked.
    os.register_at_fork(after_in_child=_SERVER.__init__)  # type: ignore[misc]
