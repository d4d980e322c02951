"""Detect that the main thread makes no progress: it stays at one place in the code, and uses no CPU time."""

import sys
import threading
import time
from pathlib import Path
from traceback import walk_stack

SHARE = 0.01  # CPU time of all threads / elapsed time; a process that uses more makes progress
PACKAGE = f"{Path(__file__).parents[1]}/"
# Code that may wait for long: for other processes (collective_timeout limits this), for compilers, or for a person.
WAITING = (
    "/torch/distributed/",
    f"{PACKAGE}distributed",
    f"{PACKAGE}training/late_rollouts/",
    "/torch/_inductor/",
    "/pdb.py",
)


class StallDetector:
    """Compares the main thread's stack and the CPU time with those of the previous call of `look`.

    Attributes:
        still_ticks: Number of the latest calls in a row that saw no progress.
    """

    def __init__(self) -> None:
        self.still_ticks = 0
        self._last_stack: tuple[tuple[object, int], ...] = ()
        self._last_clock = 0.0  # seconds
        self._last_cpu_time = 0.0  # seconds

    def look(self) -> str:
        """Update `still_ticks`, and return the innermost place of the main thread as FILE:LINE."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        frames = [] if frame is None else [f for f, _ in walk_stack(frame)]
        stack = tuple((f.f_code, f.f_lasti) for f in frames)
        elapsed = time.monotonic() - self._last_clock
        cpu_time = time.process_time() - self._last_cpu_time
        is_same = stack == self._last_stack and cpu_time < SHARE * elapsed
        is_still = is_same and not waits([f.f_code.co_filename for f in frames])
        self._last_stack = stack
        self._last_clock += elapsed
        self._last_cpu_time += cpu_time
        self.still_ticks = self.still_ticks + 1 if is_still else 0
        return f"{frames[0].f_code.co_filename}:{frames[0].f_lineno}" if frames else "no place"


def waits(files: list[str]) -> bool:
    """Return whether a stack waits in code of WAITING.

    Args:
        files: File of each frame, the innermost first.
    """
    for file in files:
        if any(name in file for name in WAITING):
            return True
        # Frames outside of this library's innermost frame do not count: torch's launchers, which call it, are files of
        # /torch/distributed/ too.
        if file.startswith(PACKAGE):
            return False
    return False
