"""Stopping a run: a signal ends it after the current step, or at once; neither locks nor handlers stay behind."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar, runtime_checkable

import torch
from accelerate import Accelerator

from dllm_rl.files import remove, unlock
from dllm_rl.screen import interactive

ALARM: Any = getattr(signal, "SIGALRM", None)  # Windows lacks it, and some of those below
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # SLURM's --signal=USR1@SECONDS warns with the last
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
LOCK = ".lock"
_ENDING: ContextVar[ExitStack] = ContextVar("what ends with the run")
_BY_COMMAND: ContextVar[bool] = ContextVar("whether a command line started the run", default=False)


@runtime_checkable
class HasFolder(Protocol):
    @property
    def directory(self) -> str: ...


Returned = TypeVar("Returned")
Record = TypeVar("Record", bound=HasFolder)
Others = ParamSpec("Others")


class Stopped(BaseException):
    """Ends the run with a status. It is no SystemExit, which a grader may raise and the run catches."""


class Stop:
    """A process's request to stop: a signal ends the run after the step; `overdue` is called after `seconds`."""

    def __init__(self, *, seconds: float, main: bool) -> None:
        self.seconds = seconds
        self.main = main
        self.asked = 0
        self.last_words: str | None = None  # while set, any signal ends the process at once: nothing is left to save
        self.overdue: Callable[[], None] = lambda: None
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:  # SIGHUP under nohup
                continue
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again = self.asked == number == signal.SIGINT
        if self.last_words is not None or again:
            self.asked = number
            self.leave(self.last_words or "stopped at once by a second Ctrl-C: the current step was not saved")
        if not self.asked:
            self.asked = number
            self._say(f"{signal.Signals(number).name}: stopping after the current step")
            if ALARM is not None:  # until now it was the graders'
                signal.signal(ALARM, lambda number, frame: self.overdue())
                signal.setitimer(signal.ITIMER_REAL, max(self.seconds, 1e-3), 1.0)

    def hear_from_another(self, number: int) -> None:
        """Another process leaves on the signal: raise it here too, unless this process has received one."""
        if not self.asked and signal.getsignal(number) == self._hear:
            os.kill(os.getpid(), number)

    def agreed(self, accelerator: Accelerator) -> int:
        """A signal that any process has received, 0 for none; the same in all processes. An exchange."""
        if accelerator.num_processes == 1:
            return self.asked
        received = torch.tensor([self.asked], device=accelerator.device)
        found = int(accelerator.gather(received).max())
        if found:  # if not, a signal that came during the exchange is kept for the next call
            self.asked = found
        return found

    def leave_at_once(self, text: str) -> None:
        """From here on a signal ends the process at once, with `text`; an earlier signal does so now."""
        self.last_words = text
        if self.asked:
            self.leave(text)

    def leave(self, text: str) -> NoReturn:
        """End the process with the signal's status, after one line."""
        self.disarm()
        self.last_words = None  # a further signal (a launcher's) must not interrupt the run's clean-up
        self._say(text)
        raise Stopped(128 + self.asked)

    def disarm(self) -> None:
        if self.asked and ALARM is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _say(self, text: str) -> None:
        # Not sys.stdout: the handler may have interrupted a write to it. Progress bars hide the cursor.
        if self.main:
            os.write(1, f"{chr(27) + '[?25h' if os.isatty(1) else ''}\n{text}\n".encode(errors="replace"))


def how_to_continue(recipe: HasFolder) -> str:
    return f"continue with {as_written(resume_from_checkpoint='latest', output_dir=recipe.directory)}"


@contextmanager
def started_by_command() -> Iterator[None]:
    """In the block, advice names options of a command line; elsewhere keywords of the call that started the run."""
    before = _BY_COMMAND.set(True)
    try:
        yield
    finally:
        _BY_COMMAND.reset(before)


def as_written(**settings: Any) -> str:
    """Settings as whoever started the run writes them: `--name value`, or `name='value'`."""
    if not _BY_COMMAND.get():
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())
    words = {name: str(value).lower() if value is False else value for name, value in settings.items()}
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in words.items())


def option_as_written(setting: str, method: str | None, option: str, value: Any) -> str:
    """An option of a method as whoever started the run writes it; `method` where the run does not name it already."""
    if not _BY_COMMAND.get():
        return f"{setting}=partial({method}, {option}={value!r})" if method else f"{option}={value!r} in {setting}"
    return (f"--{setting} {method} " if method else "") + f"--{setting}.{option} {value}"


def with_the_run() -> ExitStack:
    """A stack that closes when the present run ends, however it ends; outside of a run nothing closes it."""
    return _ENDING.get(None) or ExitStack()


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Restore the signals' handlers and their timer after the block; a thread has none."""
    main = threading.current_thread() is threading.main_thread()
    numbers = [*SIGNALS, ALARM] if ALARM is not None else SIGNALS
    before = {number: signal.getsignal(number) for number in numbers if main}
    try:
        yield
    finally:
        if ALARM in before and signal.getsignal(ALARM) is not before[ALARM]:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_folder(directory: Path) -> None:
    """Unlock a run's folder, and delete it if it holds nothing else: a recipe was refused."""
    lock = directory / LOCK
    unlock(lock)
    with suppress(FileNotFoundError):  # another process of the run deletes it at the same time
        if lock.exists() and not any(path != lock for path in directory.iterdir()):
            remove(directory)


def leaving_nothing_behind(
    train: Callable[Concatenate[Record, Others], Returned],
) -> Callable[Concatenate[Record, Others], Returned]:
    """`train`, which restores the signal handlers and unlocks the run's folder however it ends."""

    @wraps(train)
    def wrapped(recipe: Record, *others: Others.args, **options: Others.kwargs) -> Returned:
        ending = ExitStack()
        before_this = _ENDING.set(ending)
        try:
            with handlers_kept(), ending:
                return train(recipe, *others, **options)
        except Stopped as stopped:
            if interactive():  # a notebook goes on, and would hide a SystemExit's status
                raise KeyboardInterrupt(f"status {stopped.args[0]}") from None
            raise SystemExit(*stopped.args) from None
        finally:
            _ENDING.reset(before_this)
            leave_folder(Path(recipe.directory))

    return wrapped
