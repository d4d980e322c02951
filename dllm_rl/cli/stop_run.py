"""`dllm-rl stop`: end a run after its current step, with a checkpoint."""

import argparse
import os
import re
import signal
import socket
import time
from pathlib import Path

from dllm_rl.checkpoints import checkpoint
from dllm_rl.distributed.stop import LOCK
from dllm_rl.files import holder_of
from dllm_rl.records import check_is_folder
from dllm_rl.screen import escape_controls


def stop_command(arguments: argparse.Namespace) -> int:
    """Signal the run that writes a folder to stop, and wait until it has ended, at most for --timeout seconds.

    The run finishes its step (at most its `stop_seconds` long), saves a checkpoint, and exits with status 130, as after
    Ctrl-C: recipes/accelerate/slurm.sh does not queue it again. A second call gives up
    the step and saves the last complete one, unless updates have begun or the learner is sharded.

    Returns:
        0 once the run has ended, 1 if it has not ended within --timeout.

    Raises:
        ValueError: No run is writing to the folder, or the run is on another machine.
    """
    directory = Path(arguments.path)
    check_is_folder(directory, "the folder that a run writes, its output_dir")
    process, machine = writing_process(directory)
    if machine != socket.gethostname():
        raise ValueError(f"{directory}: process {process} on {machine} writes this folder; stop it there")
    os.kill(process, signal.SIGINT)
    print(f"asked process {process} to stop after its current step")
    deadline = time.monotonic() + arguments.timeout
    while True:
        time.sleep(0.2)
        try:
            writing_process(directory)
        except ValueError:  # the run has ended and released its lock
            break
        if time.monotonic() > deadline:
            print(f"process {process} still runs after {arguments.timeout:g} s; wait; a second stop gives up its step")
            return 1
    steps = checkpoint.list_checkpoints(directory / "checkpoints")
    saved = f"the last checkpoint is {steps[-1][1]}" if steps else "it has saved no checkpoint"
    print(escape_controls(f"stopped; {saved}"))
    return 0


def writing_process(directory: Path) -> tuple[int, str]:
    """Return the id and the machine of the process that has locked the folder.

    Raises:
        ValueError: No process has locked it, or the lock names none.
    """
    path = directory / LOCK
    holder = holder_of(path)
    if holder is None:
        raise ValueError(f"{directory}: no run writes this folder")
    match = re.fullmatch(r"process (\d+) on (.*)", holder)
    if match is None:
        raise ValueError(f"{path} names no process; stop the run by a signal to it")
    return int(match[1]), match[2]
