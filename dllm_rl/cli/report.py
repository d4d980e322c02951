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

from dllm_rl.checkpoints.run_folder import defaults
from dllm_rl.cli.sample import document, template
from dllm_rl.evaluation.results import best_of
from dllm_rl.files import write_text
from dllm_rl.monitoring import plots
from dllm_rl.monitoring.health import health
from dllm_rl.monitoring.json_lines import current_rows, known, warmup_rows
from dllm_rl.monitoring.plots import COLOURS, INK, PANELS, SOLVED
from dllm_rl.recipe import Recipe
from dllm_rl.screen import escape_controls
from dllm_rl.supervised.recipe import SFT
from dllm_rl.training.completion_log import shortened

WORDS = ("healthy", "mild", "strong", "backfiring")
STEPS = 12  # of a run whose completions are shown, at most
OWN = ("name", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run")  # differ without effect


@dataclass(frozen=True)
class Told:
    label: str
    rows: list[dict[str, Any]]
    warmup: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def recipe(self) -> dict[str, Any]:
        return self.summary.get("recipe", {})


def report_command(directories: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Draw each run's picture again and write the page, by default report.html in the first run; returns the files."""
    for directory in directories:
        if not (directory / "metrics.jsonl").is_file():
            raise ValueError(f"{directory} is no run's folder: it has no metrics.jsonl")
    page = out or directories[0] / "report.html"
    try:
        pictures = [plots.plot(directory) for directory in directories]  # before the page: an error leaves the old one
        text = report([told(directory) for directory in directories])
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"what a run left is damaged, or not a run's: {error!r}") from error
    write_text(page, text)
    return [*pictures, page]


def told(directory: Path) -> Told:
    stored = directory / "completions.jsonl"
    completions = current_rows(stored) if stored.exists() else []
    warmup = warmup_rows(directory / "metrics.jsonl")
    summary = plots.read_summary(directory)
    return Told(directory.resolve().name, plots.read_metrics(directory), warmup, completions, summary)


def report(runs: Sequence[Told]) -> str:
    """The page. Every text of a run is escaped, or is JSON data."""
    many = len(runs) > 1
    groups: list[dict[str, Any]] = []
    for run in runs:
        groups += written(run, many=many)
    title = f"{len(runs)} runs" if many else plots.headline(runs[0].summary)
    stored = template("viewer.html") if groups else "<p>None are stored: log_completions_steps was 0.</p>"
    settings = "What differs between the recipes" if many else "The recipe, where it is not the default"
    parts = [
        f"<h1>{shown(title)}</h1>",
        section("Runs", results(runs)),
        section("Curves", f'<div class="panels">{"".join(figures(runs))}</div>'),
        section(settings, differences(runs)),
        section("Completions", stored),
    ]
    return document(title, "\n".join(parts), groups=groups, style=template("report.css"))


def section(title: str, body: str) -> str:
    return f"<section><h2>{shown(title)}</h2>\n{body}</section>"


def shown(text: object) -> str:
    return html.escape(escape_controls(str(text)))


def table(head: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    """A table; on a narrow screen each cell is a line below the last, with its column's name."""
    rows = ["".join(f"<th>{shown(name)}</th>" for name in head)]
    for line in lines:
        cells = zip(map(shown, head), map(shown, line), strict=True)
        rows.append("".join(f'<td data-name="{name}">{cell}</td>' for name, cell in cells))
    return f'<div class="scroll" tabindex="0"><table><tr>{"</tr><tr>".join(rows)}</tr></table></div>'


def results(runs: Sequence[Told]) -> str:
    """One line per run: result, steps, seconds, the health of the mismatch over the steps."""
    lines = []
    for run in runs:
        steps = f"{run.rows[-1]['step'] + 1 if run.rows else 0} of {run.recipe.get('num_steps', '?')}"
        seconds = f"{run.summary['seconds']:.0f}" if "seconds" in run.summary else "-"
        words = Counter(said_of(run))
        mismatch = ", ".join(f"{word} {words[word]}" for word in WORDS if words[word]) or "-"
        lines.append((run.label, run.recipe.get("seed", "?"), result_of(run), steps, seconds, mismatch))
    made = table(("run", "seed", "held out, before → after RL", "RL steps", "seconds", "mismatch, steps"), lines)
    made += "".join(f"<p>{shown(text)}</p>" for text in map(validated, runs) if text)
    last = health(known(runs[0].rows[-1])) if len(runs) == 1 and runs[0].rows else None
    return made + f"<p>At the last step: {shown(f'{last[0]}: {last[1]}')}.</p>" if last else made


def validated(run: Told) -> str:
    """The best and the last of the validations; nothing where there are fewer than two."""
    for name in SOLVED:
        found = [(row[f"eval/{name}"], f"step {row['step'] + 1}") for row in run.rows if f"eval/{name}" in row]
        if len(found) > 1:
            return f"{run.label}, validation: {best_of(found, name.replace('_', ' '))}."
    return ""


def keys(runs: Sequence[Told]) -> str:
    items = []
    for i, run in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        items.append(f'<li><span class="key" style="background:{colour}"></span>{shown(run.label)}</li>')
    return f'<ul class="keys">{"".join(items)}</ul>' if len(runs) > 1 else ""


def result_of(run: Told) -> str:
    """The held-out result before and after, by the metric that a reader asks for first."""
    before = run.summary.get("eval_before", {})
    after = run.summary.get("eval_after", {})
    if not before or not after:
        return "not ended"
    name = next((metric for metric in (*SOLVED, "loss") if metric in after), "reward")
    return f"{before[name]:.3f} → {after[name]:.3f} {name.replace('_', ' ')}"


def said_of(run: Told) -> list[str]:
    """The health of the mismatch in a word, of each step that has one."""
    found = [health(known(row)) for row in run.rows]
    return [said[0] for said in found if said]


def differences(runs: Sequence[Told]) -> str:
    """The settings that differ between runs; for one run, from the defaults."""
    names: dict[str, None] = {}  # in the order of the first run that has them
    for run in runs:
        names |= dict.fromkeys(run.recipe)
    usual = defaults(SFT if "dataset" in names else Recipe)
    lines = []
    for name in names:
        values = [run.recipe.get(name, "-") for run in runs]
        compared = values if len(runs) > 1 else [*values, usual.get(name)]
        if len(set(map(str, compared))) > 1 and name not in OWN:
            lines.append((name, *values))
    if len(runs) == 1:
        return table(("setting", "value"), lines) if lines else "<p>Nothing is known of it.</p>"
    return table(("setting", *(run.label for run in runs)), lines) if lines else "<p>Nothing differs.</p>"


def written(run: Told, *, many: bool) -> list[dict[str, Any]]:
    """The stored completions as groups of the viewer, of at most STEPS evenly spread steps with first and last."""
    rows_of: dict[int, list[dict[str, Any]]] = {}
    for row in run.completions:
        rows_of.setdefault(row["step"], []).append(row)
    steps = sorted(rows_of)
    last = len(steps) - 1
    if len(steps) > STEPS:
        steps = [steps[round(i * last / (STEPS - 1))] for i in range(STEPS)]
    groups = []
    for step in steps:
        title = f"{run.label}, step {step + 1}" if many else f"step {step + 1}"
        facts = "Of each prompt the completion of highest and the one of lowest reward."
        groups.append({"title": escape_controls(title), "facts": facts, "rows": list(map(replayed, rows_of[step]))})
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
    named = partial(figure, keys=keys(runs))
    drawn = []
    for panel in PANELS:
        if plots.measured(panel, rows):
            drawn.append(named(panel.title, panel.unit, partial(plots.lines_of, runs=rows, panel=panel)))
    if any(map(said_of, runs)):
        drawn.insert(4, named("Mismatch health", "", partial(healths, runs=runs)))  # after the numbers it judges
    if any(run.warmup for run in runs):
        drawn.append(named("Warm-up", "loss, nats", partial(warmups, runs=runs), xlabel="supervised step"))
    return [*drawn, figure("Where the time goes", "", partial(times, runs=runs), xlabel="seconds")]


def healths(axis: Any, runs: Sequence[Told]) -> None:
    for i, run in enumerate(runs):
        height = (i - (len(runs) - 1) / 2) * 0.5 / len(runs)  # each run has its own height: no run hides another
        steps = []
        heights = []
        for row in run.rows:
            if found := health(known(row)):
                steps.append(row["step"] + 1)
                heights.append(WORDS.index(found[0]) + height)
        axis.plot(steps, heights, "|", markersize=9, color=COLOURS[i % len(COLOURS)])
    axis.set_yticks(range(len(WORDS)), WORDS)
    axis.set_ylim(-0.6, len(WORDS) - 0.4)


def warmups(axis: Any, runs: Sequence[Told]) -> None:
    for i, run in enumerate(runs):
        steps = [row["warmup_step"] + 1 for row in run.warmup]
        style = {"linewidth": plots.thickness(i, len(runs)), "color": COLOURS[i % len(COLOURS)]}
        axis.plot(steps, plots.column(run.warmup, "warmup/loss"), **style)


def times(axis: Any, runs: Sequence[Told]) -> None:
    spent = [seconds_of(run) for run in runs]
    stages = [stage for stage, _ in sum(spent, Counter()).most_common()]
    left = [0.0] * len(runs)
    for j, stage in enumerate(stages):
        widths = [each[stage] for each in spent]
        alpha = 1.0 if j < len(COLOURS) else 0.5  # a colour that comes again is paler
        axis.barh(range(len(runs)), widths, left=left, color=COLOURS[j % len(COLOURS)], alpha=alpha, label=stage)
        left = list(map(sum, zip(left, widths, strict=True)))
    labels = [escape_controls(shortened(run.label, characters=20)) if len(runs) > 1 else "" for run in runs]
    axis.set_yticks(range(len(runs)), labels, parse_math=False)
    axis.invert_yaxis()  # the first run on top


def seconds_of(run: Told) -> Counter:
    """Seconds by stage: the summary's, or of a run that has none yet the sum over its steps."""
    if stages := run.summary.get("stages"):
        return Counter(stages)
    spent: Any = Counter()  # of seconds, which are no counts
    for row in run.rows:
        for name, seconds in known(row).items():
            if name.startswith("time/"):
                spent[name.removeprefix("time/")] += seconds
    return spent


def figure(title: str, unit: str, draw: Callable[[Any], None], *, xlabel: str = "RL step", keys: str = "") -> str:
    """An SVG in the page's colours, with a legend below if it has several; its text stays text. keys: markup below."""
    import matplotlib

    matplotlib.use("Agg")  # no display
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
        if xlabel != "seconds":
            plots.whole_steps(axis)
        handles, labels = axis.get_legend_handles_labels()
        if len(handles) > 1:
            columns = 2 if max(map(len, labels)) > 12 else 3  # the figure's width
            style = {"fontsize": 8, "frameon": False, "labelcolor": INK}
            made.legend(handles, labels, loc="outside lower center", ncols=columns, **style)
        file = io.StringIO()
        made.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(made)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")  # the page's own, which is light or dark
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{shown(title)}" ', 1)
    return f"<figure><figcaption>{shown(title)}</figcaption>{svg}{keys}</figure>"
