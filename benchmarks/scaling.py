"""How the sampler's cost grows: with batch, length, steps, vocabulary and raggedness, one at a time.

    python -m benchmarks.scaling --json benchmarks/results/scaling-cpu.json --figure benchmarks/results/scaling.png

Processor seconds of a rollout in LLaDA's layout with random weights, best of `--repeats`, the arms by turns: the plain
published algorithm, the exact sampler, and the dual cache. `--drawn FILE` measures nothing: it draws what a file has.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import fastest, machine, table, write_json
from benchmarks.published import plain
from benchmarks.sampler import Shape, random_policy, random_prompts
from dllm_rl.samplers.cache import DualCache
from dllm_rl.samplers.unmask import Unmask

BASE = Shape(4, 256, 4, 768, 16384, batch=4, prompt=64, new=64, block=32, steps=16)
SMOKE = Shape(1, 32, 2, 64, 512, batch=2, prompt=8, new=8, block=4, steps=4)
# Axis -> settings of the shape for each of its values; length is that of prompt and completion, half each.
AXES: dict[str, dict[int, dict[str, Any]]] = {
    "batch": {n: {"batch": n} for n in (1, 2, 4, 8, 16)},
    "length": {n: {"prompt": n // 2, "new": n // 2, "steps": 32} for n in (64, 128, 256, 512, 1024)},
    "steps": {n: {"steps": n} for n in (4, 8, 16, 32, 64)},
    "vocabulary": {n: {"vocabulary": n} for n in (2048, 8192, 32768, 131072)},
    "longest / shortest prompt": {n: {"batch": 8, "prompt": 256, "shortest": 256 // n} for n in (1, 2, 4, 8, 16)},
}
# The columns of the rows that are drawn, where they have them: label and style.
ARMS = {
    "plain": ("plain", "s--"),
    "exact": ("exact", "o-"),
    "dual cache": ("dual cache", "^-"),
}
IN_PROPORTION = ("batch", "length", "steps")  # axes with a line to compare the growth with


def measure(shape: Shape, repeats: int) -> dict[str, float]:
    policy = random_policy(shape, torch.device("cpu"))
    prompts = random_prompts(policy, shape)
    settings = {"max_new_tokens": shape.new, "diffusion_steps": shape.steps, "block_size": shape.block}
    ours = partial(Unmask(**settings), policy, prompts, torch.Generator())
    arms: dict[str, Callable[[], Any]] = {
        "plain": partial(plain, policy, prompts, shape),
        "exact": ours,
        "dual cache": ours.replace(cache=DualCache()),
    }
    return {name: round(seconds, 4) for name, seconds in fastest(arms, repeats).items()}


def sweep(base: Shape, axes: dict[str, dict[int, dict[str, Any]]], repeats: int) -> list[dict[str, Any]]:
    found = []
    for axis, points in axes.items():
        for value, settings in points.items():
            found.append({"axis": axis, "value": value, **measure(base.replace(**settings), repeats)})
            print(found[-1], flush=True)
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel an axis, both scales logarithmic: the dotted line of slope 1 is a cost in proportion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = plt.subplots(1, len(axes), figsize=(3 * len(axes), 2.8), sharey=True)
    for panel, axis in zip(panels, axes, strict=True):
        found = [row for row in rows if row["axis"] == axis]
        values = [row["value"] for row in found]
        arms = [arm for arm in ARMS if arm in found[0]]
        for arm in arms:
            label, style = ARMS[arm]
            panel.plot(values, [row[arm] for row in found], style, label=label, markersize=4)
        if axis in IN_PROPORTION:
            base = found[0][arms[-1]] / values[0]
            panel.plot(values, [value * base for value in values], ":", color="grey", label="in proportion")
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xticks(values, [f"{value:,}" for value in values], fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("processor seconds")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="two points an axis of a tiny model: seconds")
    parser.add_argument("--json", help="where to write the numbers")
    parser.add_argument("--figure", type=Path, help="where to draw them")
    parser.add_argument("--drawn", type=Path, help="with --figure: draw what this file has, and measure nothing")
    arguments = parser.parse_args()
    if arguments.drawn:
        found = json.loads(arguments.drawn.read_text())
        draw(found["rows"], arguments.figure)
        return
    torch.set_num_threads(1)
    base, axes = BASE, AXES
    if arguments.smoke:
        base, axes = SMOKE, {"batch": {n: {"batch": n} for n in (1, 2)}, "steps": {n: {"steps": n} for n in (2, 4)}}
    rows = sweep(base, axes, arguments.repeats)
    print(table(rows))
    write_json(
        arguments.json, {"machine": machine("cpu"), "base": {k: str(v) for k, v in vars(base).items()}, "rows": rows}
    )
    if arguments.figure:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
