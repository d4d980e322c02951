"""Processes that watch one another: one that raises, dies or stops ends the others, with one line that names it.

A thread of each sends its stage to the main process ten times per `peer_timeout`. A dead process closes its connection,
a stopped one falls silent, and one whose main thread stands still (`stall`) reports this.
"""

import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch

from dllm_rl.distributed.collectives import Processes, from_main, gather_objects
from dllm_rl.distributed.stall import Motion
from dllm_rl.distributed.stop import SIGNALS, Stopped
from dllm_rl.screen import escape_controls

STATUS = 75  # exit status after the loss of another process: EX_TEMPFAIL of sysexits.h, "try again"
TURNS = 10  # turns per peer_timeout; more silent turns are a loss
GRACE = 10.0  # seconds, at most, in which a process may end by itself after a loss
SETTLE = 2.0  # seconds to wait for the cause of a failed exchange
MAX_MESSAGE_BYTES = 1 << 16  # bytes per message
STRANGERS = 16  # open connections that have not sent the run's token


@dataclass(eq=False)
class Line:
    """The main process's connection to another one, or another's to it."""

    socket: socket.socket
    process: int = -1  # not yet known
    name: str = "process 0"
    stage: str = "its start"
    quiet: int = 0  # turns of this process without a message; a process that was itself stopped counts none
    buffer: bytes = b""

    def tell(self, **message: Any) -> None:
        with suppress(OSError):  # a full buffer means that the other end does not read: its silence will show
            self.socket.send(json.dumps(message).encode() + b"\n")

    def heard(self) -> Iterator[dict[str, Any]]:
        """The messages received. Raises EOFError at the end, and ValueError on anything else."""
        try:
            while data := self.socket.recv(MAX_MESSAGE_BYTES):
                *lines, self.buffer = (self.buffer + data).split(b"\n")
                yield from map(_message, lines)
                if len(self.buffer) > MAX_MESSAGE_BYTES:
                    raise ValueError("a message without an end")
        except BlockingIOError:
            return
        except OSError:
            pass
        raise EOFError

    def close(self) -> None:
        with suppress(OSError):  # a close with unread bytes resets the connection, and the other end loses its own
            self.socket.recv(MAX_MESSAGE_BYTES)
        self.socket.close()


def _message(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except RecursionError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("no message")
    return found


def of_an_exchange(error: BaseException | None) -> bool:
    """Whether another process or the network is at fault; gloo raises RuntimeError that names its source file."""
    gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return gloo or isinstance(error, torch.distributed.DistError)


@runtime_checkable
class Stages(Protocol):
    """The part of a run's log that the watch uses; it sets `entering`."""

    entering: Callable[[], None]

    @property
    def place(self) -> str: ...
    @property
    def patience(self) -> float: ...


def own_address(towards: str) -> str:
    """This machine's address on the network that leads to `towards`."""
    family, kind, _, _, address = socket.getaddrinfo(towards, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing: a datagram socket
        return str(probe.getsockname()[0])


class Peers:
    """One process's watch over the others. All processes make and enter it together; the run replaces the callbacks."""

    def __init__(self, processes: Processes, *, seconds: float, advice: str) -> None:
        self.stage: Callable[[], str] = lambda: "its start"  # in words
        self.patience: Callable[[], float] = lambda: math.inf  # the main thread may stand still this many `seconds`
        self.save: Callable[[], None] = lambda: None  # before the watch ends this process
        self.hear: Callable[[int], None] = lambda number: None  # takes the signal on which another process leaves
        self._motion = Motion()
        self._index = processes.process_index
        self._seconds = seconds
        self._advice = advice
        self._name = f"process {self._index} ({socket.gethostname()}, pid {os.getpid()})"
        self._main = self._index == 0
        self._lost = threading.Event()
        self._over = threading.Event()
        self._settled = threading.Event()  # set once the cause of a loss is known
        self._line = ""  # what is printed about the loss
        self._mine = False  # whether this process prints it
        self._signal = 0  # that another process leaves on
        self._lines: dict[int, Line] = {}
        self._strangers: list[Line] = []
        self._server: socket.socket | None = None
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._missing = dict.fromkeys(range(1, processes.num_processes), 0) if self._main else {}
        host = "127.0.0.1"
        if os.environ.get("LOCAL_WORLD_SIZE") != str(processes.num_processes):  # several machines
            # The last process is on another machine: listen on the network that leads there.
            host = own_address(gather_objects([own_address(os.environ["MASTER_ADDR"])], processes)[-1])
        host, port, self._token = from_main(lambda: self._listen(host), processes)
        if not self._main:
            self._lines[0] = self._connected(host, port)

    def follow(self, log: Stages) -> None:
        """Read the stages from the log, and send each to the others."""
        self.stage = lambda: log.place
        self.patience = lambda: log.patience
        log.entering = self.tell_stage

    def _listen(self, host: str) -> tuple[str, int, str]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN)
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        return host, self._server.getsockname()[1], secrets.token_hex(16)

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._selector.unregister(self._server)
            self._server.close()
            self._server = None
        for line in [*self._strangers]:
            self._hang_up(line)

    def _connected(self, host: str, port: int) -> Line:
        try:
            made = socket.create_connection((host, port), timeout=self._seconds)
        except OSError as error:
            why = f"process {self._index} cannot reach the main process at {host}:{port}: {error.strerror}"
            text = f"{why}; open the machines' ports to one another, or use --peer_timeout none"
            raise OSError(error.errno, text) from None
        made.setblocking(False)
        line = Line(made, 0)
        line.tell(token=self._token, process=self._index, name=self._name)
        self._selector.register(made, selectors.EVENT_READ, line)
        return line

    def __enter__(self) -> "Peers":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Report to the others how this process ends. Raises Stopped if it ends because another was lost."""
        failed = isinstance(error, Exception)
        exchange = of_an_exchange(error)
        self.hear = lambda number: None  # a signal's handler must not interrupt what follows
        if exchange:
            self._settled.wait(SETTLE)
        self._over.set()
        self.tell_stage()
        self._thread.join()
        farewell = self._farewell(error)
        for line in self._lines.values():
            line.tell(**farewell)
            line.close()
        self._stop_listening()
        for each in (self._waker, self._woken, self._selector):
            each.close()
        if self._lost.is_set() and (exchange or not failed):
            self._say()
            if failed:
                raise Stopped(STATUS) from None
        elif exchange and self._signal:
            raise Stopped(128 + self._signal) from None
        elif exchange and self._main and error is not None:
            error.add_note("; ".join(f"{line.name} was last heard in {line.stage}" for line in self._lines.values()))

    def _farewell(self, error: BaseException | None) -> dict[str, Any]:
        """The last message: an error of this process's own, or an end, with the signal that it leaves on."""
        own = isinstance(error, Exception) and not self._lost.is_set()
        if of_an_exchange(error):  # another process knows the cause; if none has reported it, the main one ends all
            own = own and self._main and not self._signal
        if own:
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300], "stage": self.stage()}
        return {"end": True, "signal": error.args[0] - 128 if isinstance(error, Stopped) else 0}

    def _watch(self) -> None:
        turn = time.monotonic()
        while not self._over.is_set() and not self._lost.is_set():
            for key, _ in self._selector.select(max(0.0, turn - time.monotonic())):
                self._attend(key)
            if time.monotonic() >= turn:
                turn = time.monotonic() + self._seconds / TURNS
                self._take_turn()
        if self._lost.is_set() and not self._over.wait(min(GRACE, self._seconds)):
            self._say()
            self.save()
            if not self._over.is_set():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(STATUS)

    def tell_stage(self) -> None:
        """Send the present stage to the others before the next turn."""
        with suppress(OSError):  # the watch has ended, or is about to wake anyway
            self._waker.send(b".")

    def _attend(self, key: selectors.SelectorKey) -> None:
        if self._selector.get_map().get(key.fd) != key:
            return  # the line was closed after the select
        if key.fileobj is self._server:
            self._accept()
        elif isinstance(key.data, Line):
            self._listen_to(key.data)
        else:
            self._woken.recv(MAX_MESSAGE_BYTES)
            for line in self._lines.values():
                line.tell(stage=self.stage())

    def _accept(self) -> None:
        assert self._server is not None, "a connection comes to a server"
        with suppress(OSError):  # the other end has left
            made, _ = self._server.accept()
            made.setblocking(False)
            self._strangers.append(Line(made))
            self._selector.register(made, selectors.EVENT_READ, self._strangers[-1])
        if len(self._strangers) > STRANGERS:  # a process of the run sends the token at once: drop the oldest
            self._hang_up(self._strangers[0])

    def _listen_to(self, line: Line) -> None:
        try:
            for message in line.heard():
                line.quiet = 0
                if line.process < 0:
                    self._let_in(line, message)
                self._take(line, message)
                if line.socket.fileno() < 0:
                    return
        except (EOFError, ValueError):
            self._hang_up(line)
            if line.process >= 0:
                text = f"{line.name} is gone, last heard in {line.stage}"
                self._lose(f"{text}; its own last words, if any, say why", line)

    def _let_in(self, line: Line, message: dict[str, Any]) -> None:
        """Raises ValueError if the sender is no process of the run."""
        token = message.get("token")
        process = message.get("process")
        if not isinstance(token, str) or not secrets.compare_digest(token.encode(), self._token.encode()):
            raise ValueError("a stranger")
        if type(process) is not int or self._missing.pop(process, None) is None:
            raise ValueError("no process that is missing")
        line.process = process
        self._lines[process] = line
        self._strangers.remove(line)
        line.tell(name=self._name)
        if not self._missing:
            self._stop_listening()

    def _take(self, line: Line, message: dict[str, Any]) -> None:
        line.name = str(message.get("name", line.name))[:200]
        line.stage = str(message.get("stage", line.stage))[:200]
        if "failed" in message:
            text = f"{line.name} raised {str(message['failed'])[:300]}, in {line.stage}"
            self._lose(text, line, said=line.process == 0)
        elif "still" in message:
            self._lose(str(message["still"])[:1000], line)
        elif "lost" in message:
            self._lose(str(message["lost"])[:1000], line, said=True)
        elif "end" in message:
            self._hang_up(line)
        if message.get("signal") in SIGNALS:
            self._hear(message["signal"])

    def _hear(self, number: int) -> None:
        """Another process leaves on a signal: pass the signal on to this one, and from the main one to all."""
        if self._signal:
            return
        self._signal = number
        for line in self._lines.values() if self._main else ():
            line.tell(signal=number)
        self._settled.set()
        self.hear(number)

    def _hang_up(self, line: Line) -> None:
        self._lines.pop(line.process, None)
        if line in self._strangers:
            self._strangers.remove(line)
        self._selector.unregister(line.socket)
        line.close()

    def _take_turn(self) -> None:
        for line in self._lines.values():
            line.tell(stage=self.stage())
            line.quiet += 1
        for process in self._missing:
            self._missing[process] += 1
        for line in [line for line in self._lines.values() if line.quiet > TURNS]:
            text = f"{line.name} has been silent for peer_timeout={self._seconds:g} s, last heard in {line.stage}"
            self._lose(f"{text}: stopped, cut off, or held up in C code that keeps the interpreter", line)
        place = self._motion.asked()
        if self._motion.turns >= TURNS * self.patience():
            self._stand_still(place)
        if late := [process for process, turns in self._missing.items() if turns > TURNS]:
            self._lose(f"process {late[0]} has not joined in peer_timeout={self._seconds:g} s")

    def _stand_still(self, place: str) -> None:
        """Report this process's own stall to the main one, which prints the report."""
        seconds = self._motion.turns * self._seconds / TURNS
        text = f"{self._name} has stood still for {seconds:g} s (peer_timeout={self._seconds:g}) at {place}"
        text += f", in {self.stage()}"
        if not self._main:
            self._lines[0].tell(still=text)
        self._lose(text, said=not self._main)

    def _lose(self, text: str, line: Line | None = None, *, said: bool = False) -> None:
        """Another process is lost. The main one prints the line; without it, the second and one per machine do."""
        if self._lost.is_set():
            return
        self._line = f"error: {escape_controls(text)}; {self._advice}"
        self._mine = not said and (self._main or self._index == 1 or os.environ.get("LOCAL_RANK") == "0")
        for other in [*self._lines.values()] if self._main else ():
            if other is not line:
                other.tell(lost=text)
        self._lost.set()
        self._settled.set()

    def _say(self) -> None:
        if self._mine:
            self._mine = False
            os.write(2, f"\n{self._line}\n".encode(errors="replace"))
