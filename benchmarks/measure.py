"""Seconds and peak memory of a function, each arm in a process of its own so that no arm inherits another's memory."""

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import count
from pathlib import Path
from typing import Any

import torch

# Calls of CUDA in which the host waits for the device. A copy to the host waits in the last.
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync")
LEAST = 1e-9  # seconds of work that takes none on a clock of coarse ticks: speeds divide by it


def in_fresh_process(function: Callable[..., dict], *, repeats: int, device: str, **arguments: Any) -> dict:
    """The function's result, computed in a new interpreter. Function and arguments must be picklable.

    On the CPU the memory is that of `peak_in_fresh_process`.
    """
    common = {**arguments, "device": device}
    result = _spawn(function, repeats=repeats, **common)
    if torch.device(device).type == "cpu":
        result["peak_mib"] = peak_in_fresh_process(function, **common)
    return result


def peak_in_fresh_process(function: Callable[..., dict], **arguments: Any) -> Any:
    """The result's "peak_mib", from a new process in which every freed tensor goes back to the system at once.

    The default allocator keeps some, and its high-water mark is that of its heap, not of the tensors.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        return _spawn(function, repeats=1, **arguments)["peak_mib"]
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _spawn(function: Callable[..., dict], **arguments: Any) -> dict:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, kwds=arguments)


def seconds_and_peak(run: Callable[[], Any], device: str, *, repeats: int = 3) -> dict[str, float]:
    """Fastest of `repeats` runs in seconds, and the highest memory during them above that at the start, in MiB.

    seconds are of the wall clock, cpu_seconds of the process's own work: the ones to compare on a shared machine.
    Memory on CUDA: allocated bytes; on the CPU: the kernel's high-water mark of the resident set, reset at the start.
    """
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    else:
        _reset_high_water_mark()
        start = _status("VmRSS")
    times, works = [], []
    for _ in range(repeats):
        begin, work = time.perf_counter(), time.process_time()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        works.append(time.process_time() - work)
    peak = torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")
    mib = round((peak - start) / 2**20, 1)
    seconds, cpu_seconds = (max(round(min(found), 4), LEAST) for found in (times, works))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": mib}


def peak_above() -> Callable[[], float]:
    """Return a function: the highest memory since now above what is held now, of this process on the CPU, in MiB."""
    _reset_high_water_mark()
    start = _status("VmRSS")
    return lambda: (_status("VmHWM") - start) / 2**20


def fastest(arms: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of processor time of each, the least of `repeats` rounds in which they take turns."""
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(repeats):
        for name, run in arms.items():
            begin = time.process_time()
            run()
            best[name] = min(best[name], max(time.process_time() - begin, LEAST))
    return best


def speed_up(slow: dict[str, Any], fast: dict[str, Any], device: str) -> float:
    """How many times faster the second is: by the clock on CUDA, by the work done on the CPU."""
    key = "seconds" if torch.device(device).type == "cuda" else "cpu_seconds"
    return round(slow[key] / fast[key], 2)


def operations_of_a_token(weights: int, columns: int, width: int, blocks: int) -> int:
    """Two operations of a forward for each weight of the blocks, and those of attention to all columns."""
    return 2 * weights + 4 * columns * width * blocks


def host_and_kernels(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds of the host without its waiting for the device, and of the device's kernels, from torch's profiler.

    The profiler takes time on the host, too. On a CPU all is the host's.
    """
    cuda = torch.device(device).type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, *[kinds.CUDA] * cuda]) as profile:
        begin = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    events = profile.key_averages()
    waiting = sum(event.self_cpu_time_total for event in events if event.key in WAITS) / 1e6
    return {"host": seconds - waiting, "kernels": sum(event.self_device_time_total for event in events) / 1e6}


def _reset_high_water_mark() -> None:
    marker = Path("/proc/self/clear_refs")
    if marker.exists():
        marker.write_text("5")


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status; elsewhere the process's maximum so far."""
    path = Path("/proc/self/status")
    if not path.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in path.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@dataclass(frozen=True)
class Varied:
    """A task whose rewards differ in turn, whatever a model writes: what is measured is the work.

    ahead  characters to put before every prompt.
    """

    task: Any
    ahead: int = 0
    turns: Any = field(default_factory=count, compare=False, repr=False)
    name = "varied"
    version = "1"

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> Any:
        problem = self.task[index]
        return replace(problem, prompt="x" * self.ahead + problem.prompt)

    def reward(self, problem: Any, completion: str) -> Any:
        return self._varied(self.task.reward(problem, completion))

    @property
    def rewards(self) -> Callable[..., list[Any]]:
        """The task's grader of many completions, if it has one, as its runs call it."""
        grader = self.task.rewards

        @wraps(grader)
        def rewards(*completions: Any, **costs: Any) -> list[Any]:
            return list(map(self._varied, grader(*completions, **costs)))

        return rewards

    def _varied(self, reward: Any) -> Any:
        return replace(reward, value=next(self.turns) % 7 / 7)


def trained(metrics: Sequence[Mapping[str, float]], rows: int) -> dict[str, Any]:
    """What a run's steps trained on, from its metrics.jsonl: each step's gradient norm, and how many of its `rows`
    completions had rewards that differ within their group.

    Raises:
        ValueError: The run has no step, or a step had no gradient: its time and memory are not those of a training.
    """
    norms = [step["grad_norm"] for step in metrics]
    counts = [round(rows * (1 - step["frac_reward_zero_std"])) for step in metrics]
    if not norms or min(norms) <= 0:
        raise ValueError(f"not every step trained: gradient norms {norms}, rows with unequal rewards {counts}")
    return {"grad_norm": [float(f"{norm:.4g}") for norm in norms], "trained_rows": counts}


def _processor() -> str:
    """Model of the CPU, where the system names it."""
    path = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    return models[0] if models else platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name() if cuda else _processor()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": name, "threads": torch.get_num_threads(), **versions}


def write_json(path: str | None, result: dict[str, Any]) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def peer_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line of a comparison with another project's code; `repeats` is 1 with --smoke."""
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, once: seconds")
    parser.add_argument("--json", help="where to write the numbers")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.repeats = 1
    return arguments


def ratios_of(rows: list[dict[str, Any]]) -> str:
    """The table of a comparison without its seconds (columns whose name ends with ", s")."""
    return table([{name: each for name, each in row.items() if not name.endswith(", s")} for row in rows])
