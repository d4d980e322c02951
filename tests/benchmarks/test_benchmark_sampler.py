"""The benchmark's smoke preset: it runs, and its plain algorithm and the sampler write the same tokens."""

import importlib.util
from pathlib import Path

import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "sampler.py"


def run(preset):
    spec = importlib.util.spec_from_file_location("benchmark_of_the_sampler", PATH)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark.benchmark(preset, torch.device("cpu"), 2)["lines"]


def test_smoke():
    lines = run("tiny")
    plain, exact = lines["plain: the published algorithm"], lines["exact sampler"]
    assert exact["same_tokens"] == lines["plain, head on open positions only"]["same_tokens"] == 1.0
    assert plain["forwards"] == exact["forwards"] == 8
    # 4 rows, 48 columns, 8 steps; open positions of a block of 16 in 4 steps: 16 + 12 + 8 + 4.
    assert plain["body_positions"] == plain["head_rows"] == 4 * 48 * 8
    assert exact["body_positions"] == 4 * 48 * 8 and exact["head_rows"] == 4 * 2 * (16 + 12 + 8 + 4)
    assert lines["dual cache (approximate)"]["body_positions"] == 4 * 2 * (48 + 3 * 16)
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["speedup"] > 0 for row in lines.values())
    assert lines["plain, softmax in fp64"]["same_tokens"] == 1.0


def test_the_published_dual_cache_writes_what_ours_does():
    lines = run("tiny")
    ours, plain = lines["dual cache (approximate)"], lines["plain dual cache: Fast-dLLM's, as published"]
    assert ours["same_tokens"] == plain["same_tokens"] and ours["forwards"] == plain["forwards"]
    assert ours["body_positions"] == plain["body_positions"] and ours["head_rows"] < plain["head_rows"]


def test_ragged_prompts_are_padded_for_the_plain_algorithm_and_not_for_the_sampler():
    lines = run("tiny-ragged")
    plain, exact = lines["plain: the published algorithm"], lines["exact sampler"]
    assert exact["same_tokens"] == 1.0 and exact["body_positions"] < 0.9 * plain["body_positions"]
