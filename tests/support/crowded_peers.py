"""Two watches in one process, between which 300 idle strangers come; prints `joined` and `ended`."""

import os
import resource
import subprocess
import sys

from dllm_rl.distributed import peers
from dllm_rl.distributed.collectives import OneProcess
from dllm_rl.distributed.peers import Peers

IDLE = """
import socket, sys
strangers = []
for _ in range(300):
    strangers.append(socket.create_connection(("127.0.0.1", int(sys.argv[1]))))
print("connected", flush=True)
sys.stdin.read()
"""

resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
os.environ["LOCAL_WORLD_SIZE"] = "2"
told = []
peers.from_main = lambda work, processes: told[-1] if processes.process_index else told.append(work()) or told[-1]
with Peers(OneProcess(2, 0), seconds=500.0, advice="") as main:
    port = str(main._server.getsockname()[1])
    more = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))  # noqa: E731
    idle = subprocess.Popen(
        [sys.executable, "-c", IDLE, port], stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=more
    )
    assert idle.stdout.readline() == b"connected\n"
    with Peers(OneProcess(2, 1), seconds=500.0, advice="") as other:
        while main._missing:
            assert not main._lost.wait(0.01), main._loss_message
        open(os.devnull).close()  # there is room for the run's own files
        print("joined", flush=True)
    idle.communicate()
assert not main._lost.is_set()
print("ended")
