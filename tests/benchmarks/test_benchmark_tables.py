"""The sampler's table in benchmarks/README.md is that of the stored results."""

import json
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def stored(name):
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())["lines"]


def rows():
    """The cells of the sampler's first table, without bold type."""
    section = (BENCHMARKS / "README.md").read_text().partition("## Sampler:")[2].partition("\n## ")[0]
    table = section[section.index("| ---") :].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip().replace("**", "") for cell in line.strip("|").split("|")] for line in table]


def test_the_samplers_table():
    timed, memory = stored("sampler_cpu_processor"), stored("sampler_cpu")
    for way, seconds, speedup, peak, same in rows():
        row = timed[way]
        assert (seconds, speedup) == (f"{row['cpu_seconds']:.1f}", f"{row['speedup']:.2f}"), way
        assert same == f"{100 * row['same_tokens']:.0f} %", way
        share = memory.get(way, {}).get("memory_ratio")
        assert peak == ("" if share is None else f"{100 * share:.1f} %".replace(".0 ", " ")), way


def test_one_trick_is_all_of_the_samplers_factor():
    timed = stored("sampler_cpu_processor")
    assert timed["plain, head on open positions only"]["speedup"] > timed["exact sampler"]["speedup"]
    assert "plain, head on open positions only" in [row[0] for row in rows()]
