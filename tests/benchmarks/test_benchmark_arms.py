"""The benchmarks' ways of doing one thing do the same thing (in this process, at the smallest size)."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, limit, measure, sampler, scoring, waiting

SMOKE = {"preset": "smoke", "device": "cpu", "dtype": "float32", "repeats": 1}


@pytest.mark.parametrize("task", ["score", "update"])
def test_plain_and_chunked_scoring_agree(task):
    plain, chunked = (scoring.arm(name=name, task=task, **SMOKE) for name in ("plain", "chunked"))
    assert plain["result"] == pytest.approx(chunked["result"], rel=1e-5)
    assert plain["seconds"] > 0 and plain["cpu_seconds"] > 0


def write_beside_what_is_held(device, repeats):
    """64 MiB are held before the run, 64 MiB more are written during it."""
    held = torch.ones(2**24)
    measured = measure.seconds_and_peak(lambda: torch.ones(2**24).sum(), device, repeats=repeats)
    assert held.sum() == 2**24
    return measured


@pytest.mark.nightly
def test_peak_memory_is_that_of_the_run():
    # In a new process: in this one, memory that earlier tests freed may hold all that the run writes.
    measured = measure.in_fresh_process(write_beside_what_is_held, repeats=1, device="cpu")
    assert 60 < measured["peak_mib"] < 90


def test_speed_up_on_the_cpu_is_of_the_work():
    assert measure.speed_up({"cpu_seconds": 3.0}, {"cpu_seconds": 2.0}, "cpu") == 1.5


def test_work_of_no_tick_of_the_clock_has_a_speed(monkeypatch):
    clock = SimpleNamespace(process_time=lambda: 1.0, perf_counter=lambda: 1.0)
    for module in (measure, sampler):
        monkeypatch.setattr(module, "time", clock)
    found = measure.seconds_and_peak(lambda: None, "cpu")
    assert measure.speed_up(found, found, "cpu") == 1
    assert measure.fastest({"one": lambda: None}, 2)["one"] > 0
    assert sampler.matmul_flops(torch.device("cpu"), torch.float32, 2) > 0
    assert {"TFLOP/s", "GB/s"} == {name for row in gpu.roofline(True, "cpu") for name in row} - {"what"}


def test_table_is_markdown():
    assert measure.table([{"a": 1, "b": 2.5}]) == "| a | b |\n| --- | --- |\n| 1 | 2.5 |"


def test_the_products_of_a_step_are_those_of_all_its_forwards_and_backwards(tmp_path):
    """The update runs the two views' forwards again, or goes back through the graphs of scoring."""
    example = limit.readme_example()
    products = [
        limit.started(replace(example, max_retained_graphs=number), str(tmp_path / str(number)))[-1].calls
        for number in (0, None)
    ]
    names = [[function.__name__ for function, *_ in calls] for calls in products]
    blocks = 3
    attention = [
        [sum("dot_product" in x and ("backward" in x) == back for x in each) for back in (False, True)]
        for each in names
    ]
    steps, views = 2, 2  # a sampler's step writes one of the two tokens, and a view scores it
    assert attention == [[blocks * (steps + 2 * views), blocks * views], [blocks * (steps + views), blocks * views]]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["head_precision", "late_rollouts", "linear", "scoring", "sync"])
def test_every_benchmark_runs(name):
    if name.startswith("late"):
        pytest.importorskip("ray", reason="Ray is an optional extra")
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--smoke"], capture_output=True, text=True)
    assert (done.returncode == 0 and done.stdout.count("|") > 10) or "steps" in done.stdout, done.stderr


def test_the_waits_of_a_server_by_hand(monkeypatch):
    """Batches of a second each: the second has both requests that came during the first, the third none that waited."""
    clock, batches = [0.0], []
    monkeypatch.setattr(waiting, "time", SimpleNamespace(process_time=lambda: clock[0]))

    def sample(policy, jobs):
        batches.append(len(jobs))
        clock[0] += 1

    monkeypatch.setattr(waiting, "sample_rows", sample)
    waits, totals = waiting.latencies(None, [0.0, 0.25, 0.75, 5.0])
    assert batches == [1, 2, 1]
    assert waits == [0, 0.75, 0.25, 0] and totals == [1, 1.75, 1.25, 1]
