"""A doctor's report on the screen, as JSON, as a figure and as a page."""

import base64
import html
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dllm_rl.diagnostics.doctor import ORDER_ADVICE, Report
from dllm_rl.files import replacing, write_text
from dllm_rl.screen import escape_controls, literal

COLUMNS = ("cause", "mean |d|", "max |d|", "k3", "ESS", "to do")


def rows(report: Report) -> list[tuple[str, ...]]:
    """The whole, then each cause, as text; nats. Advice if a cause is at least a hundredth of the mismatch."""
    found: list[tuple[str, ...]] = []
    for c in (report.total, *([report.half_heads] if report.half_heads else []), *report.causes):
        advice = c.advice if c.mean_abs >= report.worst / 100 else ""
        found.append((c.name, f"{c.mean_abs:.2e}", f"{c.max_abs:.2e}", f"{c.k3:.1e}", f"{c.ess:.4f}", advice))
    return found


def routing_rows(report: Report) -> list[tuple[Any, ...]]:
    """Per mixture: the share of experts that both sides take, and each side's busiest expert against the mean."""
    if report.routing is None or report.load is None:
        return []
    busiest = ([f"{max(row) * len(row) / sum(row):.2f}" for row in side] for side in report.load)
    return list(zip(report.routing, *busiest, strict=True))


def tables(report: Report) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    positions, prompts = report.order or (1.0, 1.0)
    order = (f"{positions:.3f}", f"{prompts:.3f}", ORDER_ADVICE * (prompts < 1))
    title = "order of the first step, shares that are the learner's own"
    in_order: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]] = [
        (title, ("positions", "prompts", "to do"), [order])
    ] * (report.order is not None)
    routes = [(f"layer {i}", f"{share:.3f}", *loads) for i, (share, *loads) in enumerate(routing_rows(report))]
    columns = ("mixture", "same experts", "busiest / mean, rollout", "learner")
    tokens = [
        (f"{t.row}, {t.position}", f"{t.before}[{t.token}]{t.after}", f"{t.learner:.4f}", f"{t.rollout:.4f}")
        for t in report.tokens
    ]
    layers = [(name, f"{error:.2e}") for name, error in report.layers]
    routed = [("experts, shares that both sides take", columns, routes)] * bool(routes)
    return [
        (f"log-prob mismatch over {report.num_tokens} tokens, nats; rollout: {report.scheme}", COLUMNS, rows(report)),
        *in_order,
        *routed,
        ("worst tokens", ("row, position", "in context", "learner", "rollout"), tokens),
        ("worst layers, relative error of their outputs", ("layer", "error"), layers),
    ]


def write_doctor(report: Report, *, as_json: bool = False, directory: Path | None = None) -> None:
    """Print the report, as tables or as JSON; with a directory also write doctor.json, doctor.png and doctor.html."""
    text = json.dumps(report.as_json(), indent=2)
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
        write_text(directory / "doctor.html", page(report, (directory / "doctor.png").read_bytes()))


def plot(report: Report, path: Path) -> None:
    """Bars of mean |d| by cause, and of the worst layers' errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
    panels = [
        ("mismatch by cause", "mean |d|, nats", [(c.name, c.mean_abs) for c in report.causes]),
        ("worst layers", "relative error of the output", report.layers),
    ]
    for axis, (title, unit, bars) in zip(axes, panels, strict=True):
        names, values = zip(*reversed(bars), strict=True)
        axis.barh(names, values)
        axis.set(title=title, xlabel=unit)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def page(report: Report, picture: bytes) -> str:
    """One self-contained page."""
    head = "<!doctype html><meta charset=utf-8><title>mismatch</title>"
    parts = [head, STYLE, f"<p>{_shown(report.verdict)}</p>"]
    for title, columns, lines in tables(report):
        cells = lambda line, tag: "".join(f"<{tag}>{_shown(cell)}</{tag}>" for cell in line)  # noqa: E731
        body = "".join(f"<tr>{cells(line, 'td')}</tr>" for line in lines)
        parts.append(f"<h2>{_shown(title)}</h2><table><tr>{cells(columns, 'th')}</tr>{body}</table>")
    parts.append(f'<img alt="mismatch by cause" src="data:image/png;base64,{base64.b64encode(picture).decode()}">')
    return "\n".join(parts) + "\n"


def _shown(text: str) -> str:
    return html.escape(escape_controls(text))


STYLE = (
    "<style>body{font:15px sans-serif;max-width:70em;margin:2em auto}td,th{padding:.2em .8em;text-align:left}"
    "td:nth-child(n+2){font-variant-numeric:tabular-nums}img{max-width:100%}</style>"
)
