"""A run in a forked process, with a fault planted in it. Forking saves the seconds that imports take."""

import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_rl.distributed.stop import Stop
from dllm_rl.files import replacing
from dllm_rl.monitoring import plots
from dllm_rl.recipe import Recipe
from dllm_rl.training import start
from dllm_rl.training.trainer import train

FULL = "full"  # not a signal: writes beyond `at` bytes of a file fail, as on a full disk


@dataclass(frozen=True)
class Fault:
    """What happens to a process of a run.

    kind  file: before its file operation number `at` in the run's folder; call: at its Python call number `at`; write:
          in the middle of writing byte number `at` of a file.
    what  the signal that it gets, or FULL.
    """

    kind: str
    at: int
    what: Any = signal.SIGKILL


def no_picture(directory: Path) -> Path:
    """Stands for the picture, whose second a thousand runs need not spend; it is written the same way."""
    with replacing(directory / "training.png") as partial:
        partial.write_bytes(b"")
    return directory / "training.png"


plots.plot = no_picture


def run(
    *recipes: Recipe, fault: Fault | None = None, victim: int = 0, processes: int = 1, count: bool = False
) -> tuple[int, str]:
    """Exit status (negative: the signal that ended it) of the first process, and output of a run, or of several one
    after another. The fault is put into the process number `victim`. With `count`, the output ends with the number of
    file operations and of calls, as JSON."""
    folder = Path(recipes[0].directory)
    folder.mkdir(parents=True, exist_ok=True)
    output = folder.with_name(folder.name + ".out")
    port = _free_port() if processes > 1 else 0
    ranks: list[int] = []
    stopped: set[int] = set()
    codes: dict[int, int] = {}
    with output.open("wb") as out:
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                mine = fault if rank == victim else None
                _child(recipes, mine, (rank, processes, port), out.fileno(), count and rank == 0)
            ranks.append(pid)
        while len(codes) < processes:
            pid, status = os.waitpid(-1, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                stopped.add(pid)
            else:
                codes[pid] = os.waitstatus_to_exitcode(status)
            alive = set(ranks) - set(codes)
            for other in alive if codes.get(pid) else ():
                # As a launcher does, which waits for those that it ends by SIGTERM; a kill of the first is one of all.
                os.kill(other, signal.SIGKILL if pid == ranks[0] and codes[pid] < 0 else signal.SIGTERM)
            # A launcher kills what has not ended after some seconds. A stopped process never ends of itself.
            for other in alive if alive <= stopped else ():
                os.kill(other, signal.SIGKILL)
    return codes[ranks[0]], output.read_text(errors="replace")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(recipes: Sequence[Recipe], fault: Fault | None, place: tuple[int, int, int], out: int, count: bool) -> None:
    rank, processes, port = place
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's parent may have ignored it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if processes > 1:
        _outlive_the_launcher()
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        os.environ.update({name: str(value) for name, value in names.items()})
    code = 1
    try:
        counts = _planted(Path(recipes[0].directory), fault, count)
        for recipe in recipes:
            train(recipe)
        if count:
            sys.setprofile(None)
            os.write(1, b"\n" + json.dumps(counts).encode())
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _outlive_the_launcher() -> None:
    """Once a run has listened, the launcher's SIGTERM does not change the status that the run has ended with."""
    listening: list[Stop] = []

    def listen(**settings: Any) -> Stop:
        listening.append(Stop(**settings))
        return listening[-1]

    def late(number: int, frame: Any) -> None:
        if not listening:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    start.Stop = listen  # type: ignore[misc, assignment]
    signal.signal(signal.SIGTERM, late)


def _planted(folder: Path, fault: Fault | None, count: bool) -> dict[str, int]:
    counts = {"file": 0, "call": 0}

    def passed(kind: str) -> None:
        counts[kind] += 1
        if fault is not None and fault.kind == kind and counts[kind] == fault.at:
            os.kill(os.getpid(), fault.what)

    def audit(event: str, arguments: tuple) -> None:
        below = event in ("os.remove", "os.rmdir") and arguments[-1] not in (None, -1)  # relative to an open folder
        if below or (
            event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir")
            and any(isinstance(part, str | Path) and str(part).startswith(str(folder)) for part in arguments[:2])
        ):
            passed("file")

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            passed("call")

    if count or (fault is not None and fault.kind == "file"):
        sys.addaudithook(audit)
    if count or (fault is not None and fault.kind == "call"):
        sys.setprofile(profile)
    if fault is not None and fault.kind == "write":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN if fault.what == FULL else signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.at, fault.at))
    return counts
