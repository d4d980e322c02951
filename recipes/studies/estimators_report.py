"""Tables and figure of the estimator study, from its results alone."""

import json
from pathlib import Path
from statistics import fmean, stdev

from recipes.studies.paired import markdown, write_rows

HEADING = "## Bias, noise and cost"
MEASURED_LEGEND = """{completions} completions, {draws} draws of masks ({gradient_draws} for gradients). Mean log p is
{log_p:.2f} nats, the any-order ELBO {elbo:.2f}, the true log-ratio's standard deviation {log_ratio_std:.2f}.
[estimators.json](estimators.json) has more rows, columns and each seed.

Forwards are model rows per completion. Bias is against the exact log-likelihood, std over masks, in nats.
Cosine: one draw's GRPO gradient with the exact one."""
TRAINED_LEGEND = """{seconds:g} CPU seconds of RL per run; each seed has one warmed-up model for all arms ({before}).
Greedy solve rate on 400 held-out puzzles, ± the standard deviation over {seeds} seeds. The settings are
`sudoku_tiny`'s, tuned with `trajectory`."""
LEFT_OUT = {  # of the page; estimators.json has them
    "one_step(prompt_mask=0)", "elbo(4), plain", "elbo(4), stratified", "elbo(1)", "coupled(1)", "quadrature(2)",
    "block(8, 2)",
}  # fmt: skip
MEASURED = {
    "forwards": ("forwards", 2), "bias, ELBO": ("bias_elbo", 2), "bias, log p": ("bias_exact", 2), "std": ("std", 2),
    "correlation": ("correlation", 2), "ratio error": ("ratio_error", 2), "cosine": ("cosine", 2),
    "seconds": ("seconds", 3),
}  # fmt: skip


def write(results: Path, folder: Path, *, seconds: float, order: list[str]) -> None:
    """`folder`/estimators.json, estimators.png, and the tables of estimators.md: what stands above HEADING there is
    kept."""
    measured = json.loads((results / "measured.json").read_text())
    runs = [json.loads(path.read_text()) for path in sorted(results.glob(f"trained-{seconds:g}s-*.json"))]
    runs.sort(key=lambda run: (order.index(run["arm"]), run["seed"]))
    rows, trained = _measured(measured["rows"]), _trained(runs)
    write_rows(folder / "estimators.json", measured=rows, trained=trained)
    page = folder / "estimators.md"
    reading = page.read_text().split(HEADING)[0] if page.exists() else "# Which likelihood estimator?\n\n"
    kept = [row for row in rows if row["estimator"].strip("`") not in LEFT_OUT]
    shown = ["estimator", "forwards", "bias, log p", "std", "cosine"]
    text = [reading + HEADING, "", MEASURED_LEGEND.format(**measured), "", markdown(kept, shown)]
    if runs:
        first = [run for run in runs if run["arm"] == runs[0]["arm"]]
        before = "before RL: " + ", ".join(f"{run['before']:.2f}" for run in first)
        legend = TRAINED_LEGEND.format(seconds=seconds, seeds=len(first), before=before)
        text += [
            "## GRPO at equal cost",
            "",
            legend,
            "",
            markdown(trained, ["estimator", "steps", "after"]),
        ]
    page.write_text("\n".join(text).rstrip() + "\n")
    _figure(measured["rows"], runs, folder / "estimators.png")


def _measured(rows: list[dict]) -> list[dict[str, str]]:
    return [
        {"estimator": f"`{row['estimator']}`"}
        | {head: f"{row[key] + 0.0:.{n}f}" for head, (key, n) in MEASURED.items()}
        for row in rows
    ]


def _trained(runs: list[dict]) -> list[dict[str, str]]:
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        after = [run["after"] for run in mine]
        spread = f"±{stdev(after):.3f}" if len(after) > 1 else ""
        row = {"estimator": f"`{arm}`", "seeds": str(len(mine))}
        row["steps"] = f"{fmean(run['num_steps'] for run in mine):.0f}"
        row["before"] = f"{fmean(run['before'] for run in mine):.3f}"
        row["after"] = f"{fmean(after):.3f}{spread}"
        rows.append(row | {"each seed": ", ".join(f"{run['after']:.2f}" for run in mine)})
    return rows


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
