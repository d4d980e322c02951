"""Compare runs on their held-out problems, from the rows that each run stored in held_out.jsonl."""

import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from rich.table import Table

from dllm_rl.checkpoints.resume import MAY_CHANGE
from dllm_rl.evaluation.intervals import bootstrap_interval, t_interval
from dllm_rl.evaluation.results import headline
from dllm_rl.files import replacing
from dllm_rl.monitoring.json_lines import current_rows, finite_numbers
from dllm_rl.monitoring.plots import default_style, draw_curve, import_matplotlib, plain_ticks
from dllm_rl.records import check_is_folder, describe_json, nearest_hint
from dllm_rl.screen import NARROW, escape_controls, literal, without_middle

FIELDS = ("step", "task", "metrics", "problems", "grading", "recipe")  # of a line of held_out.jsonl
MISMATCH, ESS = "rollout_corr/abs_log_ratio_mean", "rollout_corr/ess"
PER_STEP = {MISMATCH: "mismatch, nats a token", ESS: "effective sample size", "step_time": "seconds a step"}
VISIBLE_MISMATCH = 1e-3  # nats a token; a picture of runs below it needs no panels of mismatch and ESS
# Settings in which the seeds of one arm may differ. The others of MAY_CHANGE change what is trained, or what is kept.
OF_ONE_RUN = MAY_CHANGE - {"num_steps", "lr_schedule_steps", "max_prompt_length", "callbacks", "num_mismatch_groups"}
OF_ONE_RUN |= {"seed", "name"}
MAX_SETTINGS = 8  # that differ between arms and are shown
STYLES = (  # of the arms in the picture
    {"color": "#2f9e6e", "linestyle": ":", "marker": "^"},
    {"color": "#d9772b", "linestyle": "--", "marker": "s"},
    {"color": "#3b7dd8", "linestyle": "-", "marker": "o"},
    {"color": "#d0485a", "linestyle": "-.", "marker": "D"},
    {"color": "#7b5ea7", "linestyle": "-", "marker": "v"},
)
Interval = tuple[float, float]
Fractions = dict[tuple[str, int], Interval]  # (digest of the problems, number of the problem) -> numerator, denominator


@dataclass(frozen=True)
class StoredRun:
    """The held-out evaluations of a run."""

    folder: Path
    rows: tuple[dict[str, Any], ...]  # lines of held_out.jsonl, in the order of the steps

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings as JSON."""
        return self.rows[-1]["recipe"]

    @property
    def seed(self) -> int:
        return self.recipe["seed"]

    def of_task(self, task: str) -> list[dict[str, Any]]:
        """Return the evaluations on the `eval_task` or on the `validation_task`."""
        return [row for row in self.rows if row["task"] == task]

    def last(self, task: str) -> dict[str, Any] | None:
        """Return the last evaluation on a task; None if the run has not evaluated a step on it."""
        rows = [row for row in self.of_task(task) if row["step"] or not self.recipe["num_steps"]]
        return rows[-1] if rows else None

    @cached_property
    def steps(self) -> list[dict[str, float]]:
        """Metrics of the training steps."""
        path = self.folder / "metrics.jsonl"
        return [finite_numbers(row) for row in current_rows(path)] if path.is_file() else []

    def mean_per_step(self, name: str) -> float | None:
        """Return the mean of a metric over the steps that have it; None if none has."""
        found = [row[name] for row in self.steps if name in row]
        return mean(found) if found else None


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds alone."""

    label: str
    runs: tuple[StoredRun, ...]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


@dataclass(frozen=True)
class Difference:
    """A metric of an arm minus that of the first arm.

    Attributes:
        arm: Mean of the arm's runs that are compared.
        first: Mean of the first arm's.
        over_problems: 95 % interval of the difference: what other held-out problems would change. Bootstrap over the
            problems, paired. None: no spread.
        over_seeds: 95 % interval of the difference: what other seeds would change. Student's t. None: fewer than two
            seeds, or no spread.
        seeds: Seeds of the runs that are compared pairwise; empty if the two arms have no seed in common.
        counts: Number of problems on which the arm is higher, on which it is lower, and on which both are equal.
        deviation: Standard deviation of the difference between seeds, nan for fewer than two.
    """

    arm: float
    first: float
    over_problems: Interval | None
    over_seeds: Interval | None
    seeds: tuple[int, ...]
    counts: tuple[int, int, int]
    deviation: float

    @property
    def value(self) -> float:
        return self.arm - self.first

    @property
    def interval(self) -> Interval | None:
        """The interval that a table shows: over the seeds if there are several, else over the problems."""
        return self.over_seeds or self.over_problems

    @property
    def clear_sign(self) -> int:
        """1 or -1 if all intervals are above or below 0; else 0."""
        bounds = [bound for each in (self.over_problems, self.over_seeds) if each for bound in each]
        return 0 if not bounds else 1 if min(bounds) > 0 else -1 if max(bounds) < 0 else 0


def compare(
    runs: Sequence[str | Path] | Mapping[str, Sequence[str | Path]], *, metric: str | None = None
) -> "Comparison":
    """Compare runs on their held-out problems.

    Call it after training, or during it, for runs of `grpo` or of recipes that have the same held-out problems and the
    same `eval_sampler`. Each run counts with its last held-out evaluation. Every arm is compared with the first one.

        comparison = compare(["runs/plain", "runs/tis"])
        comparison = compare({"plain": ["runs/plain-seed0", "runs/plain-seed1"], "TIS": ["runs/tis-seed0", ...]})
        print("\\n".join(comparison.sentences()))

    Args:
        runs: Folders of runs. Runs whose settings differ in the seed alone are one arm. Or the folders of each arm by
            its name.
        metric: The metric that decides which arm is better. None (default): accuracy or solve_rate if the runs have it,
            else the reward, or the first reward function if the runs' rewards are not the same sum.

    Returns:
        The comparison: `sentences()`, `table()`, `plot(path)`, `as_json()`.

    Raises:
        ValueError: A folder has no held-out evaluation after a training step, there is one arm alone, or the runs have
            different held-out problems, decode differently or share no metric.
    """
    if isinstance(runs, Mapping):
        arms = [Arm(label, tuple(map(read_run, folders))) for label, folders in runs.items()]
        for arm in arms:
            if len(set(arm.seeds)) < len(arm.seeds):
                raise ValueError(
                    f"{arm.label} has two runs with the same seed, {sorted(arm.seeds)}; give each seed once"
                )
    else:
        arms = arms_of([read_run(folder) for folder in runs])
    if len(arms) < 2:
        raise ValueError(
            f"{len(arms)} arm cannot be compared: the runs have the same settings except for the seed; give runs of "
            "other settings too, or name the arms, as in A=RUN,RUN B=RUN"
        )
    everything = [run for arm in arms for run in arm.runs]
    task = task_of_all(everything)
    for run in everything[1:]:
        check_decoding(everything[0], run)
    return Comparison(tuple(arms), task, metric)


def read_run(folder: str | Path) -> StoredRun:
    """Read the held-out evaluations of a run. Of several after one step the last one counts.

    Raises:
        ValueError: The folder has none, or a damaged one.
    """
    path = Path(folder).expanduser() / "held_out.jsonl"
    check_is_folder(path.parent, "the folder that a run writes, its output_dir")
    rows = current_rows(path) if path.is_file() else []
    if not rows:
        raise ValueError(f"{folder} has no rows in held_out.jsonl; give the folder of an RL run, its output_dir")
    for row in rows:
        if missing := [name for name in FIELDS if name not in row]:
            raise ValueError(f"{path} is damaged: the row of step {row['step']} has no {missing[0]!r}")
    ordered = {(row["step"], row["task"]): row for row in rows}
    return StoredRun(path.parent, tuple(ordered[key] for key in sorted(ordered)))


def arms_of(runs: Sequence[StoredRun]) -> list[Arm]:
    """Return the arms of runs: a run joins the first arm whose settings it has and whose seeds it does not have."""
    groups: list[list[StoredRun]] = []
    for run in runs:
        for group in groups:
            is_same = settings_of(group[0]) == settings_of(run)
            if is_same and run.seed not in [other.seed for other in group]:
                group.append(run)
                break
        else:
            groups.append([run])
    names = [common_name([run.folder.resolve().name for run in group]) for group in groups]
    if "" in names or len(set(names)) < len(names):
        names = tails([group[0].folder.resolve() for group in groups])
    return [Arm(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def common_name(names: Sequence[str]) -> str:
    """Return the common beginning of the folders' names, without the seed: tis of tis-seed0 and tis-seed1."""
    if len(names) == 1:
        return names[0]
    beginning = os.path.commonprefix(names)  # noqa: RUF071  of their letters
    return re.sub(r"[-_. ]*(seed)?[-_. ]*$", "", beginning)


def tails(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that differ; the numbers 1, 2 ... after those of equal paths."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{folder.name} ({number})" for number, folder in enumerate(folders, 1)]


def settings_of(run: StoredRun) -> dict[str, Any]:
    """Return a run's settings by name, those of records as sampler.temperature, without those of OF_ONE_RUN."""
    return {
        name: value
        for name, value in _flat(run.recipe)
        if OF_ONE_RUN.isdisjoint((name, name.partition(".")[0])) or name.startswith("saves.best")
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value.keys() == {"class_path", "init_args"}:
            yield prefix + name, value["class_path"]
            # The name of a task is that of the run.
            arguments = {field: each for field, each in value["init_args"].items() if field != "name"}
            yield from _flat(arguments, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def task_of_all(runs: Sequence[StoredRun]) -> str:
    """Return the task that all runs have evaluated after a training step: eval_task, or else validation_task."""
    for task in ("eval_task", "validation_task"):
        if all(run.last(task) for run in runs):
            return task
    run = next((run for run in runs if not run.last("eval_task") and not run.last("validation_task")), None)
    if run is None:
        run = next(run for run in runs if not run.last("eval_task"))
        raise ValueError(
            f"{run.folder} has not ended, and the others have no evaluation of its validation_task; wait for its end"
        )
    raise ValueError(
        f"{run.folder} has no held-out evaluation after a training step; wait for one, or set a smaller "
        "evaluation.steps"
    )


def check_decoding(first: StoredRun, run: StoredRun) -> None:
    """Raise ValueError if two runs complete their held-out problems in different ways."""
    settings = [dict(_flat({"eval_sampler": each.recipe["eval_sampler"]})) for each in (first, run)]
    for name in settings[0] | settings[1]:
        values = [each.get(name) for each in settings]
        if values[0] != values[1]:
            raise ValueError(
                f"{first.folder} and {run.folder} decode their held-out completions differently, {name}="
                f"{describe_json(values[0])} and {describe_json(values[1])}; train both with the same eval_sampler"
            )


def fractions_of(run: StoredRun, row: Mapping[str, Any], metric: str) -> Fractions:
    """Return a metric of each problem that has it, as numerator and denominator above 0."""
    found: Fractions = {}
    for number, value in enumerate(row["metrics"].get(metric, [])):
        numerator, denominator = value if isinstance(value, list) else (value, 1.0)
        if numerator is not None and denominator:
            found[row["problems"], number] = float(numerator), float(denominator)
    return found


def mean_of(fractions: Fractions) -> float:
    numerators, denominators = zip(*fractions.values(), strict=True)
    return math.fsum(numerators) / math.fsum(denominators)


def summed(every: Sequence[Fractions]) -> Fractions:
    """Return numerators and denominators of each problem, summed over runs."""
    total: Fractions = {}
    for fractions in every:
        for problem, (numerator, denominator) in fractions.items():
            before = total.get(problem, (0.0, 0.0))
            total[problem] = before[0] + numerator, before[1] + denominator
    return total


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns. The first arm is the one that the others are compared with."""

    arms: tuple[Arm, ...]
    task: str  # that is compared: eval_task, or validation_task of runs that go on
    given_metric: str | None = None

    def __post_init__(self) -> None:
        for arm in self.arms[1:]:
            for other, run in self.pairs(arm):
                problems = [self.last(each)["problems"] for each in (run, other)]
                if problems[0] != problems[1]:
                    sizes = [len(next(iter(self.last(each)["metrics"].values()), [])) for each in (run, other)]
                    numbers = f"{sizes[0]} and {sizes[1]}" if sizes[0] != sizes[1] else f"{sizes[0]} each"
                    raise ValueError(
                        f"{run.folder} and {other.folder} have different held-out problems ({numbers}); train both "
                        "with the same rows, eval_dataset or eval_task"
                    )
        if not self.metrics:
            raise ValueError("the runs have no metric in common: " + "; ".join(self.left_out.values()))
        if self.given_metric is not None and self.given_metric not in self.metrics:
            why = self.left_out.get(self.given_metric, f"the runs have {', '.join(self.metrics)}")
            hint = nearest_hint(self.given_metric, self.metrics, "{!r}")
            raise ValueError(f"metric={self.given_metric!r} is not compared: {why}{hint}")

    def last(self, run: StoredRun) -> dict[str, Any]:
        """Return the evaluation of a run that is compared."""
        row = run.last(self.task)
        assert row is not None, "`task_of_all` has looked"
        return row

    def pairs(self, arm: Arm) -> list[tuple[StoredRun, StoredRun]]:
        """Return the runs of an arm and of the first arm that must have the same problems: those of the same seeds, or
        if no seed is the same, all with all.
        """
        first = self.arms[0]
        same = [(run, other) for run in arm.runs for other in first.runs if run.seed == other.seed]
        return same or [(run, other) for run in arm.runs for other in first.runs]

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Metrics that cannot be compared, with the reason."""
        reasons: dict[str, str] = {}
        rows = [(run, self.last(run)) for arm in self.arms for run in arm.runs]
        for name in dict.fromkeys(name for _, row in rows for name in row["metrics"]):
            grading = {row["grading"].get(name, row["grading"]["reward"]) for _, row in rows}
            measured = {run.folder: fractions_of(run, row, name).keys() for run, row in rows}
            if missing := [run.folder for run, _ in rows if not measured[run.folder]]:
                reasons[name] = f"{name} is not measured by {missing[0]}"
            elif len(grading) > 1:
                what = "the rewards are not the same sum" if name == "reward" else "its code or settings differ"
                reasons[name] = f"{name}: {what}"
            elif not all(
                measured[run.folder] & measured[other.folder] for arm in self.arms[1:] for run, other in self.pairs(arm)
            ):
                reasons[name] = f"{name}: two runs have it on no problem in common"
        return reasons

    @cached_property
    def metrics(self) -> list[str]:
        """Metrics that all runs compute alike, the one that decides first."""
        row = self.last(self.arms[0].runs[0])
        names = [name for name in row["metrics"] if name not in self.left_out]
        main = self.given_metric or headline(names)
        if main not in names:
            main = next((name for name in names if name != "parsed"), "parsed")
        return sorted(names, key=lambda name: name != main)

    @property
    def metric(self) -> str:
        """The metric that decides which arm is better."""
        return self.metrics[0]

    def mean(self, arm: Arm, metric: str) -> float:
        """Return the mean of a metric over an arm's runs."""
        return mean(mean_of(fractions_of(run, self.last(run), metric)) for run in arm.runs)

    def before(self, arm: Arm) -> float | None:
        """Return the deciding metric before training, as a mean over an arm's runs; None if it was not measured."""
        found = [fractions_of(run, row, self.metric) for run in arm.runs for row in run.of_task(self.task)[:1]]
        return mean(map(mean_of, found)) if all(found) and len(found) == len(arm.runs) else None

    def difference(self, arm: Arm, metric: str | None = None) -> Difference:
        """Return a metric (default: the deciding one) of an arm minus that of the first arm, with its intervals.

        Runs of the same seed are compared pairwise, and runs whose seed the other arm lacks are left out. If the arms
        have no seed in common, all runs count: then the interval over the seeds has the degrees of freedom of the arm
        with fewer runs, which is wider than Welch's.
        """
        metric = metric or self.metric
        first = self.arms[0]
        seeds = sorted(set(arm.seeds) & set(first.seeds))
        groups = [sorted(each.runs, key=lambda run: run.seed) for each in (arm, first)]
        if seeds:
            groups = [[run for run in group if run.seed in seeds] for group in groups]
        fractions = [[fractions_of(run, self.last(run), metric) for run in group] for group in groups]
        if seeds:  # only problems that both runs of a seed have: a reward function may return None
            for ours, theirs in zip(*fractions, strict=True):
                for one, other in ((ours, theirs), (theirs, ours)):
                    for problem in one.keys() - other.keys():
                        del one[problem]
        means = [list(map(mean_of, each)) for each in fractions]
        if seeds:
            apart = [ours - theirs for ours, theirs in zip(*means, strict=True)]
            over_seeds, deviation = t_interval(apart), stdev(apart) if len(apart) > 1 else math.nan
        else:
            over_seeds, deviation = t_interval(*means), math.nan
        ours, theirs = map(summed, fractions)
        problems = sorted(ours.keys() & theirs.keys())  # sorted, because the bootstrap depends on the order
        values, weights = zip(*(ours[problem] for problem in problems), strict=True)
        values_first, weights_first = zip(*(theirs[problem] for problem in problems), strict=True)
        over_problems = bootstrap_interval(
            values,
            np.random.default_rng(0),
            weights=weights,
            before=values_first,
            weights_before=weights_first,
        )
        signs = [
            0 if math.isclose(a / b, c / d, abs_tol=1e-12) else 1 if a / b > c / d else -1
            for a, b, c, d in zip(values, weights, values_first, weights_first, strict=True)
        ]
        counts = signs.count(1), signs.count(-1), signs.count(0)
        return Difference(mean(means[0]), mean(means[1]), over_problems, over_seeds, tuple(seeds), counts, deviation)

    def sentences(self) -> list[str]:
        """Return for each arm but the first which of the two is better, and how sure that is."""
        lines = [self.sentence(arm) for arm in self.arms[1:]]
        if len(lines) > 1:
            lines.append("Each interval is a 95 % interval by itself: of twenty, one misses by chance.")
        return lines

    def sentence(self, arm: Arm) -> str:
        """Return which of an arm and the first one is better, and how sure that is."""
        found, first = self.difference(arm), self.arms[0]
        sign = found.clear_sign or 1
        names = (arm.label, first.label)[::sign]
        values = (found.arm, found.first)[::sign]
        higher, lower, equal = found.counts
        num_problems, num_seeds = sum(found.counts), len(found.seeds) or min(len(arm.runs), len(first.runs))
        bounds = []
        for interval, what in (
            (found.over_problems, f"{num_problems} problem{'s' * (num_problems != 1)}"),
            (found.over_seeds, f"{num_seeds} seeds"),
        ):
            if interval is not None:
                low, high = interval[::sign]
                bounds.append(f"{sign * low:+.3f} to {sign * high:+.3f} over {what}")
        numbers = f"{self.metric} {values[0]:.3f} against {values[1]:.3f}"
        numbers += f", {sign * found.value:+.3f}"
        numbers += f" (95 % interval {', '.join(bounds)})" if bounds else ""
        more, fewer = (higher, lower)[::sign]
        numbers += f"; higher on {more} problem{'s' * (more != 1)}, lower on {fewer}, equal on {equal}"
        too_few = "This is about these models: whether the settings are better, only more seeds of both can say."
        if not higher and not lower:
            text = f"{self.metric} cannot say which of {names[0]} and {names[1]} is better, because it is "
            text += f"{values[0]:.3f} in both and equal on each of the {equal} held-out problems."
            others = [name for name in self.metrics if any(self.difference(arm, name).counts[:2])]
            return f"{text} Other metrics differ: take --metric {others[0]}." if others else text
        if not bounds and num_problems > 1:
            return f"{names[0]} and {names[1]} differ by the same number on each held-out problem: {numbers}. {too_few}"
        if not bounds:
            return f"One held-out problem cannot say which of {names[0]} and {names[1]} is better: {numbers}."
        if found.clear_sign:
            text = f"{names[0]} is better than {names[1]}: {numbers}."
            return text if found.over_seeds else f"{text} {too_few}"
        text = f"It is not clear whether {names[0]} or {names[1]} is better: {numbers}."
        if needed := self.needed(found, num_problems):
            text += f" To show a difference of this size takes about {needed}."
        return text

    def needed(self, found: Difference, num_problems: int) -> str:
        """Return how many problems or seeds would show a difference of this size; "" if too many to say."""
        if found.value == 0:
            return ""
        if found.over_problems is not None and found.over_problems[0] <= 0 <= found.over_problems[1]:
            low, high = found.over_problems
            count, unit, now = num_problems * ((high - low) / 2 / found.value) ** 2, "held-out problems", num_problems
        elif math.isnan(found.deviation):
            return ""
        else:
            count, unit, now = (1.96 * found.deviation / found.value) ** 2, "seeds", len(found.seeds)
        return f"{max(math.ceil(count), now + 1)} {unit}" if count < 20 * now else ""

    def settings(self) -> dict[str, list[str]]:
        """Return the settings that differ between the arms, each with the arms' values as text."""
        every = [settings_of(arm.runs[0]) for arm in self.arms]
        names = dict.fromkeys(name for each in every for name in each)
        values = {name: [describe_json(each[name]) if name in each else "-" for each in every] for name in names}
        return {name: texts for name, texts in values.items() if len(set(texts)) > 1}

    def table(self) -> Table:
        """Return a table with a column for each arm: what differs, every metric, its difference to the first arm with
        the 95 % interval, mismatch and time.
        """
        num_problems = sum(self.difference(self.arms[1]).counts)
        held_out = "held-out problems" if self.task == "eval_task" else "problems of the validation_task"
        title = f"{num_problems} {held_out}, each run at its last evaluation"
        caption = f"in brackets: the 95 % interval of the difference to {self.arms[0].label}"
        if any(self.difference(arm).over_seeds for arm in self.arms[1:]):
            caption += ", over the seeds"
        notes = [caption, *(f"not compared: {why}" for why in self.left_out.values())]
        table = Table(
            title=literal(title, style="table.title"),
            caption=literal("\n".join(notes), style="table.caption", keep="\n"),
            caption_justify="left",
            **NARROW,
        )
        table.add_column("", overflow="fold")
        for arm in self.arms:
            table.add_column(literal(arm.label), justify="right", overflow="fold")

        def add(name: str, cells: Sequence[str]) -> None:
            table.add_row(literal(name), *(literal(cell, keep="\n") for cell in cells))

        differing = self.settings()
        for name in list(differing)[:MAX_SETTINGS]:
            add(name, [without_middle(text, 40) for text in differing[name]])
        if len(differing) > MAX_SETTINGS:
            add(f"and {len(differing) - MAX_SETTINGS} more settings", [])
        add("seeds", [", ".join(map(str, sorted(arm.seeds))) for arm in self.arms])
        add("steps", [_span([self.last(run)["step"] for run in arm.runs]) for arm in self.arms])
        table.add_section()
        befores = [self.before(arm) for arm in self.arms]
        add(f"{self.metric} before", ["-" if value is None else f"{value:.3f}" for value in befores])
        for metric in self.metrics:
            cells = [f"{self.mean(self.arms[0], metric):.3f}"]
            for arm in self.arms[1:]:
                found = self.difference(arm, metric)
                bounds = "" if found.interval is None else f" [{found.interval[0]:+.3f}, {found.interval[1]:+.3f}]"
                apart = f"{found.value:+.3f}{bounds}" if any(found.counts[:2]) else "equal on each problem"
                cells.append(f"{self.mean(arm, metric):.3f}\n{apart}")
            add(metric, cells)
        table.add_section()
        for name, title in PER_STEP.items():
            values = [self.mean_per_step(arm, name) for arm in self.arms]
            is_shown = self.has_mismatch if name in (MISMATCH, ESS) else any(value is not None for value in values)
            if is_shown:
                add(title, ["-" if value is None else f"{value:.3g}" for value in values])
        return table

    @property
    def has_mismatch(self) -> bool:
        """Whether the rollouts of an arm had a visible mismatch."""
        return any((self.mean_per_step(arm, MISMATCH) or 0) > VISIBLE_MISMATCH for arm in self.arms)

    def mean_per_step(self, arm: Arm, name: str) -> float | None:
        """Return the mean of a metric of training over an arm's steps and runs; None if none has it."""
        found = [value for run in arm.runs if (value := run.mean_per_step(name)) is not None]
        return mean(found) if found else None

    def as_json(self) -> dict[str, Any]:
        """Return all numbers, and the sentences, as JSON."""
        arms = {}
        for arm in self.arms:
            numbers: dict[str, Any] = {"runs": [str(run.folder) for run in arm.runs], "seeds": arm.seeds}
            numbers["steps"] = [self.last(run)["step"] for run in arm.runs]
            numbers["metrics"] = {metric: self.mean(arm, metric) for metric in self.metrics}
            numbers["before"] = self.before(arm)
            numbers |= {name: self.mean_per_step(arm, name) for name in PER_STEP}
            if arm is not self.arms[0]:
                numbers["differences"] = {
                    metric: {
                        "difference": found.value,
                        "over_problems": found.over_problems,
                        "over_seeds": found.over_seeds,
                        "paired_seeds": found.seeds,
                        "higher_lower_equal": found.counts,
                    }
                    for metric in self.metrics
                    for found in [self.difference(arm, metric)]
                }
            arms[arm.label] = numbers
        return {
            "metric": self.metric,
            "compared_with": self.arms[0].label,
            "settings": self.settings(),
            "not_compared": list(self.left_out.values()),
            "arms": arms,
            "sentences": self.sentences(),
        }

    def plot(self, path: str | Path) -> None:
        """Write the figure of `draw` as a PNG."""
        with replacing(Path(path)) as partial, default_style():
            self.draw().savefig(partial, dpi=110, format="png")

    def draw(self) -> Any:
        """Return a matplotlib Figure, not one of pyplot's: the deciding metric over the steps, the difference of every
        metric to the first arm, and the mismatch and its effective sample size if an arm has a visible mismatch.
        """
        import_matplotlib()
        from matplotlib.figure import Figure

        count = 4 if self.has_mismatch else 2
        figure = Figure(figsize=(4.6 * count, 4.6), layout="constrained")
        axes = figure.subplots(1, count)
        styles = [STYLES[number % len(STYLES)] for number in range(len(self.arms))]
        labels = [_plain(arm.label) for arm in self.arms]
        for arm, style, label in zip(self.arms, styles, labels, strict=True):
            self._draw_metric(axes[0], arm, style, label)
            for axis, name in zip(axes[2:], (MISMATCH, ESS), strict=False):
                for run in arm.runs:
                    rows: Any = [row for row in run.steps if name in row]
                    curve = {key: style[key] for key in ("color", "linestyle")}
                    draw_curve(axis, rows, name, linewidth=1.6, **curve)
        problems = "held-out problems" if self.task_over_steps == "eval_task" else "the validation_task"
        axes[0].set(title=_plain(f"{self.metric} on {problems}"), xlabel="step")
        self._draw_differences(axes[1], styles)
        for axis, name in zip(axes[2:], (MISMATCH, ESS), strict=False):
            axis.set(title=PER_STEP[name], xlabel="step")
        if self.has_mismatch:
            axes[2].set_ylim(0, None)
        axes[1].grid(alpha=0.3)
        for axis in (axes[0], *axes[2:]):
            plain_ticks(axis)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(self.arms))
        title = "\n".join(line for text in self.sentences() for line in textwrap.wrap(text, 30 * count + 50))
        figure.suptitle(escape_controls(title, keep="\n"), fontsize="medium", parse_math=False)
        if any(len(arm.runs) > 1 for arm in self.arms):
            axes[0].set_ylabel("thick: mean of the seeds")
        return figure

    @property
    def task_over_steps(self) -> str:
        """The task that the runs evaluate during training."""
        run = self.arms[0].runs[0]
        return max(("eval_task", "validation_task"), key=lambda task: len(run.of_task(task)))

    def _draw_metric(self, axis: Any, arm: Arm, style: Mapping[str, str], label: str) -> None:
        """Draw the deciding metric over the steps: each run thinly, and the mean at the steps that all runs have."""
        curves = []
        for run in arm.runs:
            found = {row["step"]: fractions_of(run, row, self.metric) for row in run.of_task(self.task_over_steps)}
            curves.append({step: mean_of(fractions) for step, fractions in found.items() if fractions})
        for curve in curves if len(curves) > 1 else ():
            axis.plot(*zip(*curve.items(), strict=True), color=style["color"], linewidth=0.7, alpha=0.4)
        steps = sorted(set.intersection(*map(set, curves)))
        means = [mean(curve[step] for curve in curves) for step in steps]
        axis.plot(steps, means, **style, markersize=5, linewidth=1.8, label=label)

    def _draw_differences(self, axis: Any, styles: Sequence[Mapping[str, str]]) -> None:
        """Draw the difference of each metric to the first arm with its intervals."""
        ticks = []
        for row, metric in enumerate(self.metrics):
            for number, arm in enumerate(self.arms[1:]):
                place = -row - (number - (len(self.arms) - 2) / 2) * 0.6 / max(1, len(self.arms) - 1)
                found, style = self.difference(arm, metric), styles[number + 1]
                for interval, width in ((found.over_problems, 4.0), (found.over_seeds, 1.2)):
                    if interval is not None:
                        axis.plot(interval, [place, place], color=style["color"], linewidth=width, alpha=0.7)
                axis.plot([found.value], [place], color=style["color"], marker=style["marker"])
            ticks.append(_plain(metric))
        axis.axvline(0, color="black", linewidth=1)
        axis.set_yticks([-row for row in range(len(ticks))], ticks)
        axis.set_ylim(-len(ticks) + 0.4, 0.6)
        has_seeds = any(self.difference(arm).over_seeds for arm in self.arms[1:])
        bars = "thick: over problems, thin: over seeds" if has_seeds else "over problems"
        axis.set(title=_plain(f"Difference to {self.arms[0].label}"), xlabel=f"95 % intervals, {bars}")


def _span(numbers: Sequence[int]) -> str:
    """Return a number, or the least and the greatest of several."""
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"


def _plain(text: str) -> str:
    """Return text that matplotlib draws unchanged: a dollar sign would begin a formula."""
    return escape_controls(text).replace("$", r"\$")
