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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from dllm_rl.distributed.collectives import Processes, from_main, gather_objects
from dllm_rl.distributed.stop import Stopped
from dllm_rl.screen import escape_controls

EXIT_STATUS = 75  # after the loss of another process: EX_TEMPFAIL of sysexits.h, "try again"
TICKS_PER_TIMEOUT = 10  # a process that sends nothing for more ticks than this is lost
MAX_GRACE = 10.0  # seconds in which a process may end by itself after a loss, at most
CAUSE_TIMEOUT = 2.0  # seconds to wait for another process to report why a collective failed
MAX_RECEIVED_BYTES = 1 << 16


@dataclass(eq=False)
class PeerConnection:
    """A connection between the main process and another one, and what the other end has said about itself."""

    socket: socket.socket
    process: int = 0  # rank of the other end
    name: str = "process 0"
    stage: str = "its start"
    # Ticks of this process since the last message. They are not seconds: a process that was itself stopped by a
    # debugger or the scheduler has no ticks, and so does not report the others as lost.
    silent_ticks: int = 0
    buffer: bytes = b""

    def send(self, **message: Any) -> None:
        with suppress(OSError):  # the other end hangs, so that the buffer is full, or it is gone: its silence tells
            self.socket.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived. Raise EOFError if the connection is closed."""
        try:
            data = self.socket.recv(MAX_RECEIVED_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            raise EOFError
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]


def is_collective_error(error: BaseException | None) -> bool:
    """Return whether a collective failed, so that another process or the network is at fault.

    gloo raises a plain RuntimeError, which can only be recognized by the source file in its message.
    """
    is_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return is_gloo or isinstance(error, torch.distributed.DistError)


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

    Raises:
        OSError: The processes cannot connect.
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
        self._selector = selectors.DefaultSelector()
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        host = "127.0.0.1"
        if os.environ.get("LOCAL_WORLD_SIZE") != str(processes.num_processes):  # several machines
            # The last process is on another machine: listen on the network that leads there.
            host = own_address(gather_objects([own_address(os.environ["MASTER_ADDR"])], processes)[-1])
        servers: list[socket.socket] = []

        def listen() -> tuple[str, int, str]:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            servers.append(socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN))
            return host, servers[0].getsockname()[1], secrets.token_hex(16)

        main_host, port, token = from_main(listen, processes)
        if self._main:
            with servers[0]:
                self._accept(servers[0], token, processes.num_processes)
        else:
            self._connect(main_host, port, token)

    def _accept(self, server: socket.socket, token: str, num_processes: int) -> None:
        """Accept the connections of all other processes, and close those of strangers, which do not know the token."""
        deadline = time.monotonic() + self._seconds
        accepted = selectors.DefaultSelector()  # the server, and connections that have sent nothing yet
        accepted.register(server, selectors.EVENT_READ)
        while missing := set(range(1, num_processes)) - self._connections.keys():
            events = accepted.select(max(0.0, deadline - time.monotonic()))
            if not events:
                text = f"process {min(missing)} has not joined in peer_timeout={self._seconds:g} s"
                raise OSError(f"{text}; {self._advice}")
            for key, _ in events:
                if key.fileobj is server:
                    connection = PeerConnection(server.accept()[0])
                    accepted.register(connection.socket, selectors.EVENT_READ, connection)
                else:
                    accepted.unregister(key.fileobj)
                    self._identify(key.data, token)
        for key in [*accepted.get_map().values()]:
            if key.data is not None:
                key.data.socket.close()
        accepted.close()
        for connection in self._connections.values():  # which wait for it, so that all watch from now on
            connection.send(name=self._name)

    def _identify(self, connection: PeerConnection, token: str) -> None:
        """Read who is at the other end of a new connection, or close it if it does not send the token."""
        try:
            (message,) = connection.receive()
            is_known = secrets.compare_digest(str(message["token"]), token)
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            is_known = False
        if not is_known:
            connection.socket.close()
            return
        connection.process, connection.name = message["process"], message["name"]
        self._watch_connection(connection)

    def _connect(self, host: str, port: int, token: str) -> None:
        try:
            connection = PeerConnection(socket.create_connection((host, port), timeout=self._seconds))
        except OSError as error:
            why = f"process {self._index} cannot reach the main process at {host}:{port}: {error.strerror}"
            text = f"{why}; open the machines' ports to one another, or use --limits.peer_timeout none"
            raise OSError(error.errno, text) from None
        connection.socket.settimeout(2 * self._seconds)  # in half of it the main process says who has not joined
        connection.send(token=token, process=self._index, name=self._name)
        try:
            messages = connection.receive()
        except EOFError:
            raise OSError(f"process 0 ended before all processes had joined; {self._advice}") from None
        self._watch_connection(connection)
        for message in messages:
            self._handle_message(connection, message)

    def _watch_connection(self, connection: PeerConnection) -> None:
        connection.socket.setblocking(False)
        self._connections[connection.process] = connection
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)

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
        self._wake_sender.send(b".")
        self._thread.join()
        farewell = self._farewell(error)
        for connection in self._connections.values():
            connection.send(**farewell)
            with suppress(OSError):  # closing with unread bytes would reset the connection, and lose what was sent
                connection.socket.recv(MAX_RECEIVED_BYTES)
            connection.socket.close()
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
                if key.data is not None:  # else `__exit__` has woken this thread
                    self._read_messages(key.data)
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
        for connection in [*self._connections.values()]:
            connection.send(stage=self.stage())

    def _read_messages(self, connection: PeerConnection) -> None:
        try:
            for message in connection.receive():
                connection.silent_ticks = 0
                self._handle_message(connection, message)
        except EOFError:
            self._close_connection(connection)
            text = f"{connection.name} is gone, last heard in {connection.stage}"
            self._report_loss(f"{text}; its own last words, if any, say why", connection)

    def _handle_message(self, connection: PeerConnection, message: dict[str, Any]) -> None:
        connection.name = message.get("name", connection.name)
        connection.stage = message.get("stage", connection.stage)
        if "failed" in message:
            text = f"{connection.name} raised {message['failed']}, in {connection.stage}"
            self._report_loss(text, connection, is_reported=connection.process == 0)
        elif "lost" in message:
            self._report_loss(message["lost"], connection, is_reported=True)
        elif "end" in message:
            self._close_connection(connection)
        if (number := message.get("signal", 0)) and not self._signal:  # a signal ends another process
            self._signal = number
            for other in self._connections.values() if self._main else ():
                other.send(signal=number)
            self._settled.set()
            self.hear(number)

    def _close_connection(self, connection: PeerConnection) -> None:
        del self._connections[connection.process]
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _tick(self) -> None:
        self.tell_stage()
        for connection in self._connections.values():
            connection.silent_ticks += 1
            if connection.silent_ticks > TICKS_PER_TIMEOUT:
                silent = f"{connection.name} has been silent for peer_timeout={self._seconds:g} s"
                why = "stopped, cut off, or held up in C code that keeps the interpreter"
                self._report_loss(f"{silent}, last heard in {connection.stage}: {why}", connection)

    def _report_loss(self, text: str, connection: PeerConnection, *, is_reported: bool = False) -> None:
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
        for other in self._connections.values() if self._main else ():
            if other is not connection:
                other.send(lost=text)
        self._lost.set()
        self._settled.set()

    def _print_loss(self) -> None:
        if self._prints_loss:
            self._prints_loss = False
            os.write(2, f"\n{self._loss_message}\n".encode(errors="replace"))
