"""Stop a run on a signal, after the current step or at once, and clean up its signal handlers and folder lock."""

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import torch
from accelerate import Accelerator

from dllm_rl.distributed.collectives import collective
from dllm_rl.files import remove, unlock
from dllm_rl.screen import interactive, printing_anything

ALARM: Any = getattr(signal, "SIGALRM", None)  # Windows lacks it, some of NAMES, and the next
pthread_sigmask: Any = getattr(signal, "pthread_sigmask", lambda how, numbers: numbers)
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # SLURM's --signal=USR1@SECONDS sends the last before the time limit
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
LOCK = ".lock"
_EXIT_STACK: ContextVar[ExitStack] = ContextVar("closes when the run ends")
_BY_COMMAND: ContextVar[bool] = ContextVar("whether a command line started the run", default=False)


Train = TypeVar("Train", bound=Callable[..., Any])


class Stopped(BaseException):
    """Ends the run with an exit status. It is not a SystemExit, because the run catches those of graders.

    `summary` is what a notebook gets after a Ctrl-C in place of the exit: the run's summary, with the policy of the
    last complete step. None: the weights are not those of a complete step.
    """

    summary: Any = None


class Stop:
    """Installs signal handlers, after which a signal ends the run after the current step. A process that is forked
    during the run has the handlers that were there before it.

    Args:
        seconds: The run's `stop_seconds`. If a step takes longer than this after the signal, `overdue` is called.
        main: Whether this is the main process, which prints.
    """

    def __init__(self, *, seconds: float, main: bool) -> None:
        self.seconds = seconds
        self.main = main
        self.received = 0  # number of the signal that this process has received; 0: none
        self.last_words: str | None = None  # if set, a signal ends the process at once, and prints this
        self.overdue: Callable[[], None] = lambda: None  # called by a timer, once a second from then on
        self.is_leaving = False  # the run does not wait for the step any more; another Ctrl-C does not wait for a save
        self.deadline: float | None = None  # time.monotonic() at which `overdue` is called; None: no signal yet
        self.process = os.getpid()
        self.before: dict[int, Any] = {}  # the handlers that this object replaces
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.getsignal(number) for number in SIGNALS}
            self.blocked = pthread_sigmask(signal.SIG_BLOCK, ())
            self.arm()

    def arm(self) -> None:
        """Set the handlers, and after a signal the timer that calls `overdue`. Call it after user code, too, which may
        have replaced them or blocked the signals: a grader with a time limit of its own uses the same timer. Does
        nothing in another thread, and in a forked process, which may call graders too.
        """
        is_main_thread = threading.current_thread() is threading.main_thread()
        if not self.before or not is_main_thread or os.getpid() != self.process:
            return
        for number, handler in self.before.items():
            is_ignored = number != signal.SIGINT and handler == signal.SIG_IGN  # SIGHUP under nohup
            signal.signal(number, signal.SIG_IGN if is_ignored else self._hear)
        pthread_sigmask(signal.SIG_SETMASK, self.blocked)
        self._set_timer()

    def _set_timer(self) -> None:
        if self.deadline is not None and ALARM is not None:
            signal.signal(ALARM, lambda number, frame: self.overdue())
            signal.setitimer(signal.ITIMER_REAL, max(self.deadline - time.monotonic(), 1e-3), 1.0)

    def handler_before(self, number: int) -> Any:
        """Return the handler of a signal from before the run, also if this run was started within another one."""
        handler = self.before[number]
        outer = getattr(handler, "__self__", None)
        handler = outer.handler_before(number) if isinstance(outer, Stop) else handler
        return signal.SIG_DFL if handler is None else handler  # None: not Python's, and it cannot be set again

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a forked process: of before `_as_before_runs`, or by a handler around this
            signal.signal(number, self.handler_before(number))
            os.kill(os.getpid(), number)
            return
        is_second_ctrl_c = self.received == number == signal.SIGINT
        if self.last_words is not None or is_second_ctrl_c:
            self.received = number
            if self.last_words is None and not self.is_leaving:
                self.is_leaving = True
                self.disarm()
                self.overdue()
            self.leave(self.last_words or "stopped at once by Ctrl-C: nothing after the newest checkpoint was saved")
        if not self.received:
            self.received = number
            self._say(f"{signal.Signals(number).name}: stopping after the current step")
            self.deadline = time.monotonic() + self.seconds
            self._set_timer()  # replaces the timer of a grader's time limit

    def hear_from_another(self, number: int) -> None:
        """Raise a signal that ends another process in this one too, unless this process has received a signal."""
        if not self.received and signal.getsignal(number) == self._hear:
            os.kill(os.getpid(), number)

    @collective
    def agreed(self, accelerator: Accelerator) -> int:
        """Return a signal that any process has received, the same in all processes; 0: none."""
        if accelerator.num_processes == 1:
            return self.received
        own_signal = torch.tensor([self.received], device=accelerator.device)
        agreed_signal = int(accelerator.gather(own_signal).max())
        if agreed_signal:  # else a signal that arrived during the gather must not be overwritten with 0
            self.received = agreed_signal
        return agreed_signal

    def leave_at_once(self, text: str) -> None:
        """From now on, let a signal end the process at once and print `text`; end it now if one has arrived."""
        self.last_words = text
        if self.received:
            self.leave(text)

    def leave(self, text: str) -> NoReturn:
        """Print a text and end the process with the signal's exit status."""
        self.disarm()
        self.last_words = None  # another signal, for example from a launcher, must not interrupt the clean-up
        self._say(text)
        raise Stopped(128 + self.received)

    def disarm(self) -> None:
        """Stop the timer that calls `overdue`."""
        if self.deadline is not None and ALARM is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.deadline = None

    def _say(self, text: str) -> None:
        # Not sys.stdout, because the signal handler may have interrupted a write to it. The escape code shows the
        # cursor, which progress bars hide.
        if self.main:
            os.write(1, f"{chr(27) + '[?25h' if os.isatty(1) else ''}\n{text}\n".encode(errors="replace"))


def _as_before_runs() -> None:
    """Give a forked process the signal handlers that its parent had before its runs: it is not part of the run."""
    for number in SIGNALS:
        stop = getattr(signal.getsignal(number), "__self__", None)
        if isinstance(stop, Stop):
            signal.signal(number, stop.handler_before(number))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_as_before_runs)


def how_to_continue(directory: str) -> str:
    """Return advice on how to resume the run in this folder, for messages."""
    return f"continue with {as_written(resume_from_checkpoint='latest', output_dir=directory)}"


@contextmanager
def started_by_command() -> Iterator[None]:
    """In the block, messages advise command-line options (--name value). Elsewhere they advise Python keywords."""
    before = _BY_COMMAND.set(True)
    try:
        yield
    finally:
        _BY_COMMAND.reset(before)


def as_written(**settings: Any) -> str:
    """Return settings as the user who started the run writes them: `--name value`, or `name='value'` in Python."""
    if not _BY_COMMAND.get():
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())
    words = {name: str(value).lower() if value is False else value for name, value in settings.items()}
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in words.items())


def option_as_written(setting: str, method: str | None, option: str, value: Any) -> str:
    """Return an option of a method as the user who started the run writes it.

    Args:
        setting: Field of the recipe that holds the method.
        method: Name of the method, if the user has to select it too. None: the run uses it already.
        option: Name of the option.
        value: Value of the option.
    """
    if not _BY_COMMAND.get():
        return f"{setting}={method}({option}={value!r})" if method else f"{option}={value!r} in {setting}"
    return (f"--{setting} {method} " if method else "") + f"--{setting}.{option} {value}"


def run_exit_stack() -> ExitStack:
    """Return the exit stack that closes when the current run ends, also on errors. Without a run: a new stack."""
    return _EXIT_STACK.get(None) or ExitStack()


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Restore the signal handlers after the block, and stop the timer. Does nothing outside of the main thread."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    numbers = [*SIGNALS, ALARM] if ALARM is not None else SIGNALS
    before = {number: signal.getsignal(number) for number in numbers if is_main_thread}
    try:
        yield
    finally:
        if ALARM in before and signal.getsignal(ALARM) is not before[ALARM]:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_folder(directory: Path) -> None:
    """Unlock a run's folder. Delete it if it is empty, because the recipe was refused before anything was written."""
    lock = directory / LOCK
    unlock(lock)
    with suppress(FileNotFoundError):  # another process of the run deletes it at the same time
        if lock.exists() and not any(path != lock for path in directory.iterdir()):
            remove(directory)


def _destroy_process_group(process: int) -> None:
    """Destroy the process group, if there is one. Its threads could otherwise crash a process that exits."""
    if os.getpid() == process and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leaving_nothing_behind(train: Train) -> Train:
    """Decorate `train` to restore the signal handlers and to unlock the run's folder at its end, also on errors.

    After a run, the process group stays usable until Python exits, and is destroyed then.
    """

    @wraps(train)
    def wrapped(recipe: Any, *others: Any, **options: Any) -> Any:
        exit_stack = ExitStack()
        outer_run = _EXIT_STACK.set(exit_stack)
        try:
            with printing_anything(), handlers_kept(), exit_stack:
                returned = train(recipe, *others, **options)
            # Only after a run without an error: with a process lost, this could wait for it.
            atexit.unregister(_destroy_process_group)
            atexit.register(_destroy_process_group, os.getpid())  # not in a forked process, which has no threads of it
            return returned
        except Stopped as stopped:
            if interactive():  # a notebook would not show the status of a SystemExit
                if stopped.args[0] == 128 + signal.SIGINT and stopped.summary is not None:
                    return stopped.summary
                raise KeyboardInterrupt(f"status {stopped.args[0]}") from None
            raise SystemExit(*stopped.args) from None
        finally:
            _EXIT_STACK.reset(outer_run)
            leave_folder(Path(recipe.directory))

    return cast(Train, wrapped)
