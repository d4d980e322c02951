"""A time limit on graders: if a grader does not return in time, the process prints an error and ends."""

import faulthandler
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STATUS = 124  # exit status of the process, like that of timeout(1)
# C code that never checks for signals is ended by faulthandler's timer, which runs without the interpreter.
GRACE = 5.0  # seconds from the limit until this timer fires
REARM_SECONDS = 1.0  # `restart` sets the timer again only after this time


@contextmanager
def deadline(seconds: float, describe: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Yield restart(), to be called before each piece of work.

    If a piece of work takes longer than `seconds`, `describe()` and the stacks of all threads are printed on standard
    error, and the process ends with status 124, without cleanup.
    """
    start = time.monotonic()
    timer_set_at = -math.inf
    done = threading.Event()

    def restart() -> None:
        nonlocal start, timer_set_at
        start = time.monotonic()
        # Setting the timer starts one thread and joins another, which costs more than grading a short completion.
        if start - timer_set_at >= REARM_SECONDS:
            timer_set_at = start
            # If it fires, 4 to 5 s after the limit, it prints the stacks without `describe()` and exits with status 1.
            faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=2)

    def stop_if_late(*_: object) -> None:
        if time.monotonic() - start >= seconds:
            os.write(2, f"{describe()}\n".encode(errors="replace"))
            faulthandler.dump_traceback(file=2)
            os._exit(STATUS)

    def watch() -> None:
        while not done.wait(max(0.0, start + seconds - time.monotonic())):
            stop_if_late()

    threading.Thread(target=watch, daemon=True).start()  # stops work that sleeps, waits or runs Python
    restart()
    try:
        # A timer of processor time interrupts C code that holds the interpreter's lock, such as regular expressions.
        with _interrupting(stop_if_late, every=min(1.0, seconds)):
            yield restart
    finally:
        done.set()
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _interrupting(handle: Callable[..., None], *, every: float) -> Iterator[None]:
    """Call `handle` every `every` seconds of processor time; do nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    previous_handler = signal.signal(signal.SIGVTALRM, handle)
    signal.setitimer(signal.ITIMER_VIRTUAL, every, every)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous_handler)
