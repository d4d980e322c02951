"""The benchmark's smoke preset: it runs, and its plain algorithm and the sampler write the same tokens."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from benchmarks import sampler


@cache
def run(preset):
    return sampler.benchmark(preset, torch.device("cpu"), 1)["lines"]


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


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_the_published_cache_runs_the_positions_that_ours_does(kind):
    lines = run("tiny")
    ours, plain = lines[f"{kind} cache (approximate)"], lines[f"plain {kind} cache: Fast-dLLM's, as published"]
    assert ours["forwards"] == plain["forwards"] and ours["body_positions"] == plain["body_positions"]
    # 4 rows, 48 columns; three of a block's four steps run the block, or all from it on: 32 columns, then 16.
    later = {"prefix": 3 * (32 + 16), "dual": 3 * (16 + 16)}[kind]
    assert plain["body_positions"] == plain["head_rows"] == 4 * (2 * 48 + later)
    assert ours["head_rows"] == 4 * 2 * (16 + 12 + 8 + 4)


def test_each_way_writes_the_tokens_of_its_published_counterpart():
    rows = sampler.against([replace(sampler.PRESETS["tiny"], batch=2)], 1)
    assert [row["way"] for row in rows] == ["exact", "prefix cache", "dual cache"]
    assert all(row["same tokens"] == 1.0 and row["ratio"] > 0 for row in rows)


def test_products_are_all_of_a_runs_and_run_again_alone():
    """Two layers of seven products and one attention, and a head of two chunks; nothing else is kept."""
    policy = sampler.random_policy(sampler.PRESETS["tiny"], torch.device("cpu"))
    tokens = torch.full((2, 8), 5)
    with torch.no_grad(), sampler.Kept(*sampler.PRODUCTS) as products:
        for rows in policy.hidden(tokens, tokens > 0):
            policy.head(rows)
    names = [function.__name__ for function, _, _ in products.calls]
    angles = names.count("bmm.default")  # of positions: one product in early transformers 5, later none
    assert names.count("mm.default") == 2 * 7 + 2 and len(names) - angles == 2 * 8 + 2
    weights = {args[1].data_ptr() for function, args, _ in products.calls if function.__name__ == "mm.default"}
    assert len(weights) == 2 * 7 + 1
    products()


def test_forwards_are_all_operations_of_backbone_and_head():
    policy = sampler.random_policy(sampler.PRESETS["tiny"], torch.device("cpu"))
    tokens = torch.full((2, 8), 5)
    with torch.no_grad(), sampler.forwards_kept(policy) as forwards, sampler.Kept(*sampler.PRODUCTS) as products:
        policy.head(policy.hidden(tokens, tokens > 0)).softmax(-1)
    names = [function.__name__ for function, _, _ in forwards.calls]
    assert sum("mm" in name or "scaled_dot" in name for name in names) == len(products.calls) > 0
    assert names.count("silu.default") == 2 and "_softmax.default" not in names and "t.default" not in names
    forwards()


def test_ragged_prompts_are_padded_for_the_plain_algorithm_and_not_for_the_sampler():
    lines = run("tiny-ragged")
    plain, exact = lines["plain: the published algorithm"], lines["exact sampler"]
    assert exact["same_tokens"] == 1.0 and exact["body_positions"] < 0.9 * plain["body_positions"]
