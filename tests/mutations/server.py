"""A process that has the costly libraries loaded and forks one child per run of pytest: seconds less for each.

Run as `python -m tests.mutations.server` in a copy of the tree; `Server` is the other end. The package itself is never
imported before the fork, so that every run reads the files as they are.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

OPTIONS = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:warnings"]
LIBRARIES = ("torch", "transformers", "torchao.quantization", "accelerate", "hypothesis", "beartype", "pytest")


class Server:
    """Owns the process, for the copy of the tree in `tree`; ends with `close`."""

    def __init__(self, tree: Path, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.mutations.server"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def pytest(self, tests: Sequence[str], timeout: float) -> tuple[int | None, str]:
        """pytest's exit code (None when it took longer than `timeout` seconds) and what it printed."""
        with tempfile.NamedTemporaryFile("r") as output:
            self.process.stdin.write(json.dumps([list(tests), output.name, timeout]) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline()), output.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for library in LIBRARIES:
        if find_spec(library.partition(".")[0]) is not None:
            import_module(library)
    parent = os.getppid()
    for line in sys.stdin:
        tests, output, timeout = json.loads(line)
        child = os.fork()
        if child == 0:
            run(tests, output)
        answers.write(json.dumps(wait(child, timeout, parent)) + "\n")
        answers.flush()


def run(tests: list[str], output: str) -> None:
    """In the child: pytest in a session of its own, so that what tests start can be ended with them."""
    os.setsid()
    for handle, file, mode in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY), (2, output, os.O_WRONLY)):
        os.dup2(os.open(file, mode | (os.O_APPEND if handle else 0)), handle)
    import pytest

    code = 3
    try:
        code = int(pytest.main([*OPTIONS, *tests]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, timeout: float, parent: int) -> int | None:
    """The child's exit status; None when it had to be ended, as it also is when the runner is gone."""
    end, code = time.monotonic() + timeout, None
    try:
        while time.monotonic() < end and os.getppid() == parent:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    return code


if __name__ == "__main__":
    serve()
