"""Results of one task at many settings: accuracy against forwards and seconds."""

from collections.abc import Sequence
from math import log2, nan
from pathlib import Path
from typing import Any

from dllm_rl.evaluation.results import headline
from dllm_rl.files import replacing
from dllm_rl.monitoring.plots import default_style, import_matplotlib
from dllm_rl.screen import escape_controls

SAMPLER = ("max_new_tokens", "diffusion_steps", "block_size", "temperature", "rank", "commit", "cache")
WIDE = 8  # ratio of the largest to the smallest cost from which an axis is logarithmic
SETTINGS = ("model", "quantization", *SAMPLER)


def varying(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the settings that differ between results; ["model"] if none does."""
    return [name for name in SETTINGS if len({str(row[name]) for row in results if name in row}) > 1] or ["model"]


def metric_of(results: Sequence[dict[str, Any]]) -> str:
    """Return the metric that the protocol of some results reports: cell_accuracy for Sudoku under a paper's, else the
    headline. Of a grader that may return None, some of the results may lack it.
    """
    names = {name for result in results for name in result}
    is_published = results[0].get("protocol") not in (None, "own", "strict")
    return "cell_accuracy" if is_published and "cell_accuracy" in names else headline(names)


def plot_curve(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write the figure of `draw_sweep` as a PNG."""
    with replacing(path) as partial, default_style():
        draw_sweep(results).savefig(partial, dpi=110, format="png")


def draw_sweep(results: Sequence[dict[str, Any]]) -> Any:
    """Return a matplotlib Figure: `metric_of` results, with 95 % intervals, against forwards and seconds per answer,
    with a line per sampler. It is not one of pyplot's figures.
    """
    import_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    metric = metric_of(results)
    results = [row for row in results if metric in row]
    names_differing = [name for name in varying(results) if name != "diffusion_steps"]  # steps are on the axis
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        # The numbers of an adaptive rule (threshold=0.9, 0.8 ...) are points of one line.
        grouped = row | {"commit": str(row.get("commit")).partition("=")[0]}
        lines.setdefault(", ".join(str(grouped.get(name)) for name in names_differing), []).append(row)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, cost in zip(axes, (_forwards, _seconds), strict=True):
        for label, rows in lines.items():
            rows = sorted(rows, key=cost)
            # Without an interval, no band is drawn.
            low, high = zip(*(row[f"{metric}_interval"] or (nan, nan) for row in rows), strict=True)
            costs = list(map(cost, rows))
            # A dollar sign would begin a formula.
            text = escape_controls(label).replace("$", r"\$")
            (line,) = axis.plot(costs, [row[metric] for row in rows], marker="o", label=text)
            axis.fill_between(costs, low, high, color=line.get_color(), alpha=0.15)
        costs = list(map(cost, results))
        if max(costs) >= WIDE * min(costs):  # of a narrower range, an axis of powers of 2 may have a single tick
            axis.set_xscale("log", base=2)
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(alpha=0.3)
    ticks = sorted({2 ** round(log2(_forwards(row))) for row in results})
    axes[0].set_xticks(ticks, list(map("{:g}".format, ticks)))
    axes[0].set(xlabel="forwards per answer", ylabel=metric)
    axes[1].set(xlabel="seconds per answer")
    axes[1].xaxis.set_major_formatter("{x:.3g}")
    figure.suptitle(f"{results[0]['task']}, {results[0]['n']} problems")
    if len(lines) > 1:
        axes[0].legend(fontsize="small")
    return figure


def _forwards(row: dict[str, Any]) -> float:
    return row["forwards_per_answer"]


def _seconds(row: dict[str, Any]) -> float:
    return row["seconds"] / (row["n"] * row["samples"])
