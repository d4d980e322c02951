"""The watch of processes over one another, in one process: turns are taken by hand, messages go over real sockets."""

import signal
import socket
import threading

import pytest

from dllm_rl.distributed import peers
from dllm_rl.distributed.collectives import OneProcess
from dllm_rl.distributed.peers import EXIT_STATUS, TICKS_PER_TIMEOUT, Peers, own_address
from dllm_rl.distributed.stop import Stopped

PATIENCE = 600.0  # seconds, the suite's limit
GLOO = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer"


@pytest.fixture
def made(monkeypatch):
    """Makes the watch of each of so many processes; what is open is closed afterwards."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(peers, "CAUSE_TIMEOUT", 60.0)
    monkeypatch.setattr(peers, "gather_objects", lambda objects, processes: objects)
    watches = []

    def make(count, strangers=lambda address: None):
        told, listens = [], threading.Event()

        def from_main(work, processes):
            if processes.process_index == 0:
                told.append(work())
                listens.set()
            assert listens.wait(PATIENCE)
            return told[0]

        monkeypatch.setattr(peers, "from_main", from_main)
        made = [None] * count

        def construct(index):
            made[index] = Peers(OneProcess(count, index), seconds=60.0, advice="go on")

        threads = [threading.Thread(target=construct, args=(index,)) for index in range(count)]
        threads[0].start()
        assert listens.wait(PATIENCE)
        strangers(told[0])
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
        watches.extend(made)
        return made

    yield make
    for each in watches:
        for connection in each._connections.values():
            connection.socket.close()
        for thing in (each._wake_sender, each._wake_receiver, each._selector):
            thing.close()


def hear(watch):
    """What the watch's thread does when something has come in, until it has."""
    events = watch._selector.select(PATIENCE)
    assert events, "nothing came"
    for key, _ in events:
        watch._read_messages(key.data)


def test_silence_is_counted_in_turns_and_ended_by_a_word(made):
    main, first, second = made(3)
    for _ in range(TICKS_PER_TIMEOUT):
        main._tick()
        first._tick()
    hear(main)
    assert (
        main._connections[1].silent_ticks == 0
        and main._connections[2].silent_ticks == TICKS_PER_TIMEOUT
        and not main._lost.is_set()
    )
    main._tick()
    assert main._lost.is_set() and main._prints_loss
    assert main._loss_message.startswith("error: process 2 (") and main._loss_message.endswith("interpreter; go on")
    while not first._lost.is_set():
        hear(first)
    assert first._loss_message == main._loss_message and not first._prints_loss, "one process says it"
    second._tick()
    assert not second._lost.is_set()


def test_slow_work_is_no_loss(made):
    """The thread beats whatever the main thread does: however many turns pass, each is heard before the next."""
    main, other = made(2)
    other.stage = lambda: "rollout, after 7 steps"
    for _ in range(5 * TICKS_PER_TIMEOUT):
        main._tick()
        other._tick()
        hear(main)
        hear(other)
    assert not main._lost.is_set() and not other._lost.is_set()
    assert main._connections[1].stage == "rollout, after 7 steps"


def test_a_stage_is_told_when_it_is_entered_and_is_no_turn(made):
    main, other = made(2)
    other.stage = lambda: "reward, after 7 steps"
    for _ in range(TICKS_PER_TIMEOUT + 1):
        other.tell_stage()
    hear(main)
    assert main._connections[1].stage == "reward, after 7 steps" and not other._lost.is_set()


def test_a_silent_main_process_is_named_by_the_second_alone(made):
    _, first, second = made(3)
    for watch in (first, second):
        for _ in range(TICKS_PER_TIMEOUT + 1):
            watch._tick()
        assert "process 0" in watch._loss_message and watch._prints_loss == (watch is first)


def test_a_closed_connection_is_a_loss_and_a_farewell_is_none(made):
    main, first, second = made(3)
    first._connections[0].send(end=True)
    first._connections[0].socket.close()
    hear(main)
    assert 1 not in main._connections and not main._lost.is_set()
    second._connections[0].socket.close()
    hear(main)
    assert (
        "process 2" in main._loss_message
        and "is gone, last heard in its start; its own last words" in main._loss_message
    )


def test_one_that_never_joins_is_named(made, monkeypatch):
    monkeypatch.setattr(peers, "from_main", lambda work, processes: work())
    with pytest.raises(OSError, match=r"process 1 has not joined in peer_timeout=0\.01 s; go on"):
        Peers(OneProcess(2, 0), seconds=0.01, advice="go on")


def test_a_main_process_that_ends_first_is_named(made, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(peers, "from_main", lambda work, processes: ("127.0.0.1", port, "token"))
        leaves = threading.Thread(target=lambda: server.accept()[0].close())
        leaves.start()
        with pytest.raises(OSError, match="process 0 ended before all processes had joined; go on"):
            Peers(OneProcess(2, 1), seconds=60.0, advice="go on")
        leaves.join()


@pytest.mark.parametrize(
    "said",
    [
        b'{"token": "0", "process": 1, "name": "x"}\n',
        b'{"token": null, "process": 1}\n',
        b'{"failed": "x"}\n',
        b"[1]\n",
        b"\xff\n",
        b"x" * 200_000,
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
        None,  # idle
    ],
)
@pytest.mark.parametrize("stays", [True, False])
def test_strangers_are_hung_up_on(made, said, stays):
    connected = []

    def strangers(told):
        for _ in range(3):
            connected.append(socket.create_connection(told[:2], timeout=PATIENCE))
            send(connected[-1], said)
            if not stays:
                connected[-1].close()

    main, _, _ = made(3, strangers)
    assert not main._lost.is_set() and sorted(main._connections) == [1, 2]
    assert [watch.name.partition(" (")[0] for watch in main._connections.values()] == [
        f"process {index}" for index in main._connections
    ]
    for stranger in connected:
        stranger.close()


def test_processes_on_several_machines_listen_on_the_network_between_them(made, monkeypatch):
    asked = []

    def own_address(towards):
        asked.append(towards)
        return "127.0.0.1" if towards == "the last machine" else "the last machine"

    monkeypatch.setenv("MASTER_ADDR", "the main machine")
    monkeypatch.setattr(peers, "own_address", own_address)
    main, _ = made(2)
    assert asked[:2] == ["the main machine", "the last machine"]
    assert main._connections[1].socket.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(("towards", "found"), [("127.0.0.1", "127.0.0.1"), ("localhost", None)])
def test_an_own_address_is_one_that_can_be_listened_on(towards, found):
    address = own_address(towards)
    assert address == (found or address) and address not in ("0.0.0.0", "::")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    socket.create_server((address, 0), family=family).close()


def send(stranger, said):
    if said is None:
        return
    try:
        stranger.sendall(said)
        if not said:
            stranger.shutdown(socket.SHUT_WR)
    except OSError:  # hung up on meanwhile
        pass


def test_an_error_is_told_and_ends_the_others_with_one_line(made, capfd):
    """The second raises; the others fail in an exchange, and end with a status instead of that error."""
    watches, ends = made(3), {}

    def run(watch, error, others):
        try:
            with watch:
                others.wait(PATIENCE)
                raise error
        except (Stopped, ValueError, RuntimeError) as end:
            ends[watch._index] = end

    told = threading.Event()
    errors = [RuntimeError(GLOO), ValueError("bad\x1b[2J"), RuntimeError(GLOO)]
    arguments = [(watch, error, told) for watch, error in zip(watches, errors, strict=True)]
    threads = [threading.Thread(target=run, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    told.set()
    for thread in threads:
        thread.join()
    assert isinstance(ends[1], ValueError)
    assert [ends[0].args, ends[2].args] == [(EXIT_STATUS,)] * 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: process 1 (")
    assert lines[0].endswith("raised ValueError: bad␛[2J, in its start; go on")
    assert not [thread for thread in threading.enumerate() if thread.name == "peers"]


def test_an_error_of_all_is_said_by_each_alone(made, capfd):
    watches = made(2)
    barrier = threading.Barrier(2, timeout=PATIENCE)

    def run(watch):
        with pytest.raises(ValueError, match="no such setting"), watch:
            barrier.wait()
            raise ValueError("no such setting")

    threads = [threading.Thread(target=run, args=(watch,)) for watch in watches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err == ""


def test_a_signal_that_one_leaves_on_is_heard_by_all_and_is_their_status(made, capfd):
    """The second leaves alone; the others fail in an exchange, and end with the signal's status instead."""
    watches, ends, heard, left = made(3), {}, [], threading.Event()

    def run(watch, error, others):
        try:
            with watch:
                others.wait(60)
                raise error
        except (Stopped, RuntimeError) as end:
            ends[watch._index] = end

    for watch in watches:
        watch.hear = heard.append
    first = threading.Thread(target=run, args=(watches[1], Stopped(128 + signal.SIGUSR1), left))
    left.set()
    first.start()
    first.join()
    hear(watches[0])
    hear(watches[2])
    assert heard == [signal.SIGUSR1] * 2
    for watch in (watches[0], watches[2]):
        run(watch, RuntimeError(GLOO), left)
    assert [ends[index].args for index in range(3)] == [(128 + signal.SIGUSR1,)] * 3
    assert capfd.readouterr().err == ""


def test_an_end_without_a_signal_is_not_heard(made):
    main, other = made(2)
    main.hear = pytest.fail
    other._connections[0].send(end=True, signal=0)
    hear(main)
    assert not main._signal and not main._connections


def test_an_exchange_that_nobody_failed_says_where_the_others_are(made, monkeypatch):
    monkeypatch.setattr(peers, "CAUSE_TIMEOUT", 0.0)
    main, other = made(2)
    other.stage = lambda: "reward, after 3 steps"
    other._tick()
    hear(main)
    with pytest.raises(RuntimeError, match="gloo/transport") as caught, main:
        raise RuntimeError(GLOO)
    assert caught.value.__notes__[0].endswith("was last heard in reward, after 3 steps")


def test_one_that_cannot_be_reached_is_a_line(made, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        monkeypatch.setattr(peers, "from_main", lambda work, processes: ("127.0.0.1", port, "token"))
        with pytest.raises(OSError, match=rf"process 1 cannot reach the main process at 127.0.0.1:{port}: .*none"):
            Peers(OneProcess(2, 1), seconds=60.0, advice="")


def test_an_error_of_its_own_is_raised_though_another_is_lost(made, capfd):
    main, other = made(2)
    other._connections[0].socket.close()
    hear(main)
    assert main._lost.is_set()
    with pytest.raises(ValueError, match="its own"), main:
        raise ValueError("its own")
    assert capfd.readouterr().err == ""
