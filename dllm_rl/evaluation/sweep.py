"""Results of one task at many settings: a table of numbers, and a curve of accuracy against steps."""

import csv
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from dllm_rl.evaluation.results import headline
from dllm_rl.files import replacing
from dllm_rl.screen import escape_controls

SAMPLER = ("max_new_tokens", "num_steps", "block_size", "temperature", "rank", "commit", "cache")
SETTINGS = ("model", "quantization", *SAMPLER)
FACTS = ("task", "version", "protocol", "split", "seed", "n", "samples")
COSTS = ("steps", "tokens", "forwards", "seconds")


def varying(found: Sequence[dict[str, Any]]) -> list[str]:
    """The settings in which the results differ; the model if the results differ in nothing."""
    return [name for name in SETTINGS if len({str(row.get(name)) for row in found}) > 1] or ["model"]


def write_csv(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """A row per result: settings, each metric with its interval, and the difference from the first model, if any."""
    rows = []
    for result in found:
        row = {name: result.get(name) for name in (*FACTS, *SETTINGS)}
        for name, value in result.items():
            if name.endswith("_interval"):
                metric = name.removesuffix("_interval")
                row[metric] = result[metric]
                row[f"{metric}_low"], row[f"{metric}_high"] = value
        for name, numbers in result.get("difference", {}).items():
            columns = (f"{name}_difference", f"{name}_difference_low", f"{name}_difference_high")
            row |= zip(columns, numbers, strict=True)
        for name in COSTS:
            row[name] = result[name]
        rows.append(row)
    header = list(dict.fromkeys(chain.from_iterable(rows)))  # the first model has no differences, later ones have
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)


def plot_curve(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """A PNG: the headline metric with 95 % intervals against steps per completion; a line per other settings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metric = headline(found[0])
    lines: dict[str, list[tuple[float, ...]]] = {}  # label -> (steps, mean, low, high) of each point
    for row in found:
        shown = []
        for name in varying(found):
            if name == "commit":
                # The numbers of an adaptive rule (threshold=0.9, 0.8 ...) are points of one line.
                shown.append(str(row.get(name)).partition("=")[0])
            elif name != "num_steps":  # the axis
                shown.append(str(row.get(name)))
        point = (row["steps"], row[metric], *row[f"{metric}_interval"])
        lines.setdefault(", ".join(shown), []).append(point)
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, points in lines.items():
        steps, means, low, high = zip(*sorted(points, key=itemgetter(0)), strict=True)
        # A dollar sign would begin a formula.
        (line,) = axis.plot(steps, means, marker="o", label=escape_controls(label).replace("$", r"\$"))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
    ticks = sorted({round(row["steps"], 1) for row in found})
    axis.set(xlabel="steps of a completion", ylabel=metric, title=f"{found[0]['task']}, {found[0]['n']} problems")
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, list(map("{:g}".format, ticks)))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize="small")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
