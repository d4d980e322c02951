"""What a request waits for at a server, where none joins a running batch: its latency beside that at a free server.

    python -m benchmarks.waiting --json benchmarks/results/waiting-cpu.json

Requests of equal settings come at random times (Poisson). As `dllm-rl serve` does, the next batch has all that wait, up
to 32. The clock goes on by the processor time of each batch, so that other work on the machine does not count. LLaDA's
layout with random weights, one thread. A latency is in units of a request's at a free server.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.measure import fastest, machine, table, write_json
from benchmarks.sampler import Shape, random_policy
from dllm_rl.integrations.serving.batching import CompletionJob, sample_rows
from dllm_rl.models.base import Policy
from dllm_rl.samplers.unmask import Unmask

SHAPE = Shape(2, 128, 4, 384, 2048, batch=1, prompt=32, new=32, block=32, steps=16)
SAMPLER = Unmask(max_new_tokens=SHAPE.new, diffusion_steps=SHAPE.steps, block_size=SHAPE.block)
RATES = (0.5, 2.0)  # requests within the latency of a free server
MAX_BATCH_SIZE = 32  # the server's default


def jobs(count: int) -> list[CompletionJob]:
    return [CompletionJob(list(range(SHAPE.prompt)), seed, SAMPLER) for seed in range(count)]


def latencies(policy: Policy, arrivals: Sequence[float]) -> tuple[list[float], list[float]]:
    """Seconds from each arrival to the start of the request's batch, and to its end."""
    waits: list[float] = []
    totals: list[float] = []
    now, served = 0.0, 0
    while served < len(arrivals):
        now = max(now, arrivals[served])
        batch = [arrival for arrival in arrivals[served:] if arrival <= now][:MAX_BATCH_SIZE]
        begin, work = now, time.process_time()
        sample_rows(policy, jobs(len(batch)))
        now += time.process_time() - work
        waits += [begin - arrival for arrival in batch]
        totals += [now - arrival for arrival in batch]
        served += len(batch)
    return waits, totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=60, help="of each rate")
    parser.add_argument("--json", help="where to write the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = random_policy(SHAPE, torch.device("cpu"))
    sizes = (1, 8)
    seconds = fastest({str(size): partial(sample_rows, policy, jobs(size)) for size in sizes}, 3)
    free = seconds["1"]
    rows = []
    for rate in RATES:
        draw, arrivals = random.Random(0), [0.0]
        while len(arrivals) < options.requests:
            arrivals.append(arrivals[-1] + draw.expovariate(rate / free))
        waits, totals = latencies(policy, arrivals)
        numbers = {"mean wait": statistics.mean(waits), "mean": statistics.mean(totals), "worst": max(totals)}
        rows.append({"requests": rate, **{name: round(value / free, 2) for name, value in numbers.items()}})
        print(rows[-1], flush=True)
    print(table(rows))
    batches = {size: round(each / free, 2) for size, each in seconds.items()}
    found = {"machine": machine("cpu"), "number": options.requests, "milliseconds, free": round(1000 * free, 1)}
    write_json(options.json, found | {"batch": batches, "rows": rows})


if __name__ == "__main__":
    main()
