"""Pictures of a run, from the files in its folder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dllm_rl.files import read_json, replacing
from dllm_rl.monitoring.json_lines import current_rows, known, number, warmup_rows
from dllm_rl.screen import escape_controls

SOLVED = ("solve_rate", "accuracy", "correct")  # the first that a run has is in its headline
COLOURS = ("#3b7dd8", "#d9772b", "#2f9e6e")  # of a panel's metrics; a panel has at most three
DASHES = ("-", "--", ":")


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    metrics: dict[str, str]  # name -> text in the legend
    points: tuple[str, ...] = ()  # metrics of some steps only


SOLVED_PANEL = Panel(
    "Problems solved",
    "share",
    {f"rewards/{name}/mean": f"{name.replace('_', ' ')}, training" for name in SOLVED},
    tuple(f"eval/{name}" for name in SOLVED),
)
NO_LEVELS: Mapping[str, float] = MappingProxyType({})
PANELS = (  # of an RL run, whose loss is no likelihood and is not drawn
    Panel("Reward", "reward", {"reward": "training"}, ("eval/reward",)),
    SOLVED_PANEL,
    Panel("Mismatch", "nats", {"rollout_corr/k3_kl": "k3 KL", "rollout_corr/abs_log_ratio_mean": "mean |log ratio|"}),
    Panel("Effective sample size", "share", {"rollout_corr/ess": "of the raw ratios"}),
)
PANELS_OF_SFT = (
    Panel("Loss", "nats a token", {"loss": "training"}, ("eval/loss",)),
    Panel("Gradient norm", "before clipping", {"grad_norm": "gradient norm"}),
)


def read_metrics(directory: Path) -> list[dict[str, float | int]]:
    return current_rows(directory / "metrics.jsonl")


def headline(summary: dict[str, Any]) -> str:
    """Name, seed and result of a run in one line."""
    recipe = summary.get("recipe", {})
    before = summary.get("eval_before", {})
    after = summary.get("eval_after", {})
    text = f"{recipe.get('name', 'a run')}, seed {recipe.get('seed', '?')}"
    name = next((name for name in (*SOLVED, "reward") if name in before), "loss")
    if name in before and name in after:
        problems = f" on {summary['eval_problems']} held-out problems" if "eval_problems" in summary else ""
        text += f": {name.replace('_', ' ')} {before[name]:.3f} → {after[name]:.3f}{problems}"
    return escape_controls(text)


def smoothed(values: Sequence[float], *, width: int) -> list[float]:
    """The mean of the values up to `width` places away on either side, without gaps (NaN)."""
    means = []
    for place in range(len(values)):
        near = [value for value in values[max(0, place - width) : place + width + 1] if not math.isnan(value)]
        means.append(math.fsum(near) / len(near) if near else math.nan)
    return means


def column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """A metric at every row; NaN, a gap, where it is absent or null."""
    return [math.nan if (found := number(row.get(name))) is None else found for row in rows]


def curve(axis: Any, rows: Sequence[dict[str, Any]], name: str, **style: Any) -> None:
    """A metric against steps: smoothed over a twentieth of them, and pale without smoothing."""
    steps = [row["step"] + 1 for row in rows]
    values = column(rows, name)
    marker = "o" if len(steps) == 1 else None  # a line of one point shows nothing
    (line,) = axis.plot(steps, smoothed(values, width=len(steps) // 40), marker=marker, **style)
    axis.plot(steps, values, linewidth=0.7, alpha=0.3, color=line.get_color())


def held_out(axis: Any, rows: Sequence[dict[str, Any]], name: str) -> None:
    points = [(row["step"] + 1, found) for row in rows if (found := number(row.get(name))) is not None]
    if points:
        axis.plot(
            *zip(*points, strict=True),
            "o",
            color=COLOURS[1],
            label="held out, during the run",
            markersize=4,
            markeredgewidth=0,
        )


def whole_steps(axis: Any) -> None:
    """No ticks between two steps."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))


def measured(panel: Panel, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The panel's metrics with a number in some row."""
    seen = {name for row in rows for name in known(row)}
    return [name for name in panel.metrics if name in seen]


def lines_of(axis: Any, rows: Sequence[dict[str, Any]], panel: Panel) -> None:
    """The panel's metrics, of which each has its colour, and its held-out metrics as points."""
    for i, name in enumerate(measured(panel, rows)):
        curve(axis, rows, name, color=COLOURS[i], linestyle=DASHES[i], linewidth=1.6, label=panel.metrics[name])
    for name in panel.points:
        held_out(axis, rows, name)


def ends(axis: Any, rows: Sequence[dict[str, Any]], panel: Panel, summary: dict[str, Any]) -> None:
    """The held-out numbers before and after the run, as squares."""
    for name in panel.points:
        metric = name.removeprefix("eval/")
        if rows and metric in summary.get("eval_before", {}) and metric in summary.get("eval_after", {}):
            values = [summary["eval_before"][metric], summary["eval_after"][metric]]
            label = f"held out, before → after: {values[0]:.3f} → {values[1]:.3f}"
            steps = [0, rows[-1]["step"] + 1]
            axis.plot(steps, values, "s", color="#d0485a", markersize=6, label=label, clip_on=False)


def plot(directory: Path, *, levels: Mapping[str, float] = NO_LEVELS) -> Path:
    """Draw `directory`/training.png: the warm-up, and a panel for each kind of number that the run has. Without
    summary.json, as of a run that has not ended, the picture lacks the result.

    Args:
        levels: Shares of solved problems to compare the run with, by name: horizontal lines.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(directory)
    written = directory / "summary.json"
    summary = read_json(written) if written.exists() else {}
    warmup = warmup_rows(directory / "metrics.jsonl")
    rl = not rows or "reward" in rows[0]
    panels = [panel for panel in (PANELS if rl else PANELS_OF_SFT) if not rows or measured(panel, rows)]
    count = len(panels) + bool(warmup)
    figure, axes = plt.subplots(1, count, figsize=(3.75 * count, 3.4), layout="constrained", squeeze=False)
    figure.suptitle(headline(summary), parse_math=False)
    if warmup:
        axes[0, 0].plot([row["warmup_step"] + 1 for row in warmup], column(warmup, "warmup/loss"), linewidth=1.2)
        axes[0, 0].set(title="Warm-up", xlabel="supervised step", ylabel="loss, nats")
    for axis, panel in zip(axes[0, bool(warmup) :], panels, strict=True):
        lines_of(axis, rows, panel)
        ends(axis, rows, panel, summary)
        for name, level in levels.items() if panel is SOLVED_PANEL else ():
            axis.axhline(level, color="black", linewidth=1.2, linestyle="--", label=f"{name}: {level:.3f}")
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(fontsize="small", framealpha=0.5)
        axis.set(title=panel.title, xlabel="RL step" if rl else "step", ylabel=panel.unit)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        whole_steps(axis)
    path = directory / "training.png"
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
    return path
