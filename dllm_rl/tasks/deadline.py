"""A time limit on graders: a reward that does not come back ends the process, and says which one it was."""

import faulthandler
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

STATUS = 124  # the process's exit status, that of timeout(1)
GRACE = 5.0  # seconds between the limit and the last resort
EVERY = 1.0  # seconds after which a restart arms the last resort again


@contextmanager
def deadline(seconds: float, describe: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Yields restart(), to be called before each piece of work. One that takes longer than `seconds` ends the process
    with status 124, after a line on standard error, `describe()`, and the stacks of all threads.

    A thread cannot be killed, so that the process ends as it is, without clean-up. A thread watches work that sleeps,
    waits or runs Python; a timer of processor time interrupts C code that holds the interpreter but looks for signals,
    as regular expressions do. C code that does neither is ended by faulthandler 4 to 5 s later, with its stack alone
    and status 1.
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
            faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=2)

    def stop_if_late(*_: object) -> None:
        if time.monotonic() - began >= seconds:
            os.write(2, f"{describe()}\n".encode(errors="replace"))
            faulthandler.dump_traceback(file=2)
            os._exit(STATUS)

    def watch() -> None:
        while not done.wait(max(0.0, began + seconds - time.monotonic())):
            stop_if_late()

    threading.Thread(target=watch, daemon=True).start()
    restart()
    try:
        with _interrupting(stop_if_late, every=min(1.0, seconds)):
            yield restart
    finally:
        done.set()
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _interrupting(handle: Callable[..., None], *, every: float) -> Iterator[None]:
    """Call `handle` after every so many seconds of processor time; only a process's main thread can."""
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


def unlimited() -> AbstractContextManager[Callable[[], None]]:
    """In the place of a deadline: restart() does nothing."""
    return nullcontext(lambda: None)
