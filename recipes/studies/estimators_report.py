"""Table and figure of the estimator study, from its results alone."""

import json
from pathlib import Path
from statistics import fmean, stdev

MEASURED_LEGEND = """Over {completions} completions and {draws} draws of masks each ({gradient_draws} for gradients).
Mean log p {log_p:.2f} nats, mean any-order ELBO {elbo:.2f}; the true log-ratio's standard
deviation over completions is {log_ratio_std:.2f}. Forwards: rows sent through the model per
completion. Bias against the any-order ELBO, and against the exact log-likelihood of the sampler;
standard deviation over masks, nats per completion. Correlation of the estimated log-ratio with
the exact one over completions, under one draw of masks, and its root-mean-square error in nats.
Cosine: between the GRPO gradient that one draw of masks gives and the exact one. Seconds: CPU,
one scoring of all completions."""
TRAINED_LEGEND = """{seconds:g} CPU seconds of RL each, from the same warmed-up model per seed; solve rate on 400
held-out puzzles, greedy, before and after; ± is the standard deviation over seeds. Hyper-
parameters are `sudoku_tiny`'s, which were chosen with `trajectory`."""


def write(results: Path, folder: Path, *, seconds: float, order: list[str]) -> None:
    """`folder`/estimators.md and estimators.png."""
    measured = json.loads((results / "measured.json").read_text())
    runs = [json.loads(path.read_text()) for path in sorted(results.glob(f"trained-{seconds:g}s-*.json"))]
    runs.sort(key=lambda run: (order.index(run["arm"]), run["seed"]))
    text = ["# The estimator study: numbers", ""]
    text += ["Written by `python -m recipes.studies.estimators`; what they say is in WHICH_ESTIMATOR.md.", ""]
    text += ["## Bias, noise and cost", "", MEASURED_LEGEND.format(**measured), "", *_measured(measured["rows"]), ""]
    if runs:
        text += ["## GRPO at equal cost", "", TRAINED_LEGEND.format(seconds=seconds), "", *_trained(runs)]
    (folder / "estimators.md").write_text("\n".join(text).rstrip() + "\n")
    _figure(measured["rows"], runs, folder / "estimators.png")


def _measured(rows: list[dict]) -> list[str]:
    heads = ["estimator", "forwards", "bias, ELBO", "bias, log p", "std", "correlation"]
    heads += ["ratio error", "cosine", "seconds"]
    keys = ["forwards", "bias_elbo", "bias_exact", "std", "correlation", "ratio_error", "cosine", "seconds"]
    digits = [2, 2, 2, 2, 2, 2, 2, 3]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        numbers = [f"{row[key] + 0.0:.{n}f}" for key, n in zip(keys, digits, strict=True)]
        lines.append("| " + " | ".join([f"`{row['estimator']}`", *numbers]) + " |")
    return lines


def _trained(runs: list[dict]) -> list[str]:
    lines = ["| estimator | seeds | steps | before | after | each seed, before -> after |", "|---|---|---|---|---|---|"]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        after = [run["after"] for run in mine]
        spread = f" ± {stdev(after):.3f}" if len(after) > 1 else ""
        cells = [
            f"`{arm}`",
            str(len(mine)),
            f"{fmean(run['num_steps'] for run in mine):.0f}",
            f"{fmean(run['before'] for run in mine):.3f}",
            f"{fmean(after):.3f}{spread}",
            ", ".join(f"{run['before']:.2f} -> {run['after']:.2f}" for run in mine),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _figure(rows: list[dict], runs: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = 3 if runs else 2
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4.8), layout="constrained")
    markers, colours = "osD^vP*X", plt.get_cmap("tab20").colors
    for i, row in enumerate(rows):
        for axis, key, label in ((axes[0], "std", row["estimator"]), (axes[1], "cosine", None)):
            look = {"marker": markers[i % len(markers)], "color": colours[i % 20], "linestyle": "", "markersize": 8}
            axis.plot(row["forwards"], row[key], alpha=0.8, label=label, **look)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    axes[0].set(title="noise from the masks", ylabel="std, nats per completion", xlabel="forwards a completion")
    axes[1].set(title="one draw's GRPO gradient", ylabel="cosine with the exact one", xlabel="forwards a completion")
    for axis in axes[:2]:
        axis.set_xscale("log")
    for i, arm in enumerate(dict.fromkeys(run["arm"] for run in runs)):
        for run in [run for run in runs if run["arm"] == arm]:
            seconds = [run["budget"] * (step + 1) / run["num_steps"] for step in range(len(run["curve"]))]
            first = run["seed"] == 0
            axes[2].plot(seconds, _smooth(run["curve"]), f"C{i % 10}", linewidth=1, label=arm if first else None)
    if runs:
        axes[2].set(title="rollouts that solve, all seeds", xlabel="CPU seconds of RL", ylabel="share, 9-step mean")
        axes[2].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smooth(values: list[float], width: int = 9) -> list[float]:
    return [fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]
