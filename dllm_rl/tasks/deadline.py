"""A time limit on graders: a grader that does not return ends the process, and an error names it."""

import faulthandler
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STATUS = 124  # exit status of the process, as of timeout(1)
GRACE = 5.0  # seconds between the limit and the last resort
EVERY = 1.0  # seconds after which a restart re-arms the last resort


@contextmanager
def deadline(seconds: float, describe: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Yield restart(), to be called before each piece of work.

    A piece longer than `seconds` ends the process with status 124, after `describe()` and the stacks of all threads on
    standard error, without cleanup.
    """
    began = time.monotonic()
    armed = -math.inf
    done = threading.Event()

    def restart() -> None:
        nonlocal began, armed
        began = time.monotonic()
        # Arming starts one thread and joins another, which costs more than grading a short completion.
        if began - armed >= EVERY:
            armed = began
            # For C code that checks no signals: status 1, 4 to 5 s later, with only this stack.
            faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=2)

    def stop_if_late(*_: object) -> None:
        if time.monotonic() - began >= seconds:
            os.write(2, f"{describe()}\n".encode(errors="replace"))
            faulthandler.dump_traceback(file=2)
            os._exit(STATUS)

    def watch() -> None:
        while not done.wait(max(0.0, began + seconds - time.monotonic())):
            stop_if_late()

    threading.Thread(target=watch, daemon=True).start()  # for work that sleeps, waits or runs Python
    restart()
    try:
        # A timer of processor time interrupts C code that blocks the interpreter, such as regular expressions.
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
    before = signal.signal(signal.SIGVTALRM, handle)
    signal.setitimer(signal.ITIMER_VIRTUAL, every, every)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
