"""Programs that several processes on one machine run together, joined by gloo."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor

from forked import Child


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
        ranks.append(Child(program, *arguments, environment=environment))

    def end(rank: Child) -> tuple[str, str]:
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
