"""Failure detection between processes: if one raises, dies or is stopped, the others end with a message that names it.

A thread in each process exchanges heartbeats with the main process, `TICKS_PER_TIMEOUT` times per `peer_timeout`. The
connection to a dead process closes, and a stopped process sends no heartbeats.
"""

import json
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
from dllm_rl.distributed.stop import SIGNALS, Stopped
from dllm_rl.screen import escape_controls

EXIT_STATUS = 75  # after the loss of another process: EX_TEMPFAIL of sysexits.h, "try again"
TICKS_PER_TIMEOUT = 10  # a process that sends nothing for more ticks than this is lost
MAX_GRACE = 10.0  # seconds in which a process may end by itself after a loss, at most
CAUSE_TIMEOUT = 2.0  # seconds to wait for another process to report why a collective failed
MAX_MESSAGE_BYTES = 1 << 16
MAX_UNAUTHENTICATED = 16  # open connections that have not sent the run's token yet


@dataclass(eq=False)
class PeerConnection:
    """A connection between the main process and another one, and what the other end has said about itself."""

    socket: socket.socket
    process: int = -1  # rank of the other end; -1: it has not sent the token yet
    name: str = "process 0"
    stage: str = "its start"
    # Ticks of this process since the last message. They are not seconds: a process that was itself stopped by a
    # debugger or the scheduler has no ticks, and so does not report the others as lost.
    silent_ticks: int = 0
    buffer: bytes = b""

    def send(self, **message: Any) -> None:
        with suppress(OSError):  # the buffer is full, because the other end hangs: its silence will be detected
            self.socket.send(json.dumps(message).encode() + b"\n")

    def receive_messages(self) -> Iterator[dict[str, Any]]:
        """Yield the messages that have arrived. Raise EOFError if the connection is closed, ValueError on garbage."""
        try:
            while data := self.socket.recv(MAX_MESSAGE_BYTES):
                *lines, self.buffer = (self.buffer + data).split(b"\n")
                yield from map(_message, lines)
                if len(self.buffer) > MAX_MESSAGE_BYTES:
                    raise ValueError("the message is too long")
        except BlockingIOError:
            return
        except OSError:
            pass
        raise EOFError

    def close(self) -> None:
        with suppress(OSError):  # closing with unread bytes would reset the connection, and lose what was sent
            self.socket.recv(MAX_MESSAGE_BYTES)
        self.socket.close()


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except RecursionError:
        message = None
    if not isinstance(message, dict):
        raise ValueError("not a JSON object")
    return message


def is_collective_error(error: BaseException | None) -> bool:
    """Return whether a collective failed, so that another process or the network is at fault.

    gloo raises a plain RuntimeError, which can only be recognized by the source file in its message.
    """
    is_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return is_gloo or isinstance(error, torch.distributed.DistError)


@runtime_checkable
class Stages(Protocol):
    """The part of `RunLog` that `Peers` uses. `Peers` sets `entering`."""

    entering: Callable[[], None]

    @property
    def place(self) -> str: ...


def own_address(towards: str) -> str:
    """Return this machine's address on the network that leads to the host `towards`."""
    family, kind, _, _, address = socket.getaddrinfo(towards, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # UDP: chooses a route, but sends nothing
        return str(probe.getsockname()[0])


class Peers:
    """Watches the other processes from a background thread, as a context manager.

    All processes must construct and enter it together (constructing is a collective). The run replaces the callbacks.

    Args:
        processes: Processes of the run.
        seconds: The run's `peer_timeout`.
        advice: End of the message about a loss: how to continue the run.
    """

    def __init__(self, processes: Processes, *, seconds: float, advice: str) -> None:
        self.stage: Callable[[], str] = lambda: "its start"  # returns the present stage in words
        self.save: Callable[[], None] = lambda: None  # called before the thread ends this process
        self.hear: Callable[[int], None] = lambda number: None  # called with the signal that ends another process
        self._index = processes.process_index
        self._seconds = seconds
        self._advice = advice
        self._name = f"process {self._index} ({socket.gethostname()}, pid {os.getpid()})"
        self._main = self._index == 0
        self._lost = threading.Event()  # another process is lost
        self._leaving = threading.Event()  # this process leaves the context
        self._settled = threading.Event()  # the cause of a loss is known
        self._loss_message = ""
        self._prints_loss = False  # whether this process prints `_loss_message`
        self._signal = 0  # signal that ends another process; 0: none
        self._connections: dict[int, PeerConnection] = {}  # by rank
        self._unauthenticated: list[PeerConnection] = []
        self._server: socket.socket | None = None
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._wake_sender.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        # Ranks that have not connected yet, and how many ticks the main process has waited for them.
        self._missing = dict.fromkeys(range(1, processes.num_processes), 0) if self._main else {}
        host = "127.0.0.1"
        if os.environ.get("LOCAL_WORLD_SIZE") != str(processes.num_processes):  # several machines
            # The last process is on another machine: listen on the network that leads there.
            host = own_address(gather_objects([own_address(os.environ["MASTER_ADDR"])], processes)[-1])
        host, port, self._token = from_main(lambda: self._listen(host), processes)
        if not self._main:
            self._connections[0] = self._connected(host, port)

    def follow(self, log: Stages) -> None:
        """Take the stage from a log, and send each stage to the others when it begins."""
        self.stage = lambda: log.place
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
        for connection in [*self._unauthenticated]:
            self._close_connection(connection)

    def _connected(self, host: str, port: int) -> PeerConnection:
        try:
            made = socket.create_connection((host, port), timeout=self._seconds)
        except OSError as error:
            why = f"process {self._index} cannot reach the main process at {host}:{port}: {error.strerror}"
            text = f"{why}; open the machines' ports to one another, or use --peer_timeout none"
            raise OSError(error.errno, text) from None
        made.setblocking(False)
        connection = PeerConnection(made, 0)
        connection.send(token=self._token, process=self._index, name=self._name)
        self._selector.register(made, selectors.EVENT_READ, connection)
        return connection

    def __enter__(self) -> "Peers":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others how this process ends. Raise Stopped if it ends because another process was lost."""
        failed = isinstance(error, Exception)
        is_collective = is_collective_error(error)
        self.hear = lambda number: None  # a signal handler must not interrupt what follows
        if is_collective:
            self._settled.wait(CAUSE_TIMEOUT)
        self._leaving.set()
        self.tell_stage()
        self._thread.join()
        farewell = self._farewell(error)
        for connection in self._connections.values():
            connection.send(**farewell)
            connection.close()
        self._stop_listening()
        for resource in (self._wake_sender, self._wake_receiver, self._selector):
            resource.close()
        if self._lost.is_set() and (is_collective or not failed):
            self._print_loss()
            if failed:
                raise Stopped(EXIT_STATUS) from None
        elif is_collective and self._signal:
            raise Stopped(128 + self._signal) from None
        elif is_collective and self._main and error is not None:
            others = self._connections.values()
            error.add_note("; ".join(f"{other.name} was last heard in {other.stage}" for other in others))

    def _farewell(self, error: BaseException | None) -> dict[str, Any]:
        """Return the last message to the others: its own error, or that it ends, and on which signal."""
        is_own_error = isinstance(error, Exception) and not self._lost.is_set()
        # A failed collective has its cause in another process. If no process has reported a cause, the main one reports
        # the failure, so that all end.
        if is_collective_error(error):
            is_own_error = is_own_error and self._main and not self._signal
        if is_own_error:
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300], "stage": self.stage()}
        return {"end": True, "signal": error.args[0] - 128 if isinstance(error, Stopped) else 0}

    def _watch(self) -> None:
        next_tick = time.monotonic()
        while not self._leaving.is_set() and not self._lost.is_set():
            for key, _ in self._selector.select(max(0.0, next_tick - time.monotonic())):
                self._handle_event(key)
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + self._seconds / TICKS_PER_TIMEOUT
                self._tick()
        if self._lost.is_set() and not self._leaving.wait(min(MAX_GRACE, self._seconds)):
            self._print_loss()
            self.save()
            if not self._leaving.is_set():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(EXIT_STATUS)

    def tell_stage(self) -> None:
        """Send the present stage to the others now, not only at the next tick."""
        with suppress(OSError):  # the thread has ended, or has unread wake-ups already
            self._wake_sender.send(b".")

    def _handle_event(self, key: selectors.SelectorKey) -> None:
        if self._selector.get_map().get(key.fd) != key:
            return  # an earlier event of the same select has closed this connection
        if key.fileobj is self._server:
            self._accept()
        elif isinstance(key.data, PeerConnection):
            self._read_messages(key.data)
        else:
            self._wake_receiver.recv(MAX_MESSAGE_BYTES)
            for connection in self._connections.values():
                connection.send(stage=self.stage())

    def _accept(self) -> None:
        assert self._server is not None, "only a server accepts connections"
        with suppress(OSError):  # the other end has left
            made, _ = self._server.accept()
            made.setblocking(False)
            self._unauthenticated.append(PeerConnection(made))
            self._selector.register(made, selectors.EVENT_READ, self._unauthenticated[-1])
        # Processes of the run send the token at once, so the oldest connection without a token is not one of them.
        if len(self._unauthenticated) > MAX_UNAUTHENTICATED:
            self._close_connection(self._unauthenticated[0])

    def _read_messages(self, connection: PeerConnection) -> None:
        try:
            for message in connection.receive_messages():
                connection.silent_ticks = 0
                if connection.process < 0:
                    self._authenticate(connection, message)
                self._handle_message(connection, message)
                if connection.socket.fileno() < 0:
                    return
        except (EOFError, ValueError):
            self._close_connection(connection)
            if connection.process >= 0:
                text = f"{connection.name} is gone, last heard in {connection.stage}"
                self._report_loss(f"{text}; its own last words, if any, say why", connection)

    def _authenticate(self, connection: PeerConnection, message: dict[str, Any]) -> None:
        """Register the sender as a process of the run. Raise ValueError if it is not a missing one."""
        token = message.get("token")
        process = message.get("process")
        if not isinstance(token, str) or not secrets.compare_digest(token.encode(), self._token.encode()):
            raise ValueError("not the run's token")
        if type(process) is not int or self._missing.pop(process, None) is None:
            raise ValueError("not a missing process")
        connection.process = process
        self._connections[process] = connection
        self._unauthenticated.remove(connection)
        connection.send(name=self._name)
        if not self._missing:
            self._stop_listening()

    def _handle_message(self, connection: PeerConnection, message: dict[str, Any]) -> None:
        connection.name = str(message.get("name", connection.name))[:200]
        connection.stage = str(message.get("stage", connection.stage))[:200]
        if "failed" in message:
            text = f"{connection.name} raised {str(message['failed'])[:300]}, in {connection.stage}"
            self._report_loss(text, connection, is_reported=connection.process == 0)
        elif "lost" in message:
            self._report_loss(str(message["lost"])[:1000], connection, is_reported=True)
        elif "end" in message:
            self._close_connection(connection)
        if message.get("signal") in SIGNALS:
            self._handle_signal(message["signal"])

    def _handle_signal(self, number: int) -> None:
        """Handle that a signal ends another process: call `hear`, and in the main process tell all others."""
        if self._signal:
            return
        self._signal = number
        for connection in self._connections.values() if self._main else ():
            connection.send(signal=number)
        self._settled.set()
        self.hear(number)

    def _close_connection(self, connection: PeerConnection) -> None:
        self._connections.pop(connection.process, None)
        if connection in self._unauthenticated:
            self._unauthenticated.remove(connection)
        self._selector.unregister(connection.socket)
        connection.close()

    def _tick(self) -> None:
        for connection in self._connections.values():
            connection.send(stage=self.stage())
            connection.silent_ticks += 1
        for process in self._missing:
            self._missing[process] += 1
        connections = self._connections.values()
        for silent in [connection for connection in connections if connection.silent_ticks > TICKS_PER_TIMEOUT]:
            text = f"{silent.name} has been silent for peer_timeout={self._seconds:g} s, last heard in {silent.stage}"
            self._report_loss(f"{text}: stopped, cut off, or held up in C code that keeps the interpreter", silent)
        if late := [process for process, ticks in self._missing.items() if ticks > TICKS_PER_TIMEOUT]:
            self._report_loss(f"process {late[0]} has not joined in peer_timeout={self._seconds:g} s")

    def _report_loss(self, text: str, connection: PeerConnection | None = None, *, is_reported: bool = False) -> None:
        """Record that a process is lost, and tell the others.

        The main process prints the message. If the main process is lost, process 1 and the first process of each
        machine do.

        Args:
            text: Message that names the lost process.
            connection: Connection of the lost process, which is not told.
            is_reported: Whether another process prints the message.
        """
        if self._lost.is_set():
            return
        self._loss_message = f"error: {escape_controls(text)}; {self._advice}"
        self._prints_loss = not is_reported and (self._main or self._index == 1 or os.environ.get("LOCAL_RANK") == "0")
        for other in [*self._connections.values()] if self._main else ():
            if other is not connection:
                other.send(lost=text)
        self._lost.set()
        self._settled.set()

    def _print_loss(self) -> None:
        if self._prints_loss:
            self._prints_loss = False
            os.write(2, f"\n{self._loss_message}\n".encode(errors="replace"))
