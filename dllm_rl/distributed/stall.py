"""Whether this process's main thread moves: its place in the code changes, or the processor computes."""

import sys
import threading
import time
from pathlib import Path
from traceback import walk_stack

SHARE = 0.01  # of the time since the last look, on the processor, in any thread
PACKAGE = f"{Path(__file__).parents[1]}/"
# Code that waits for other processes (bounded by collective_timeout), for compilers, or for a person.
WAITING = (
    "/torch/distributed/",
    f"{PACKAGE}distributed",
    f"{PACKAGE}training/late_rollouts/",
    "/torch/_inductor/",
    "/pdb.py",
)


class Motion:
    def __init__(self) -> None:
        self.turns = 0
        self._seen: tuple[tuple[object, int], ...] = ()
        self._looked = 0.0  # clock and processor time at the last look, seconds
        self._used = 0.0

    def asked(self) -> str:
        """Look once; returns the innermost place of the main thread, file and line."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        frames = [] if frame is None else [each for each, _ in walk_stack(frame)]
        seen = tuple((f.f_code, f.f_lasti) for f in frames)
        passed = time.monotonic() - self._looked
        used = time.process_time() - self._used
        still = seen == self._seen and used < SHARE * passed and not waits([f.f_code.co_filename for f in frames])
        self._seen = seen
        self._looked += passed
        self._used += used
        self.turns = self.turns + 1 if still else 0
        return f"{frames[0].f_code.co_filename}:{frames[0].f_lineno}" if frames else "no place"


def waits(files: list[str]) -> bool:
    """Whether the code in `files`, from the innermost frame out, waits for others."""
    for file in files:
        if any(name in file for name in WAITING):
            return True
        if file.startswith(PACKAGE):  # its callers do not count: torch's launchers run it from /torch/distributed/
            return False
    return False
