"""Plot a run from the files in its folder."""

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_rl.files import read_json, replacing
from dllm_rl.monitoring.health import mixed_share
from dllm_rl.monitoring.json_lines import current_rows, finite_numbers, warmup_rows
from dllm_rl.monitoring.record import ESS, MISMATCH, ROUNDING, RunRecord, is_reward_function
from dllm_rl.screen import escape_controls

SOLVED = ("solve_rate", "accuracy", "correct")  # the headline shows the first of these that a run has
COLORS = ("#3b7dd8", "#d9772b", "#2f9e6e", "#8a5cc2", "#7a6a53", "#c2418c")  # of the metrics of a panel, in turn
DASHES = ("-", "--", ":", "-.")
MIXED = "mixed"  # the share of mixed groups, which metrics.jsonl has as 1 - frac_reward_zero_std
MISMATCHES = ("rollout_corr/k3_kl", MISMATCH)


@dataclass(frozen=True)
class Panel:
    """Axes of the plot."""

    title: str
    unit: str
    metrics: dict[str, str]  # name -> text in the legend
    points: tuple[str, ...] = ()  # metrics that only some steps have
    pairs: bool = False  # whether points[i] is the held-out value of the i-th metric, in whose color it is drawn

    def drawn(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """Return the metrics of the panel that some row has."""
        return [name for name in self.metrics if any(name in row for row in rows)]


SOLVED_PANEL = Panel(
    "Problems solved",
    "share",
    {f"rewards/{name}/mean": f"{name.replace('_', ' ')}, training" for name in SOLVED},
    tuple(f"eval/{name}" for name in SOLVED),
)
MISMATCH_PANELS = (
    Panel("Mismatch", "nats", dict(zip(MISMATCHES, ("k3 KL", "mean |log ratio|"), strict=True))),
    Panel("Effective sample size", "share", {ESS: "of the raw ratios"}),
)
SFT_PANELS = (
    Panel("Loss", "nats a token", {"loss": "training"}, ("eval/loss",)),
    Panel("Gradient norm", "before clipping", {"grad_norm": "gradient norm"}),
)


def rl_panels(rows: Sequence[Mapping[str, float]]) -> list[Panel]:
    """Return the panels of an RL run, whose loss is not a likelihood and is not drawn. Those of the mismatch are left
    out of a run without any, and a single reward function that is the reward has no panel of its own.
    """
    functions = sorted({name for row in rows for name in row if is_reward_function(name)} - {*SOLVED_PANEL.metrics})
    if len(functions) == 1 and all(
        math.isclose(row[functions[0]], row["reward"]) for row in rows if functions[0] in row
    ):
        functions = []
    names = {name: name.split("/")[1] for name in functions}
    labels = {name: escape_controls(short).replace("$", r"\$") for name, short in names.items()}
    panels = [
        Panel("Reward", "reward", {"reward": "training"}, ("eval/reward",)),
        SOLVED_PANEL,
        Panel("Reward functions", "mean", labels, tuple(f"eval/{short}" for short in names.values()), pairs=True),
        Panel("Mixed groups", "share of the groups", {MIXED: "training"}),
    ]
    has_mismatch = any(abs(row.get(name, 0.0)) > ROUNDING for row in rows for name in MISMATCHES)
    return [*panels, *(MISMATCH_PANELS if has_mismatch else ())]


def read_metrics(directory: Path) -> list[dict[str, float | int]]:
    """Read the valid rows of metrics.jsonl."""
    return current_rows(directory / "metrics.jsonl")


def headline(summary: dict[str, Any]) -> str:
    """Return the name, seed and result of a run in one line."""
    recipe = summary.get("recipe", {})
    before = summary.get("eval_before", {})
    after = summary.get("eval_after", {})
    text = f"{recipe.get('name', 'a run')}, seed {recipe.get('seed', '?')}"
    name = next((name for name in (*SOLVED, "reward") if name in before), "loss")
    if name in before and name in after:
        text += f": {name.replace('_', ' ')} {before[name]:.3f} → {after[name]:.3f}"
        if (number := summary.get("eval_problems")) is not None:
            is_held_out = summary.get("eval_problems_in_training", 0) < number
            text += f" on {number} {'held-out' if is_held_out else 'training'} problem{'s' * (number != 1)}"
    return escape_controls(text)


def smoothed(values: Sequence[float], *, width: int) -> list[float]:
    """Return the moving mean of the values, over up to `width` neighbors on either side, without gaps (NaN)."""
    means = []
    for index in range(len(values)):
        neighbors = [value for value in values[max(0, index - width) : index + width + 1] if not math.isnan(value)]
        means.append(math.fsum(neighbors) / len(neighbors) if neighbors else math.nan)
    return means


def draw_curve(axis: Any, rows: Sequence[dict[str, Any]], name: str, **style: Any) -> None:
    """Draw a metric against steps: smoothed over a twentieth of the steps, and the raw values faintly."""
    steps = [row["step"] + 1 for row in rows]
    values = [row.get(name, math.nan) for row in rows]  # NaN makes a gap
    marker = "o" if len(steps) == 1 else None  # a line through one point would be invisible
    (line,) = axis.plot(steps, smoothed(values, width=len(steps) // 40), marker=marker, **style)
    axis.plot(steps, values, linewidth=0.7, alpha=0.3, color=line.get_color())


def draw_metrics(axis: Any, rows: Sequence[dict[str, Any]], panel: Panel, summary: dict[str, dict[str, float]]) -> None:
    """Draw the metrics of a panel, each in its color, and its held-out metrics as points; those before and after the
    run as squares, unless the panel has several functions.
    """
    for i, name in enumerate(panel.metrics):
        if any(name in row for row in rows):
            style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i % len(DASHES)]}
            draw_curve(axis, rows, name, linewidth=1.6, label=panel.metrics[name], **style)
    for i, name in enumerate(panel.points):
        points = {row["step"] + 1: row[name] for row in rows if name in row}
        ends = [summary.get(key, {}).get(name.removeprefix("eval/")) for key in ("eval_before", "eval_after")]
        squares = dict(zip((0, rows[-1]["step"] + 1), ends, strict=True)) if rows and None not in ends else {}
        change = ": {:.3f} → {:.3f}".format(*squares.values()) if squares else ""
        color, label, style = COLORS[1], "held out, during the run", {"markeredgewidth": 0, "clip_on": False}
        if panel.pairs:
            points, squares = points | squares, {}
            color, label = COLORS[i % len(COLORS)], f"{[*panel.metrics.values()][i]}, held out{change}"
        if points:
            axis.plot(points.keys(), points.values(), "o", label=label, color=color, markersize=4, **style)
        if squares:
            label = f"held out, before → after{change}"
            axis.plot(squares.keys(), squares.values(), "s", label=label, color="#d0485a", markersize=6, **style)


def import_matplotlib() -> None:
    """Import matplotlib. Call it before another import of matplotlib, which fails if MPLBACKEND names a backend that is
    not installed. A known backend stays chosen, for the caller's own figures; ours are drawn by Agg.
    """
    chosen = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if chosen is not None:
            os.environ["MPLBACKEND"] = chosen
    if chosen:
        with suppress(ValueError):  # it is unknown: pyplot chooses one
            matplotlib.rcParams["backend"] = chosen  # as matplotlib does when it is imported


@contextmanager
def default_style() -> Iterator[None]:
    """Draw and save in the block with matplotlib's default style, whatever a matplotlibrc says: one with `text.usetex`
    would need LaTeX.
    """
    import_matplotlib()
    import matplotlib.style

    with matplotlib.style.context("default"):
        yield


def with_mixed_share(row: dict[str, float]) -> dict[str, float]:
    """Return a row with its share of mixed groups, if that is known."""
    share = mixed_share(row)
    return row if share is None else row | {MIXED: share}


def verdict_of(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Return what keeps a run from learning, for the title; [] if nothing is seen."""
    problems = RunRecord(rows).problems
    return [f"{problems[0].state}: {', '.join(problem.name for problem in problems)}"] if problems else []


def plot(directory: Path, *, levels: Mapping[str, float] | None = None) -> Path:
    """Draw a run in `directory`/training.png, and return that path. `draw_run` has the arguments."""
    path = directory / "training.png"
    with replacing(path) as partial, default_style():
        draw_run(directory, levels=levels).savefig(partial, dpi=110, format="png")
    return path


def draw_run(directory: Path, *, levels: Mapping[str, float] | None = None) -> Any:
    """Return a matplotlib Figure of a run: the warm-up, and a panel for each kind of metric that the run has. Before
    the end of a run there is no summary.json, and the figure lacks the result.

    The figure is not one of pyplot's, so that the backend of a notebook stays what it is.

    Args:
        directory: Folder of the run.
        levels: Shares of solved problems to compare the run with, drawn as horizontal lines with these names. None
            (default): no lines.
    """
    import_matplotlib()
    from matplotlib.figure import Figure

    logged = read_metrics(directory)
    is_rl = not logged or "reward" in logged[0]
    rows = [with_mixed_share(finite_numbers(row)) for row in logged]
    summary_path = directory / "summary.json"
    summary = read_json(summary_path) if summary_path.exists() else {}
    warmup = warmup_rows(directory / "metrics.jsonl")
    panels = [panel for panel in (rl_panels(rows) if is_rl else SFT_PANELS) if not rows or panel.drawn(rows)]
    count = max(1, len(panels) + bool(warmup))
    lines = 1 if count <= 3 else 2
    columns = math.ceil(count / lines)
    figure = Figure(figsize=(3.75 * columns, 4.0 * lines), layout="constrained")
    axes = [figure.add_subplot(lines, columns, place + 1) for place in range(count)]
    figure.suptitle("\n".join([headline(summary), *verdict_of(rows)]), parse_math=False)
    if warmup:
        losses = [math.nan if (loss := row.get("warmup/loss")) is None else loss for row in warmup]
        axes[0].plot([row["warmup_step"] + 1 for row in warmup], losses, linewidth=1.2)
        axes[0].set(title="Warm-up", xlabel="supervised step", ylabel="loss, nats")
    for axis, panel in zip(axes[bool(warmup) :], panels, strict=True):
        draw_metrics(axis, rows, panel, summary)
        for name, level in (levels or {}).items() if panel is SOLVED_PANEL else ():
            axis.axhline(level, color="black", linewidth=1.2, linestyle="--", label=f"{name}: {level:.3f}")
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize="small")  # hides no point there
        if MIXED in panel.metrics:
            axis.set_ylim(-0.02, 1.02)
        axis.set(title=panel.title, xlabel="RL step" if is_rl else "step", ylabel=panel.unit)
    for axis in axes:
        plain_ticks(axis)
    return figure


def plain_ticks(axis: Any) -> None:
    """Give axes of a metric over the steps a grid, ticks at whole steps alone, and whole numbers at the ticks: 0.9999,
    and not 1 with "-1e-4" above the axis.
    """
    from matplotlib.ticker import MaxNLocator

    axis.grid(alpha=0.3)
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
