"""Table and figure of the mismatch study, from its results alone."""

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t, n - 1 degrees of freedom
TRAINED_QUANTISED = ("aligned", "qarl")  # arms whose learner computes through the quantised operands
HEADER = (
    "| arm | seeds | learner's solve rate | through the quantised net | each seed, learner / quantised "
    "| area | worst abs log ratio | lowest ESS | lambda, first / last 10 steps | collapsed |"
)
LEGEND = """Solve rates are on 400 held-out puzzles, greedy; mean ± half the 95 % interval (Student's t over seeds).
Area: mean over steps of the share of rollouts that solve, so it is the quantised policy's own. Log ratios and ESS are
per token, learner against rollout. A run has collapsed when the net that it trains (the quantised one for aligned and
qarl, else the learner's) ends below the solve rate it started from, or its gradient was not finite (its rates then
count as 0). With `unquantised` the rollout is the learner and the mismatch is exactly zero, bit for bit."""


def load(results: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]


def interval(values: list[float]) -> str:
    """mean ± half-width of the 95 % interval; the mean alone for a single value."""
    if len(values) < 2:
        return f"{fmean(values):.3f}"
    return f"{fmean(values):.3f} ± {T95[len(values)] * stdev(values) / math.sqrt(len(values)):.3f}"


def trained(run: dict) -> float:
    return run["quantised"] if run["arm"] in TRAINED_QUANTISED else run["learner"]


def row(arm: str, runs: list[dict]) -> str:
    known = lambda name: [[x for x in run["curves"][name] if x is not None] for run in runs]  # noqa: E731
    lam = [curve for curve in known("lambda") if curve]
    collapsed = sum(run["diverged"] or trained(run) < run["before"] for run in runs)
    cells = [
        arm,
        str(len(runs)),
        interval([run["learner"] for run in runs]),
        interval([run["quantised"] for run in runs]),
        ", ".join(f"{run['learner']:.2f} / {run['quantised']:.2f}" for run in runs),
        f"{fmean(fmean(curve) for curve in known('solve rate')):.3f}",
        f"{max(max(curve) for curve in known('max |log ratio|')):.2f}",
        f"{min(min(curve) for curve in known('ess')):.2f}",
        f"{fmean(fmean(x[:10]) for x in lam):.2f} / {fmean(fmean(x[-10:]) for x in lam):.2f}" if lam else "",
        f"{collapsed} of {len(runs)}",
    ]
    return "| " + " | ".join(cells) + " |"


def grouped(results: list[dict], order: list[str]) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """(family, level) -> arm -> its runs by seed; the unquantised runs stand beside every level of their family."""
    tables: dict = defaultdict(lambda: defaultdict(list))
    for run in sorted(results, key=lambda run: (order.index(run["arm"]), run["seed"])):
        levels = {run["level"]}
        if run["level"] == "-":
            levels = {other["level"] for other in results if other["family"] == run["family"]} - {"-"} or levels
        for level in levels:
            tables[run["family"], level][run["arm"]].append(run)
    places = ["diffusion", "autoregressive"], ["-", "int4", "int3", "five_level", "ramp"]
    return {key: tables[key] for key in sorted(tables, key=lambda k: (places[0].index(k[0]), places[1].index(k[1])))}


def write(results: Path, folder: Path, *, order: list[str]) -> None:
    """`folder`/mismatch.md and mismatch.png."""
    runs = load(results)
    if not runs:
        raise SystemExit(f"{results} holds no result yet")
    tables = grouped(runs, order)
    machine, steps = runs[-1]["machine"], sorted({run["num_steps"] for run in runs})
    lines = [
        "# The mismatch study: numbers",
        "",
        "Confounded by the clip: read [mismatch_reading.md](mismatch_reading.md) first.",
        "",
        "Written by `python -m recipes.studies.mismatch`; what they say is in mismatch_reading.md.",
        f"{len(runs)} runs of {', '.join(map(str, steps))} RL steps, seeds {sorted({run['seed'] for run in runs})}, "
        f"torch {machine['versions']['torch']}, one CPU thread a run. Every finished run is in the table.",
        "",
        LEGEND,
    ]
    for (family, level), arms in tables.items():
        before = fmean(run["before"] for group in arms.values() for run in group if run["before"] is not None)
        lines += ["", f"## {family}, {level} (before RL: {before:.3f})", "", HEADER]
        lines += ["|---" * (HEADER.count("|") - 1) + "|"]
        lines += [row(arm, group) for arm, group in arms.items()]
    (folder / "mismatch.md").write_text("\n".join(lines) + "\n")
    draw(tables, folder / "mismatch.png", order)


def smooth(curve: list[float | None], width: int = 5) -> list[float]:
    """Running mean over the last `width` steps; nan where nothing was logged."""
    found = [math.nan if x is None else x for x in curve]
    return [fmean(found[max(0, i - width + 1) : i + 1]) for i in range(len(found))]


def draw(tables: dict, path: Path, order: list[str]) -> None:
    """A row per table: solve rate, ESS, lambda and gradient norm against steps; every seed thin, their mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image  # matplotlib brings it

    panels = [("solve rate", "linear"), ("ess", "linear"), ("lambda", "linear"), ("gradient norm", "log")]
    figure, axes = plt.subplots(len(tables), 4, figsize=(17, 3.6 * len(tables)), layout="constrained", squeeze=False)
    colours = {arm: plt.get_cmap("tab20")(i) for i, arm in enumerate(order)}
    for line, ((family, level), arms) in zip(axes, tables.items(), strict=True):
        for axis, (name, scale) in zip(line, panels, strict=True):
            for arm, runs in arms.items():
                curves = [smooth(run["curves"][name]) for run in runs]
                for curve in curves:
                    axis.plot(curve, color=colours[arm], linewidth=0.5, alpha=0.5)
                length = min(map(len, curves))
                mean = [fmean(values) for values in zip(*(curve[:length] for curve in curves), strict=True)]
                axis.plot(mean, color=colours[arm], linewidth=1.8, label=arm)
            axis.set(title=f"{family}, {level}: {name}", xlabel="RL step", yscale=scale)
            axis.grid(alpha=0.3)
        line[0].legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    with Image.open(path) as picture:  # hundreds of thin lines: a palette takes a quarter of the bytes
        small = picture.convert("RGB").quantize(128)
    small.save(path, optimize=True)
