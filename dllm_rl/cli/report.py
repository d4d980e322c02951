"""`dllm-rl report`: compares runs on one HTML page that needs no other file."""

import html
import io
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dllm_rl.checkpoints.run_folder import DEFAULTS
from dllm_rl.cli.replay_page import document, template, viewer
from dllm_rl.files import write_text
from dllm_rl.monitoring.health import health
from dllm_rl.monitoring.json_lines import current_rows, known, warmup_rows
from dllm_rl.monitoring.plots import (
    COLOURS,
    INK,
    PANELS,
    SOLVED,
    column,
    headline,
    lines_of,
    measured,
    plot,
    read_metrics,
    read_summary,
)
from dllm_rl.screen import escape_controls
from dllm_rl.training.completion_log import shortened

WORDS = ("healthy", "mild", "strong", "backfiring")
STEPS = 12  # of a run whose completions are shown, at most
OWN = ("name", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run")  # differ without effect


@dataclass(frozen=True)
class Told:
    """The contents of a run's folder."""

    label: str
    rows: list[dict[str, Any]]
    warmup: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def recipe(self) -> dict[str, Any]:
        return self.summary.get("recipe", {})


def report_command(directories: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Draw each run's picture again and write the page (default: report.html in the first run's folder).

    Returns the written files. Raises ValueError on a folder that is no run's."""
    for directory in directories:
        if not (directory / "metrics.jsonl").is_file():
            raise ValueError(f"{directory} is no run's folder: it has no metrics.jsonl")
    page = out or directories[0] / "report.html"
    try:
        pictures = [plot(directory) for directory in directories]
        text = report([told(directory) for directory in directories])
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"what a run left is damaged, or not a run's: {error!r}") from error
    write_text(page, text)
    return [*pictures, page]


def told(directory: Path) -> Told:
    stored, metrics = directory / "completions.jsonl", directory / "metrics.jsonl"
    completions = current_rows(stored) if stored.exists() else []
    return Told(
        directory.resolve().name, read_metrics(directory), warmup_rows(metrics), completions, read_summary(directory)
    )


def report(runs: Sequence[Told]) -> str:
    """The page. Every text of a run is escaped, or is JSON data."""
    many = len(runs) > 1
    groups = [group for run in runs for group in written(run, many=many)]
    title = f"{len(runs)} runs" if many else headline(runs[0].summary)
    settings = "What differs between the recipes" if many else "The recipe, where it is not the default"
    parts = [
        f"<h1>{shown(title)}</h1>",
        section("Runs", results(runs)),
        section("Curves", f'<div class="panels">{"".join(figures(runs))}</div>'),
        section(settings, differences(runs)),
        section("Completions", viewer() if groups else "<p>None are stored: log_completions_steps was 0.</p>"),
    ]
    return document(title, "\n".join(parts), groups=groups, style=template("report.css"))


def section(title: str, body: str) -> str:
    return f"<section><h2>{shown(title)}</h2>\n{body}</section>"


def shown(text: object) -> str:
    return html.escape(escape_controls(str(text)))


def table(head: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    cells = lambda line, tag: "".join(f"<{tag}>{shown(cell)}</{tag}>" for cell in line)  # noqa: E731
    body = "".join(f"<tr>{cells(line, 'td')}</tr>" for line in lines)
    return f'<div class="scroll" tabindex="0"><table><tr>{cells(head, "th")}</tr>{body}</table></div>'


def results(runs: Sequence[Told]) -> str:
    """One line per run: result, steps, seconds, the health of the mismatch over the steps."""
    lines = []
    keys = []
    for i, run in enumerate(runs):
        after = run.summary.get("eval_after", {})
        words = Counter(found[0] for row in run.rows if (found := health(known(row))))
        told_health = ", ".join(f"{word} {words[word]}" for word in WORDS if words[word]) or "-"
        before, name = run.summary.get("eval_before", {}), next((n for n in (*SOLVED, "loss") if n in after), "reward")
        result = f"{before[name]:.3f} → {after[name]:.3f} {name.replace('_', ' ')}" if after and before else "not ended"
        steps = f"{run.rows[-1]['step'] + 1 if run.rows else 0} of {run.recipe.get('num_steps', '?')}"
        seconds = f"{run.summary['seconds']:.0f}" if "seconds" in run.summary else "-"
        lines.append((run.label, run.recipe.get("seed", "?"), result, steps, seconds, told_health))
        colour = COLOURS[i % len(COLOURS)]
        keys.append(f'<li><span class="key" style="background:{colour}"></span>{shown(run.label)}</li>')
    made = table(("run", "seed", "held out, before → after RL", "RL steps", "seconds", "mismatch, steps"), lines)
    last = health(known(runs[0].rows[-1])) if len(runs) == 1 and runs[0].rows else None
    why = f"<p>At the last step: {shown(f'{last[0]}: {last[1]}')}.</p>" if last else ""
    return made + why + (f'<ul class="keys">{"".join(keys)}</ul>' if len(runs) > 1 else "")


def differences(runs: Sequence[Told]) -> str:
    """The settings that differ between runs; for one run, from the defaults."""
    names = [name for name in dict.fromkeys(name for run in runs for name in run.recipe) if name not in OWN]
    if len(runs) == 1:
        recipe = runs[0].recipe
        chosen = [(n, recipe[n]) for n in names if n not in DEFAULTS or DEFAULTS[n] != recipe[n]]
        return table(("setting", "value"), chosen) if chosen else "<p>Nothing is known of it.</p>"
    lines = [(name, *(run.recipe.get(name, "-") for run in runs)) for name in names]
    lines = [line for line in lines if len(set(map(str, line[1:]))) > 1]
    return table(("setting", *(run.label for run in runs)), lines) if lines else "<p>Nothing differs.</p>"


def written(run: Told, *, many: bool) -> list[dict[str, Any]]:
    """The stored completions as groups of the viewer, of at most STEPS evenly spread steps with first and last."""
    steps = sorted({row["step"] for row in run.completions})
    last = max(len(steps) - 1, 1)
    chosen = steps if len(steps) <= STEPS else [steps[round(i * last / (STEPS - 1))] for i in range(STEPS)]
    groups = []
    for step in chosen:
        rows = [row for row in run.completions if row["step"] == step]
        title = f"{run.label}, step {step + 1}" if many else f"step {step + 1}"
        facts = "Of each prompt the completion of highest and the one of lowest reward."
        groups.append({"title": escape_controls(title), "facts": facts, "rows": [replayed(row) for row in rows]})
    return groups


def replayed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of completions.jsonl for the viewer; without unmasking steps its completion is one token."""
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    numbers = {"reward": row["reward"], **row.get("parts", {}), "advantage": row["advantage"]}
    facts = [f"{name} {'-' if value is None else f'{value:.3g}'}" for name, value in numbers.items()]
    if row["mismatch"] is not None:
        facts.append(f"mismatch {row['mismatch']:+.3g} nats")
    tokens = row.get("tokens") or [{"id": -1, "text": row["completion"], "step": 0, "probability": 1.0}]
    made = [token | {"text": escape_controls(token["text"], keep="\n\t")} for token in tokens]
    return {"prompt": escape_controls(prompt, keep="\n\t"), "facts": escape_controls(" · ".join(facts)), "tokens": made}


def figures(runs: Sequence[Told]) -> list[str]:
    """Every panel for which a run has numbers, as <figure> with inline SVG."""
    rows = [run.rows for run in runs]
    drawn = [
        figure(panel.title, panel.unit, partial(lines_of, runs=rows, panel=panel))
        for panel in PANELS
        if measured(panel, rows)
    ]
    if any(health(known(row)) for run in runs for row in run.rows):
        drawn.insert(min(4, len(drawn)), figure("Mismatch health", "", partial(healths, runs=runs)))
    if any(run.warmup for run in runs):
        drawn.append(figure("Warm-up", "loss, nats", partial(warmups, runs=runs), xlabel="supervised step"))
    return [*drawn, figure("Where the time goes", "", partial(times, runs=runs), xlabel="seconds")]


def healths(axis: Any, runs: Sequence[Told]) -> None:
    for i, run in enumerate(runs):
        found = [(row["step"] + 1, WORDS.index(said[0])) for row in run.rows if (said := health(known(row)))]
        height = (i - (len(runs) - 1) / 2) * 0.5 / len(runs)
        heights = [y + height for _, y in found]
        axis.plot([x for x, _ in found], heights, "|", markersize=9, color=COLOURS[i % len(COLOURS)])
    axis.set_yticks(range(len(WORDS)), WORDS)
    axis.set_ylim(-0.6, len(WORDS) - 0.4)


def warmups(axis: Any, runs: Sequence[Told]) -> None:
    for i, run in enumerate(runs):
        steps = [row["warmup_step"] + 1 for row in run.warmup]
        axis.plot(steps, column(run.warmup, "warmup/loss"), linewidth=1.4, color=COLOURS[i % len(COLOURS)])


def times(axis: Any, runs: Sequence[Told]) -> None:
    """Seconds by stage, one bar per run."""
    spent: list[Counter[str]] = []
    for run in runs:
        stages = run.summary.get("stages")
        spent.append(Counter(stages) if stages else Counter())
        for row in () if stages else run.rows:
            spent[-1].update({n.removeprefix("time/"): s for n, s in known(row).items() if n.startswith("time/")})
    stages = [stage for stage, _ in sum(spent, Counter()).most_common()]
    for j, stage in enumerate(stages):
        left = [sum(each[other] for other in stages[:j]) for each in spent]
        colour, alpha = COLOURS[j % len(COLOURS)], 1.0 if j < len(COLOURS) else 0.5
        axis.barh(range(len(runs)), [each[stage] for each in spent], left=left, color=colour, alpha=alpha, label=stage)
    labels = [escape_controls(shortened(run.label, characters=20)) if len(runs) > 1 else "" for run in runs]
    axis.set_yticks(range(len(runs)), labels, parse_math=False)
    axis.invert_yaxis()
    if stages:
        axis.legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=4)


def figure(title: str, unit: str, draw: Callable[[Any], None], *, xlabel: str = "RL step") -> str:
    """An SVG in the page's colours; its text stays text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    inked = ("text.color", "xtick.color", "ytick.color", "axes.labelcolor", "axes.edgecolor")
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, **dict.fromkeys(inked, INK)}
    with plt.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of the font that lengths are measured with: the page has its own
        made, axis = plt.subplots(figsize=(4.6, 2.9), layout="constrained")
        draw(axis)
        axis.set(xlabel=xlabel, ylabel=unit)
        axis.grid(alpha=0.15, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        made.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(made)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{shown(title)}" ', 1)
    return f"<figure><figcaption>{shown(title)}</figcaption>{svg}</figure>"
