"""Whether this process's main thread moves: another place in its code, or time of the processor, since last asked.

Slow work moves: it computes, or its Python code goes on. A lock that nobody gives back, a sleep, a read from a disk or
network that never answers does not.
"""

import sys
import threading
import time
from traceback import walk_stack

SHARE = 0.01  # of the time since last asked, on the processor, in whichever thread
# Where one waits for others, for compilers, or for a person. An exchange is bounded by collective_timeout.
WAITING = ("/torch/distributed/", "/dllm_rl/distributed.py", "/torch/_inductor/", "/pdb.py")


class Motion:
    """turns  how many times in a row it was asked without any motion."""

    def __init__(self) -> None:
        self.turns = 0
        self._seen: tuple[tuple[object, int], ...] = ()
        self._clocks = (0.0, 0.0)

    def asked(self, works: bool) -> str | None:
        """Look once. The innermost place, file and line, of a main thread that has not moved since the last time; None
        where it has, waits for others, or where it is not known to work."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        frames = [] if frame is None else [each for each, _ in walk_stack(frame)]
        clocks, seen = (time.monotonic(), time.process_time()), tuple((f.f_code, f.f_lasti) for f in frames)
        passed, used = (now - before for now, before in zip(clocks, self._clocks, strict=True))
        waits = any(name in f.f_code.co_filename for f in frames for name in WAITING)
        still = works and not waits and seen == self._seen and used < SHARE * passed
        self._seen, self._clocks = seen, clocks
        self.turns = self.turns + 1 if still else 0
        return f"{frames[0].f_code.co_filename}:{frames[0].f_lineno}" if still and frames else None
