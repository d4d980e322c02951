"""Pictures of a run, from what it left in its folder."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm_rl.files import replacing
from dllm_rl.screen import escape_controls
from dllm_rl.training.health import MILD, STRONG
from dllm_rl.training.lines import current_rows, warmup_rows

SOLVED = ("solve_rate", "accuracy", "correct")  # the first that a run has is what it is told by


def read_metrics(directory: Path) -> list[dict[str, float | int]]:
    """The rows of a run's metrics.jsonl, a step each; what a resume ran again counts once."""
    return current_rows(directory / "metrics.jsonl")


def read_summary(directory: Path) -> dict[str, Any]:
    """A run's summary.json; of one that has not ended, what its newest checkpoint says of it; else nothing."""
    ended, states = directory / "summary.json", sorted(directory.glob("checkpoints/step-*/state.json"))
    for path in [ended, *reversed(states)]:
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def headline(summary: dict[str, Any]) -> str:
    """Name, seed and result of a run in a line."""
    recipe, before, after = summary.get("recipe", {}), summary.get("eval_before", {}), summary.get("eval_after")
    text = f"{recipe.get('name', 'a run')}, seed {recipe.get('seed', '?')}"
    name = next((name for name in (*SOLVED, "reward") if name in before), "loss")
    if name in before:
        result = "not ended" if after is None else f"{after[name]:.3f}"
        problems = f" on {summary['eval_problems']} held-out problems" if "eval_problems" in summary else ""
        text += f": {name.replace('_', ' ')} {before[name]:.3f} → {result}{problems}"
    return escape_controls(text)


def smoothed(values: Sequence[float], *, width: int) -> list[float]:
    """The mean of the values up to `width` places away on either side, fewer at the ends; gaps (NaN) are left out."""
    means = []
    for i in range(len(values)):
        near = [x for x in values[max(0, i - width) : i + width + 1] if not math.isnan(x)]
        means.append(math.fsum(near) / len(near) if near else math.nan)
    return means


def column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """A metric at every row; NaN, a gap, for what is absent, or null because it was not finite."""
    values = (row.get(name) for row in rows)
    return [float(value) if isinstance(value, int | float) else math.nan for value in values]


def curve(axis: Any, rows: Sequence[dict[str, Any]], name: str, **style: Any) -> None:
    """A metric against steps, smoothed over a twentieth of them, and pale as it was."""
    steps, values = [row["step"] + 1 for row in rows], column(rows, name)
    (line,) = axis.plot(steps, smoothed(values, width=len(steps) // 40), linewidth=1.6, **style)
    axis.plot(steps, values, linewidth=0.7, alpha=0.3, color=line.get_color())


def held_out(axis: Any, rows: Sequence[dict[str, Any]], name: str, **style: Any) -> None:
    """The points of a metric that only some steps have."""
    points = [(row["step"] + 1, row[name]) for row in rows if row.get(name) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), "o", markersize=4, markeredgewidth=0, **style)


def plot(directory: Path) -> Path:
    """`directory`/training.png: warm-up, reward, solve rate, mismatch and ESS; a gap where a step lacks a number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, summary = read_metrics(directory), read_summary(directory)
    warmup = warmup_rows(directory / "metrics.jsonl")
    names = [name for name in SOLVED if any(f"rewards/{name}/mean" in row for row in rows)]
    solved = f"rewards/{names[0]}/mean" if names else "parsed"
    held = f"eval/{names[0]}" if names else "eval/parsed"
    panels: list[tuple[str, str, str, str]] = [
        ("reward", "reward", "eval/reward", "reward"),
        ("problems solved" if names else "answers found", solved, held, "share"),
        ("mismatch", "rollout_corr/k3_kl", "", "k3 KL, nats"),
        ("effective sample size", "rollout_corr/ess", "", "share"),
    ]
    rl = not rows or "reward" in rows[0]
    if not rl:
        panels = [("loss", "loss", "eval/loss", "nats a token"), ("gradient norm", "grad_norm", "", "")]
    count = len(panels) + bool(warmup)
    figure, axes = plt.subplots(1, count, figsize=(3.75 * count, 3.4), layout="constrained")
    figure.suptitle(headline(summary), parse_math=False)
    if warmup:
        axes[0].plot([row["warmup_step"] + 1 for row in warmup], column(warmup, "warmup/loss"), linewidth=1.2)
        axes[0].set(title="warm-up", xlabel="supervised step", ylabel="loss, nats")
    for axis, (title, name, points, unit) in zip(axes[bool(warmup) :], panels, strict=True):
        curve(axis, rows, name, label="training")
        held_out(axis, rows, points, color="tab:orange", label="held out, every eval_steps")
        if points and rows and points.partition("/")[2] in summary.get("eval_after", {}):
            ends = [summary[part][points.partition("/")[2]] for part in ("eval_before", "eval_after")]
            label = f"held out: {ends[0]:.3f} → {ends[1]:.3f}"
            axis.plot([0, rows[-1]["step"] + 1], ends, "s", color="tab:red", markersize=6, label=label, clip_on=False)
            axis.legend(fontsize="small", framealpha=0.5)
        axis.set(title=title, xlabel="RL step" if rl else "step", ylabel=unit)
    for bound in (MILD, STRONG) if rl else ():
        axes[-1].axhline(bound, color="gray", linewidth=0.8, linestyle=":")
    for axis in axes:
        axis.grid(alpha=0.3)
    path = directory / "training.png"
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
    return path
