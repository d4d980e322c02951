"""What late rollouts save: seconds per step of sudoku_tiny.py when a Ray worker makes the next batch meanwhile, against
rollout and learning in turn; and the seconds that weights take to the worker, by their size. Run it on two idle cores.

synchronous  rollout, learning and sync one after the other, in this process
overlapped   the same with one worker and max_staleness 1: this process waits for the batch, learns, publishes, syncs
bound        max(rollout, learning) / (rollout + learning) of the synchronous steps: what no overlap can beat

The two take turns, `--steps` steps at a time, one thread each. The first two steps of an overlapped turn are not timed:
until then the worker is ahead.

python -m benchmarks.late_rollouts [--rounds 6] [--steps 10] [--smoke] [--json FILE]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from benchmarks.measure import machine, table, write_json
from dllm_rl.algorithms.optimizers import ConstantRate
from dllm_rl.distributed.collectives import make_accelerator
from dllm_rl.integrations.ray_pool import ray_workers
from dllm_rl.step.collect import collect
from dllm_rl.step.samples import Samples
from dllm_rl.step.update import train_step
from dllm_rl.training.late_rollouts.messages import deserialize, deserialize_batch, serialize, trained_weights
from dllm_rl.training.make_step import make_step
from dllm_rl.training.policies import RolloutCopy, build_policy, make_optimizer
from recipes.async_sudoku import recipe

job = replace(recipe, lr_schedule=ConstantRate())  # also for more steps than it has


class Turns:
    """A learner that takes steps on rollouts of its own, or of a worker; steps are numbered through."""

    def __init__(self) -> None:
        self.accelerator = make_accelerator(device=torch.device("cpu"))
        self.policy = build_policy(job, self.accelerator.device)
        self.engine = job.rollout_engine or RolloutCopy(recipe=job)
        self.rollout_policy = self.engine.load(self.policy)
        self.context = make_step(
            job, accelerator=self.accelerator, policy=self.policy, rollout_policy=self.rollout_policy
        )
        self.optimizer = make_optimizer(job, self.policy)
        workers = ray_workers(job)
        assert workers is not None, "the recipe has workers"
        workers.set_up(job, self.context)
        self.workers = workers
        self.number = 0

    def learn(self, samples: Samples) -> None:
        train_step(self.context, samples, self.number, self.optimizer)

    def synchronous(self, steps: int) -> dict[str, float]:
        """Median seconds of a step's rollout and of its learning, sync included."""
        rollouts, learning = [], []
        for _ in range(steps):
            (samples, _, _), spent = timed(lambda: collect(self.context, self.number))
            rollouts.append(spent)

            def learn_and_sync(samples: Samples = samples) -> None:
                self.learn(samples)
                self.engine.sync(self.policy, self.rollout_policy)

            learning.append(timed(learn_and_sync)[1])
            self.number += 1
        return {"rollout": median(rollouts), "learning": median(learning)}

    def hand_out(self, number: int) -> None:
        self.workers.submit(number, trained_weights(self.policy))

    def batch(self, number: int) -> bytes:
        """Wait for a batch as the learner of a run does."""
        while (batch := self.workers.ready(number)) is None:
            self.workers.wait()
            self.workers.mend([number])
        return batch

    def overlapped(self, steps: int) -> dict[str, float]:
        """Mean seconds of a step in the long run, and the worker's own median."""
        self.hand_out(self.number)
        self.batch(self.number)
        self.hand_out(self.number + 1)
        began, made = 0.0, []
        for i in range(steps + 2):
            if i == 2:
                began = time.perf_counter()
            data = self.batch(self.number)
            (samples, _, _), spent = deserialize_batch(data, job.sampler.rank, self.accelerator.device)
            made.append(spent)
            self.learn(samples)
            self.workers.forget(self.number)
            self.hand_out(self.number + 2)
            self.engine.sync(self.policy, self.rollout_policy)
            self.number += 1
        spent = (time.perf_counter() - began) / steps
        for late in (self.number, self.number + 1):  # the other turns have the cores for themselves
            self.batch(late)
            self.workers.forget(late)
        self.number += 2
        return {"step": spent, "worker's rollout": median(made)}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def received(weights: bytes) -> float:
    """Seconds that a worker takes to read weights; Ray has handed the bytes over before."""
    return timed(lambda: deserialize(weights))[1]


def publishing(ray: Any, megabytes: int) -> dict[str, Any]:
    """Seconds of weights on their way: out of the learner, into the object store, and from there into a worker."""
    weights = {f"layer {i}": torch.randn(2**18) for i in range(megabytes)}  # 1 MiB each
    data, out = timed(lambda: serialize(weights, {}))
    shared, put = timed(lambda: ray.put(data))
    remote = ray.remote(received)
    ray.get(remote.remote(shared))  # the first call starts a process
    read, whole = timed(lambda: ray.get(remote.remote(shared)))
    row = {"MiB": megabytes, "copy": out, "put": put, "to the worker": whole - read, "read": read}
    return {name: value if name == "MiB" else round(value, 4) for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    if given.smoke:
        given.rounds, given.steps = 1, 2
    torch.set_num_threads(1)
    turns = Turns()
    import ray

    rows = []
    for _ in range(given.rounds):
        alone, together = turns.synchronous(given.steps), turns.overlapped(given.steps)
        whole = sum(alone.values())
        row = {**alone, "synchronous": whole, "overlapped": together["step"]}
        row |= {"worker's rollout": together["worker's rollout"], "overlapped / synchronous": together["step"] / whole}
        rows.append(
            {name: round(value, 3) for name, value in row.items()} | {"bound": round(max(alone.values()) / whole, 3)}
        )
    print(table(rows))
    found = {name: round(median(row[name] for row in rows), 3) for name in rows[0]}
    print(table([found]))
    sizes = [publishing(ray, megabytes) for megabytes in ((1,) if given.smoke else (1, 10, 100, 1000))]
    print(table(sizes))
    ray.shutdown()
    result = {"benchmark": "late_rollouts", "rounds": given.rounds, "steps": given.steps, **machine("cpu")}
    write_json(given.json, result | {"median": found, "turns": rows, "publishing": sizes})


if __name__ == "__main__":
    main()
