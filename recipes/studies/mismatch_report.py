"""The figure of the mismatch study, from its results alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.studies.paired import Results, Study, interval

SETTINGS = {
    "one": "one update a rollout",
    "two": "two updates, a dual clip at 1.2 but where it says no clip",
    "random": "one update, rollouts in random order",
}


def rates(results: Results, arm: str, column: str) -> list[float]:
    return [results[key][column] for key in sorted(results) if key[0] == arm]


def draw(study: Study, results: Results, path: Path) -> None:
    """A panel a setting, a line an arm that has all seeds: a dot a seed, the mean and its 95 % interval, and where RL
    began."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, list[str]] = {}
    for arm in study.arms:
        if ": " in arm and arm not in study.fewer and rates(results, arm, "after"):
            panels.setdefault(arm.split(": ")[0], []).append(arm)
    heights = [len(arms) for arms in panels.values()]
    figure, axes = plt.subplots(
        len(panels), figsize=(8, 1.2 + 0.32 * sum(heights)), layout="constrained", squeeze=False, sharex=True,
        height_ratios=heights,
    )  # fmt: skip
    for axis, (setting, arms) in zip(axes[:, 0], panels.items(), strict=True):
        for place, arm in enumerate(arms):
            line(axis, -place, rates(results, arm, "after"), "#1f77b4")
        if begun := rates(results, "start", "before"):
            axis.axvline(sum(begun) / len(begun), color="grey", linewidth=0.8, linestyle=":")
        axis.set_yticks([-place for place in range(len(arms))], [arm.split(": ", 1)[1] for arm in arms])
        axis.set_ylim(0.6 - len(arms), 0.6)
        axis.set_title(SETTINGS[setting], loc="left", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel("held-out solve rate after 60 steps (dotted: where RL began)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def line(axis: Any, place: float, values: Sequence[float], color: str) -> None:
    """Dots, and the mean with its interval above them."""
    axis.plot(values, [place] * len(values), "o", color=color, alpha=0.35, markersize=4)
    center, _, half = interval(values).partition("±")
    axis.errorbar(float(center), place, xerr=float(half or 0), fmt="|", color="black", markersize=11, capsize=3)
