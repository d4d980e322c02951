"""Kills of late rollouts: two learner processes and two Ray workers, of which one after the other gets a SIGKILL.

    PYTHONPATH=.:tests/support python tests/faults/late_kills.py FOLDER VICTIM ...

A victim is `worker`, `other` (the learner that is not the main one) or `main`. After a worker's death the same run must
go on; after a learner's it must end soon, with another status than 0 and one line that says why, leave no process, and
be resumed. A kill comes once a drawn number of further steps is written, and the victim has then computed for a drawn
time. Prints a line per kill, and ends with JSON: whether weights and numbers are those of a run that nothing hit.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch
from ray_processes import named, of_ray, workers
from run_outputs import metrics_of, weights_of

ROOT = Path(__file__).parents[2]
PATIENCE = 600.0  # seconds after which an event that does not come is a failure
STEPS_BETWEEN = (1, 2, 3)  # from one kill to the next, drawn
MOST_WORK = 0.3  # processor seconds of the victim before the kill, drawn from 0 on
REPEATED = "another worker repeats the job"
PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from tiny_recipe import tiny_recipe
from dllm_rl.training.trainer import train
train(tiny_recipe(sys.argv[1], rollout_workers=2, max_staleness=2, num_steps=int(sys.argv[2]), save_steps=3,
                  report_to=None, log_completions_steps=0, eval_steps=0, resume_from_checkpoint="latest"))
"""


class Learners:
    """Two learner processes of one run."""

    def __init__(self, directory: Path, num_steps: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.directory, self.output = directory, directory.with_name(f"{directory.name}.out")
        self.begin = self.output.stat().st_size if self.output.exists() else 0
        self.processes = []
        for rank in range(2):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            environment = os.environ | {name: str(value) for name, value in names.items()}
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
            command = [sys.executable, "-c", PROGRAM, str(directory), str(num_steps)]
            with self.output.open("ab") as out:
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))

    @property
    def said(self) -> str:
        """What this start of the run has printed."""
        return self.output.read_bytes()[self.begin :].decode(errors="replace")

    @property
    def rows(self) -> int:
        path = self.directory / "metrics.jsonl"  # a resumed run writes some steps again
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    def await_event(self, event: Callable[[], object], name: str) -> None:
        """Wait until `event` is true, while both processes live."""
        until = time.monotonic() + PATIENCE
        while not event():
            assert all(process.poll() is None for process in self.processes), f"ended before {name}:\n{self.said}"
            assert time.monotonic() < until, f"{name} did not come in {PATIENCE:g} s:\n{self.said}"
            time.sleep(0.005)

    def kill(self, victim: str, chance: Random) -> list[psutil.Process]:
        """Send the SIGKILL, at a drawn moment; returns the processes of Ray that the main process then had."""
        main = psutil.Process(self.processes[0].pid)
        target = self.rows + chance.choice(STEPS_BETWEEN)
        self.await_event(lambda: self.rows >= target and len(workers(main)) == 2, f"row {target} with two workers")
        learners = {"main": [main], "other": [psutil.Process(self.processes[1].pid)]}
        # Of the workers it is the first to compute so long: another may have nothing to do.
        spent = {process: computed(process) for process in learners.get(victim) or workers(main)}
        more = chance.random() * MOST_WORK
        hit: list[psutil.Process] = []
        self.await_event(
            lambda: hit.extend(p for p in spent if computed(p) > spent[p] + more) or hit, f"so much work of {victim}"
        )
        # Two agents of Ray's, which do nothing without it, take a minute to see that it is gone.
        below = [process for process in of_ray(main) if "Agent" not in "".join(named(process)[:1])]
        hit[0].kill()
        return below

    def strike(self, victim: str, chance: Random) -> str:
        """Kill one process, and check what happens; returns it in words."""
        repeated = self.said.count(REPEATED)
        below = self.kill(victim, chance)
        if victim == "worker":
            self.await_event(lambda: self.said.count(REPEATED) > repeated, "the repeated job")
            return f"after {self.rows} rows: the job was repeated"
        begin = time.monotonic()
        codes = [process.wait(PATIENCE) for process in self.processes]
        seconds = time.monotonic() - begin
        lost, survivor = (0, codes[1]) if victim == "main" else (1, codes[0])
        lines = [line for line in self.said.splitlines() if line.startswith("error: ")]
        assert survivor not in (0, -signal.SIGKILL), f"status {codes}\n{self.said}"
        assert len(lines) == 1 and lines[0].startswith(f"error: process {lost} ("), self.said
        assert "is gone, last heard in" in lines[0] and "resume_from_checkpoint" in lines[0], lines[0]
        until = time.monotonic() + PATIENCE
        while left := [process for process in below if lives(process)]:
            assert time.monotonic() < until, f"still there: {left}"
            time.sleep(0.05)
        return f"after {self.rows} rows: status {survivor} after {seconds:.1f} s, nothing left behind"

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def computed(process: psutil.Process) -> float:
    """Processor seconds of a process so far."""
    return sum(process.cpu_times()[:2])


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def finished(learners: Learners) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The weights and the numbers of a run, once it ends."""
    codes = [process.wait(PATIENCE) for process in learners.processes]
    assert codes == [0, 0], f"status {codes}\n{learners.said}"
    return weights_of(json.loads((learners.directory / "summary.json").read_text())), metrics_of(learners.directory)


def main(root: Path, victims: list[str], seed: int = 0) -> dict[str, Any]:
    chance = Random(seed)
    num_steps = max(STEPS_BETWEEN) * (len(victims) + 1) + 3 * len(victims)  # each kill may cost the steps not saved
    expected = finished(Learners(root / "whole", num_steps))
    learners = Learners(root / "run", num_steps)
    try:
        for number, victim in enumerate(victims):
            print(f"{number}: {victim}, {learners.strike(victim, chance)}", flush=True)
            if victim != "worker":
                learners = Learners(root / "run", num_steps)
        found = finished(learners)
    finally:
        learners.end()
    same = all(torch.equal(weight, found[0][name]) for name, weight in expected[0].items())
    return {"kills": len(victims), "steps": num_steps, "same weights": same, "same numbers": found[1] == expected[1]}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
