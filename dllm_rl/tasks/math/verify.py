"""math-verify behind a wall: symbolic equality of two LaTeX answers, within bounds of time, memory and length."""

import json
import os
import select
import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

from dllm_rl.tasks.math.latex import normalise

LONGEST = 300  # characters of an answer that is worth comparing symbolically
SECONDS = 0.028  # of processor time for one comparison
PATIENCE = 60.0  # seconds of waiting, for a machine that is busy with other things


def require() -> None:
    """Errors: ImportError when math-verify is not installed."""
    if find_spec("math_verify") is None:
        raise ImportError("grading by math-verify needs the math-verify package: pip install 'dllm_rl[math]'")


@lru_cache(maxsize=65536)
def equal(reference: str, answer: str) -> bool | None:
    """Whether math-verify holds the answer equal to the reference; None when it has not decided within the bounds.

    Errors: ImportError when math-verify is not installed.
    """
    if normalise(reference) == normalise(answer):
        return True
    if len(answer) > LONGEST or "\n" in answer:
        return None
    return _WORKER.ask(reference, answer)


class _Worker:
    """One child process, started at the first question, and again should it be gone."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.parent = 0
        self.lock = Lock()

    def ask(self, reference: str, answer: str) -> bool | None:
        with self.lock:
            # A forked process must not share its parent's pipes.
            if self.process is None or self.parent != os.getpid() or self.process.poll() is not None:
                self.start()
            reply = self.exchange(json.dumps([reference, answer]).encode() + b"\n")
            if reply is None:
                self.stop()
            return {b"1\n": True, b"0\n": False}.get(reply or b"")

    def start(self) -> None:
        require()
        self.parent = os.getpid()
        script = Path(__file__).with_name("verify_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent to handle
        )
        if self.exchange(b"") != b"ready\n":
            self.stop()
            raise RuntimeError("math-verify did not start; try: python -c 'import math_verify'")

    def exchange(self, question: bytes) -> bytes | None:
        """Sends one line and reads one; None when the process has gone, or is silent beyond all patience."""
        process = self.process
        assert process and process.stdin and process.stdout
        try:
            process.stdin.write(question)
            process.stdin.flush()
        except BrokenPipeError:
            return None
        if not select.select([process.stdout], [], [], PATIENCE)[0]:
            return None
        return process.stdout.readline() or None

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


_WORKER = _Worker()
