"""A sign of life from stages that take long."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST = 60.0  # seconds until the first sign; each that follows comes after twice the time


@contextmanager
def heartbeat(stage: str, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """While the block runs, say what it is and for how long it has been: after 60 s, 120 s, 240 s ...

    Every process says it of itself, on standard error unless `say` is given; where processes wait for one that is
    stuck, its line names the stage, and one that is frozen is the one without a line.
    """
    done, began, rank = threading.Event(), time.monotonic(), os.environ.get("RANK", "0")

    def beat() -> None:
        passed = FIRST
        while not done.wait(max(0.0, began + passed - time.monotonic())):
            line = f"process {rank}: {stage} has taken {passed:g} s so far"
            say(line) if say else print(line, file=sys.stderr, flush=True)
            passed *= 2

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        done.set()
