"""Programs that several processes on one machine run together, joined by gloo."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("support", "training/dry_run"))]


def run_ranks(program: str, processes: int, *arguments: object) -> list[str]:
    """Run `program` in so many processes; returns what each printed. sys.argv[1:] are the arguments."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(processes):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
        environment = os.environ | {name: str(value) for name, value in names.items()}
        environment["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", program, *map(str, arguments)]
        ranks.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )

    def end(rank: subprocess.Popen) -> tuple[str, str]:
        told = rank.communicate()
        if rank.returncode:  # the others would wait for it
            for other in ranks:
                other.kill()
        return told

    with ThreadPoolExecutor(processes) as threads:
        try:
            told = list(threads.map(end, ranks))
        finally:
            for rank in ranks:
                rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * processes, "\n".join(error[-3000:] for _, error in told)
    return [out for out, _ in told]
