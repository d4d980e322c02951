"""Results of one task at many settings: a table of numbers, and a curve of accuracy against steps."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm_rl.evaluation.results import headline
from dllm_rl.files import replacing
from dllm_rl.screen import escape_controls

SAMPLER = ("max_new_tokens", "num_steps", "block_size", "temperature", "rank", "commit", "cache")
SETTINGS = ("model", "quantization", *SAMPLER)
FACTS = ("task", "version", "protocol", "split", "seed", "n", "samples")


def varying(found: Sequence[dict[str, Any]]) -> list[str]:
    """The settings in which the results differ; the model if the results differ in nothing."""
    return [name for name in SETTINGS if len({str(row.get(name)) for row in found}) > 1] or ["model"]


def write_csv(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """A row per result: settings, each metric with its interval, and the difference from the first model, if any."""
    metrics = list(dict.fromkeys(name for row in found for name in row if f"{name}_interval" in row))
    rows = []
    for result in found:
        row = {name: result.get(name) for name in (*FACTS, *SETTINGS)}
        for name in metrics:
            low, high = result.get(f"{name}_interval", (None, None))
            row |= {name: result.get(name), f"{name}_low": low, f"{name}_high": high}
        for name, numbers in result.get("difference", {}).items():
            row |= dict(zip((f"{name}_less", f"{name}_less_low", f"{name}_less_high"), numbers, strict=True))
        rows.append(row | {name: result[name] for name in ("steps", "tokens", "forwards", "seconds")})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def plot_curve(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """A PNG: the headline metric with 95 % intervals against steps per completion; a line per other settings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metric, names = headline(found[0]), [name for name in varying(found) if name != "num_steps"]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        # The numbers of an adaptive rule (threshold=0.9, 0.8 ...) are points of one line.
        label = ", ".join(
            str(row.get(name)).partition("=")[0] if name == "commit" else str(row.get(name)) for name in names
        )
        lines.setdefault(label, []).append(row)
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, rows in lines.items():
        rows = sorted(rows, key=lambda row: row["steps"])
        steps, means = [row["steps"] for row in rows], [row[metric] for row in rows]
        low, high = zip(*(row[f"{metric}_interval"] for row in rows), strict=True)
        (line,) = axis.plot(steps, means, marker="o", label=escape_controls(label).replace("$", r"\$"))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
    ticks = sorted({round(row["steps"], 1) for row in found})
    axis.set(xlabel="steps of a completion", ylabel=metric, title=f"{found[0]['task']}, {found[0]['n']} problems")
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize="small")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
