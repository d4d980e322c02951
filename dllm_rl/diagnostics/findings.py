"""Print a report of `diagnose`, and write it as JSON and as a figure."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dllm_rl.diagnostics.doctor import ORDER_ADVICE, Report
from dllm_rl.files import replacing, write_text
from dllm_rl.screen import escape_controls, literal

COLUMNS = ("cause", "mean |d|", "max |d|", "k3", "ESS", "to do")


def rows(report: Report) -> list[tuple[str, ...]]:
    """Return the full mismatch, then each cause, as text, in nats."""
    table_rows: list[tuple[str, ...]] = []
    for cause in (report.total, report.half_heads, *report.causes):
        if cause is not None:
            # A cause below a hundredth of the mismatch is not worth the work of its advice.
            advice = cause.advice if cause.mean_abs >= report.worst / 100 else ""
            sizes = f"{cause.mean_abs:.2e}", f"{cause.max_abs:.2e}", f"{cause.k3:.1e}", f"{cause.ess:.4f}"
            table_rows.append((cause.name, *sizes, advice))
    return table_rows


def tables(report: Report) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Return (title, columns, lines) of each table that the report has numbers for."""
    title = f"log-prob mismatch over {report.num_tokens} tokens, nats; rollout: {report.scheme}"
    all_tables: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = [(title, COLUMNS, rows(report))]
    lines: list[tuple[str, ...]]
    if report.order is not None:
        positions, prompts = report.order
        title = "order of the first step, shares that are the learner's own"
        advice = ORDER_ADVICE if prompts < 1 else ""
        all_tables.append((title, ("positions", "prompts", "to do"), [(f"{positions:.3f}", f"{prompts:.3f}", advice)]))
    if report.routing and report.load:
        columns = ("mixture", "same experts", "busiest / mean, rollout", "learner")
        lines = []
        for layer, (share, *loads) in enumerate(zip(report.routing, *report.load, strict=True)):
            busiest = [f"{max(load) * len(load) / sum(load):.2f}" for load in loads]
            lines.append((f"layer {layer}", f"{share:.3f}", *busiest))
        all_tables.append(("experts, shares that both sides take", columns, lines))
    lines = []
    for token in report.tokens:
        context = f"{token.before}[{token.token}]{token.after}"
        lines.append((f"{token.row}, {token.position}", context, f"{token.learner:.4f}", f"{token.rollout:.4f}"))
    all_tables.append(("worst tokens", ("row, position", "in context", "learner", "rollout"), lines))
    lines = [(name, f"{error:.2e}") for name, error in report.layers]
    all_tables.append(("worst layers, relative error of their outputs", ("layer", "error"), lines))
    return all_tables


def write_doctor(report: Report, *, as_json: bool = False, directory: Path | None = None) -> None:
    """Print the report, as tables or as JSON; with a directory also write doctor.json and doctor.png."""
    text = json.dumps(asdict(report) | {"verdict": report.verdict}, indent=2)
    if as_json:
        print(text)
    else:
        console = Console()
        for title, columns, lines in tables(report):
            table = Table(*columns, title=literal(title, style="table.title"), title_justify="left")
            for line in lines:
                table.add_row(*map(literal, line))
            console.print(table)
        console.print(escape_controls(report.verdict), markup=False)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "doctor.json", text + "\n")
        with replacing(directory / "doctor.png") as partial:
            plot(report, partial)


def plot(report: Report, path: Path) -> None:
    """Draw bars of mean |d| by cause, and of the worst layers' errors."""
    import matplotlib

    matplotlib.use("Agg")  # needs no screen
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
    causes = [(cause.name, cause.mean_abs) for cause in report.causes]
    titles = {"mismatch by cause": "mean |d|, nats", "worst layers": "relative error of the output"}
    for axis, (title, unit), bars in zip(axes, titles.items(), (causes, report.layers), strict=True):
        names, values = zip(*reversed(bars), strict=True)  # barh draws from the bottom up, so the largest comes last
        axis.barh(names, values)
        axis.set(title=title, xlabel=unit)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
