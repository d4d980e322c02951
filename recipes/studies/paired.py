"""Paired comparisons: every arm starts from its seed's one warmed-up model, and changes a few settings of a recipe.
Without a warm-up a model that is a function of the seed is made once for each seed, too; others are as the recipe says.

Finished runs are kept as one JSON each below `--output_dir`; started again, a study runs what is missing, then prints
its tables and writes them to `--output_dir`/tables.json.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree
from statistics import covariance, mean, stdev, variance
from typing import TYPE_CHECKING, Any

import numpy as np

from dllm_rl import Callback, Policy, Recipe, Sampler
from dllm_rl.evaluation.intervals import student_t
from dllm_rl.files import read_json, write_json

if TYPE_CHECKING:
    from dllm_rl.training.late_rollouts.schedule import WorkerPool

TUNED_ON = (100, 101)  # seeds of trials, which no study takes
Results = Mapping[tuple[str, int], dict[str, Any]]  # (arm, seed) -> what its run left


@dataclass(frozen=True)
class Contrast:
    """A claim that is stated before the runs: `column` of `arm` less that of `against`, seed by seed."""

    claim: str
    arm: str
    against: str
    column: str = "after"


@dataclass(frozen=True)
class Study:
    """What is compared.

    base       the recipe, which also says how a seed's model is warmed up.
    arms       changes to it, by name; "features": the arm's `StepFeature`s.
    against    an arm -> the one that its seeds are compared with in the table.
    metrics    of a run's steps, by column: their mean over the run is in the table too.
    fewer      arms that take the first so many seeds alone.
    contrasts  the claims, which Holm's correction counts together.
    metric     of an evaluation, that is compared.
    """

    name: str
    base: Recipe
    arms: dict[str, dict[str, Any]]
    against: dict[str, str]
    metrics: dict[str, str]
    seeds: int
    num_steps: int
    fewer: dict[str, int] = field(default_factory=dict)
    contrasts: tuple[Contrast, ...] = ()
    metric: str = "solve_rate"


def by_seed(base: Recipe) -> bool:
    """Has each seed a model of its own that its arms share: a warmed-up one, or one that is a function of the seed?"""
    return bool(base.warmup.steps) or (callable(base.model) and "seed" in signature(base.model).parameters)


def warm_up(base: Recipe, seed: int, folder: Path) -> Path:
    """The checkpoint that all arms of this recipe and seed start from; made on first use."""
    from dllm_rl.checkpoints.checkpoint import list_checkpoints
    from dllm_rl.training.trainer import train

    if not (folder / "summary.json").exists():
        model = partial(base.model, seed=seed)
        base = replace(base, model=model, seed=seed, num_steps=0, rollout_quantization=None)
        train(replace(base, output_dir=str(folder), overwrite_output_dir=True))
    return list_checkpoints(folder / "checkpoints")[-1][1]


def result_path(root: Path, arm: str, seed: int) -> Path:
    return root / "results" / f"{''.join(c for c in arm if c not in ',:').replace(' ', '-')}_{seed}.json"


def steps_of(study: Study, arm: str, num_steps: int) -> int:
    """The steps of an arm's run, which the arm may set itself."""
    return study.arms[arm].get("num_steps", num_steps)


def has_steps(study: Study, run: Mapping[str, Any], num_steps: int) -> bool:
    """Whether a finished run is of as many steps; always, if no number is stored."""
    asked = steps_of(study, run["arm"], num_steps)
    return run.get("num_steps", asked) == asked


def sampled_solve_rate(policy: Policy, recipe: Recipe, sampler: Sampler) -> float:
    """The share of two completions per test puzzle that solve it, at the sampler's temperature."""
    from dllm_rl.evaluation.evaluate import evaluate

    policy.module.eval()
    options = {"seed": recipe.seed, "samples": 2, "batch_size": 400}
    return evaluate(policy, recipe.eval_task, sampler, **options).means["solve_rate"]


class Clock(Callback):
    """Processor seconds of a run's steps: `seconds` has one number for each."""

    def on_start(self, run: Any) -> None:
        self.last = time.process_time()
        self.seconds: list[float] = []

    def on_step(self, run: Any, metrics: Mapping[str, float]) -> None:
        now = time.process_time()
        self.seconds.append(now - self.last)
        self.last = now


def capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def run_one(study: Study, root: Path, num_steps: int, arm: str, seed: int, pool: "WorkerPool | None" = None) -> None:
    """Train and evaluate one arm; leaves `root`/results/....json."""
    keep(root, train_one(study, root, num_steps, arm, seed, pool)[0])


def train_one(
    study: Study, root: Path, num_steps: int, arm: str, seed: int, pool: "WorkerPool | None" = None
) -> tuple[dict[str, Any], Policy | None]:
    """Train and evaluate one arm. Returns what `keep` takes, and the learner. A run whose gradient is not finite has
    diverged: its rates count as 0, and there is no learner."""
    from dllm_rl.monitoring.plots import read_metrics
    from dllm_rl.training.trainer import train

    path = result_path(root, arm, seed)
    folder = root / "runs" / path.stem
    settings: dict[str, Any] = {
        "name": f"{study.name}-{path.stem}",
        "warmup": {"steps": 0},
        "seed": seed,
        "num_steps": num_steps,
        "evaluation": {"steps": 0},
        "log": {"report_to": None},
        "output_dir": str(folder),
        "resume_from_checkpoint": "latest",
    }
    if by_seed(study.base):
        settings["model"] = str(warm_up(study.base, seed, root / "warm" / str(seed)))
    kept: dict[str, Any] = {"arm": arm, "seed": seed, "num_steps": steps_of(study, arm, num_steps), "diverged": False}
    policy = None
    settings |= study.arms[arm]
    features = settings.pop("features", ())
    try:
        summary = train(study.base.replace(**settings), pool, features)
    except FloatingPointError as error:
        print(f"diverged: {error}")
        kept |= {"diverged": True, "after": 0.0, "quantized": 0.0}
    else:
        policy = summary.policy
        installed = summary["machine"]["versions"]
        kept |= {"s": summary["seconds"], "torch": installed["torch"], "commit": installed["dllm_rl_commit"]}
        kept |= {"cpu": capability(), "device": summary["machine"]["device"]}
        kept |= {when: summary[f"eval_{when}"][study.metric] for when in ("before", "after")}
        kept["quantized"] = (summary["eval_after_quantized"] or summary["eval_after"])[study.metric]
    steps = read_metrics(folder)
    for column, metric in study.metrics.items():
        if found := [row[metric] for row in steps if metric in row]:
            kept[column] = mean(found)
    return kept, policy


def keep(root: Path, kept: Mapping[str, Any]) -> None:
    """Write what a run left, from which on it is finished, and delete its checkpoints."""
    path = result_path(root, kept["arm"], kept["seed"])
    folder = root / "runs" / path.stem
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, kept)
    for part in ("checkpoints", "reference"):  # no study reads them, and a hundred runs' fill a disk
        if (folder / part).exists():
            rmtree(folder / part)


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean (Student's t)."""
    return student_t(len(values)) * stdev(values) / len(values) ** 0.5


def interval(values: Sequence[float], digits: int = 3) -> str:
    """mean ± half-width of the 95 % interval (Student's t); the mean alone for a single value."""
    if len(values) < 2:
        return f"{mean(values):z.{digits}f}"
    return f"{mean(values):z.{digits}f}±{half_width(values):.{digits}f}"


def counted(differences: Sequence[float]) -> str:
    """The mean with its interval, and how many of the seeds are above zero."""
    return f"{interval(differences)} ({sum(each > 0 for each in differences)} of {len(differences)})"


def share(results: Results, arm: str, against: str, whole: str, column: str = "after") -> str:
    """(arm less against) / (whole less against), paired by seed, and Fieller's 95 % interval, which has no bounds where
    the interval of the whole loss includes 0."""
    part, loss = paired(results, arm, against, column), paired(results, whole, against, column)
    n = len(loss)
    t = student_t(n) ** 2 / n
    a = mean(loss) ** 2 - t * variance(loss)
    b = mean(part) * mean(loss) - t * covariance(part, loss)
    c = mean(part) ** 2 - t * variance(part)
    if a <= 0:
        return f"{mean(part) / mean(loss):.2f}, without bounds"
    half = (b * b - a * c) ** 0.5
    return f"{mean(part) / mean(loss):.2f} [{(b - half) / a:.2f}, {(b + half) / a:.2f}]"


def sign_flip(differences: Sequence[float]) -> float:
    """The exact two-sided p of paired differences: the share of 2^n choices of signs whose mean is as far from 0."""
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate((sums + difference, sums - difference))
    return float(np.mean(np.abs(sums) >= abs(sums[0]) - 1e-12))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: the i-th smallest of m times m - i, never below those before it."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = least
    return adjusted


def benjamini_hochberg(p_values: Sequence[float], rate: float = 0.05) -> list[bool]:
    """Which are kept if the expected share of false ones among the kept is to be at most `rate`: all up to the largest
    p that is at most `rate` times its rank over their number."""
    ranked = sorted(p_values)
    limit = max((p for rank, p in enumerate(ranked, 1) if p <= rate * rank / len(ranked)), default=-1.0)
    return [p <= limit for p in p_values]


def paired(results: Results, arm: str, against: str, column: str = "after") -> list[float]:
    """The differences of the seeds that both arms have, in the order of the seeds."""
    seeds = sorted(seed for name, seed in results if name == arm and (against, seed) in results)
    return [results[arm, seed][column] - results[against, seed][column] for seed in seeds]


def runs_of(results: Results, arm: str) -> list[dict[str, Any]]:
    """The runs of an arm, in the order of the seeds."""
    return [results[key] for key in sorted(results) if key[0] == arm]


def line(axis: Any, place: float, values: Sequence[float], color: str) -> None:
    """Draw dots, and the mean with its interval above them."""
    axis.plot(values, [place] * len(values), "o", color=color, alpha=0.35, markersize=4)
    center, _, half = interval(values).partition("±")
    axis.errorbar(float(center), place, xerr=float(half or 0), fmt="|", color="black", markersize=11, capsize=3)


def arm_rows(study: Study, results: Results, columns: Sequence[str] = ("after",)) -> list[dict[str, str]]:
    """By arm: seeds, solve rates with intervals, each seed's, the paired difference, and the metrics' means."""
    rows = []
    for arm in study.arms:
        runs = runs_of(results, arm)
        if not runs:
            continue
        other = study.against.get(arm)
        apart = paired(results, arm, other) if other else []
        row = {"arm": arm, "seeds": str(len(runs))}
        for column in columns:
            values = [run[column] for run in runs if column in run]
            row[column] = interval(values) if values else "-"
        row["each seed"] = ", ".join(f"{run['after']:.2f}" for run in runs)
        row |= {"less": other or "-", "difference, 95 %": interval(apart) if apart else "-"}
        for column in study.metrics:
            found = [run[column] for run in runs if column in run]
            row[column] = f"{mean(found):.3g}" if found else "-"
        rows.append(row)
    return rows


def contrast_values(study: Study, results: Results) -> dict[str, list[float]]:
    """By claim its differences, seed by seed: what `verdict_rows` takes."""
    return {each.claim: paired(results, each.arm, each.against, each.column) for each in study.contrasts}


def contrast_rows(study: Study, results: Results) -> list[dict[str, str]]:
    """By claim: the paired difference with its interval, how many seeds are above 0, exact p, and Holm's."""
    apart = [paired(results, each.arm, each.against, each.column) for each in study.contrasts]
    found = [(each, values) for each, values in zip(study.contrasts, apart, strict=True) if values]
    p_values = [sign_flip(values) for _, values in found]
    rows = []
    for (each, values), p, adjusted in zip(found, p_values, holm(p_values), strict=True):
        row = {"stated before the runs": each.claim, "arm": each.arm, "less": each.against, "of": each.column}
        row |= {"seeds": str(len(values)), "difference, 95 %": interval(values)}
        row["above 0"] = f"{sum(value > 0 for value in values)} of {len(values)}"
        rows.append(row | {"p": f"{p:.3f}", "Holm's p": f"{adjusted:.3f}"})
    return rows


def claimed_rows(found: Mapping[str, Sequence[float]]) -> list[dict[str, str]]:
    """By claim, whose numbers are above 0 where it holds: their mean with its interval, how many are above 0, and the p
    of Holm's correction over all claims."""
    tests = holm([sign_flip(values) for values in found.values()])
    return [
        {
            "stated before the runs": claim,
            "found, 95 %": interval(values) if len(values) > 1 else "-",
            "above 0": f"{sum(value > 0 for value in values)} of {len(values)}",
            "Holm's p": f"{p:.3f}",
        }
        for (claim, values), p in zip(found.items(), tests, strict=True)
    ]


def shown_side(row: Mapping[str, str]) -> int:
    """On which side of 0 a row of `claimed_rows` or `contrast_rows` shows its number: 1 above, -1 below, 0 on none."""
    (found,) = (cell for head, cell in row.items() if head.endswith("95 %"))
    return 0 if float(row["Holm's p"]) >= 0.05 else -1 if found.startswith("-") else 1


def verdict(row: Mapping[str, str]) -> str:
    """What a row of `claimed_rows` says of its claim."""
    return {1: "shown", -1: "the opposite is shown", 0: "not shown"}[shown_side(row)]


def in_words(claim: str, changes: Mapping[str, str]) -> str:
    """A claim as a page says it: with the study's `changes`, in their order, and then those of all studies."""
    for old, new in [*changes.items(), ("no corrector", "no correction"), ("is above", "is better than")]:
        claim = claim.replace(old, new)
    return claim


def verdict_rows(
    found: Mapping[str, Sequence[float]], said: Callable[[str], str], counted: str = "seeds"
) -> list[dict[str, str]]:
    """`claimed_rows` with a verdict, as a page has them: each claim as it is `said`."""
    return [
        {
            "claim": said(row["stated before the runs"]),
            "difference": row["found, 95 %"],
            f"{counted} above 0": row["above 0"],
            "p": "< 0.001" if row["Holm's p"] == "0.000" else row["Holm's p"],
            "verdict": verdict(row),
        }
        for row in claimed_rows(found)
    ]


def markdown(rows: Sequence[Mapping[str, str]], columns: Sequence[str] | None = None) -> str:
    """The rows as a table: all columns of the first row, or those named."""
    heads = list(columns or rows[0]) if rows else []
    lines = [heads, ["---"] * len(heads), *([row[head] for head in heads] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(study: Study, results: Results, *more: str) -> str:
    """The arms' rates, `more` columns and differences, then the claims, as a document holds them: without p where no
    claim has the six seeds from which on it can be below 0.05, and with the seeds where some are still to run."""
    columns = ["after", *(column for column in more if column not in study.metrics)]
    arms, rows = arm_rows(study, results, columns), contrast_rows(study, results)
    seeds = []
    if any(int(row["seeds"]) < planned_seeds(study, row["arm"]) for row in arms):
        seeds.append("seeds")
        for row in (*arms, *rows):
            row["seeds"] = f"{row['seeds']} of {planned_seeds(study, row['arm'])}"
    heads = ["stated before the runs", *seeds, "difference, 95 %"]
    if any(int(row["seeds"].split()[0]) >= 6 for row in rows):
        heads.append("Holm's p")
    return f"{markdown(arms, ('arm', *seeds, 'after', *more, 'difference, 95 %'))}\n{markdown(rows, heads)}"


def write_rows(path: Path, **tables: Sequence[Mapping[str, str]]) -> None:
    """Every table with all of its columns, as JSON."""
    path.write_text(json.dumps(tables, indent=1, ensure_ascii=False) + "\n")


def work(job: Callable[[], object], log: Path) -> str | None:
    """Run the job with its output in a file; returns what went wrong, if anything did."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out, redirect_stdout(out):
        try:
            job()
        except Exception as error:  # one run's failure is reported, and does not end the others
            traceback.print_exc(file=out)
            return f"{type(error).__name__}: {error}; see {log}"
    return None


def single_thread() -> None:
    import torch

    torch.set_num_threads(1)


def run_all(jobs: Iterable[tuple[str, Callable[[], object]]], root: Path, workers: int | None) -> None:
    """Every job in one of `workers` processes of one thread each; failures are said."""
    with ProcessPoolExecutor(workers, get_context("spawn"), single_thread) as pool:
        waiting = [pool.submit(work, job, root / "logs" / f"{name}.txt") for name, job in jobs]
        for failure in filter(None, (job.result() for job in waiting)):
            print("failed:", failure)


def run_missing(
    study: Study,
    root: Path,
    runs: Iterable[tuple[str, int]],
    *,
    num_steps: Callable[[str], int],
    workers: int | None,
    run: Callable[[Study, Path, int, str, int], None] = run_one,
) -> None:
    """Those (arm, seed) that have left no result below `root`, an arm for its number of steps; first the models that
    they start from. `run` takes what `run_one` takes, and leaves the result. Results of other numbers of steps, such as
    a rehearsal's, end the study."""
    missing, results = [], load(root)
    for arm, seed in runs:
        if (arm, seed) not in results:
            missing.append((arm, seed))
        elif not has_steps(study, stored := results[arm, seed], num_steps(arm)):
            asked = steps_of(study, arm, num_steps(arm))
            raise SystemExit(
                f"{result_path(root, arm, seed)} has num_steps={stored['num_steps']}, not {asked}: choose another "
                "--output_dir, or delete it"
            )
    starts = dict.fromkeys(seed for _, seed in missing if by_seed(study.base))
    warm = ((f"warm-{s}", partial(warm_up, study.base, s, root / "warm" / str(s))) for s in starts)
    run_all(warm, root, workers)
    jobs = ((result_path(root, a, s).stem, partial(run, study, root, num_steps(a), a, s)) for a, s in missing)
    run_all(jobs, root, workers)


def load(root: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The finished runs below a folder."""
    return by_arm(map(read_json, sorted((root / "results").glob("*.json"))))


def restore_runs(runs: Iterable[dict[str, Any]], root: Path) -> None:
    """Put committed runs below a folder, so that `run_missing` runs only the others."""
    (root / "results").mkdir(parents=True, exist_ok=True)
    for run in runs:
        write_json(result_path(root, run["arm"], run["seed"]), run)


def by_arm(runs: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Runs, such as the stored ones of a study, by arm and seed."""
    return {(run["arm"], run["seed"]): run for run in runs}


def tune(study: Study, root: Path) -> None:
    """The arms on the seeds that no study takes, and their table."""
    run_missing(study, root, product(study.arms, (100, 101, 102)), num_steps=lambda _: study.num_steps, workers=1)
    print(markdown(arm_rows(study, load(root))))


def better_two(results: Results, trials: Iterable[str]) -> list[str]:
    """The trials of an arm that reach most on the first of TUNED_ON."""
    return sorted(trials, key=lambda trial: -results[trial, TUNED_ON[0]]["after"])[:2]


def tune_in_two_rounds(
    study: Study, root: Path, trials: Iterable[Iterable[str]], run: Callable[[Study, Path, int, str, int], None]
) -> Results:
    """Every trial of every arm on the first of TUNED_ON, and the better two of each arm on the second."""
    first, second = TUNED_ON
    tuned = partial(run_missing, study, root, num_steps=lambda _: 0, workers=1, run=run)
    tuned([(trial, first) for trial in study.arms])
    tuned([(trial, second) for of_arm in trials for trial in better_two(load(root), of_arm)])
    return load(root)


def trial_rows(study: Study, results: Results, head: str) -> list[dict[str, str]]:
    """What each trial reaches, by tuning seed."""
    rows = []
    for trial in study.arms:
        runs = [results.get((trial, seed)) for seed in TUNED_ON]
        rates = [f"{run['after']:.3f}" if run else "-" for run in runs]
        rows.append({head: trial} | {f"seed {seed}": rate for seed, rate in zip(TUNED_ON, rates, strict=True)})
    return rows


def planned_seeds(study: Study, arm: str) -> int:
    return study.fewer.get(arm, study.seeds)


def store(path: Path, study: Study, results: Results) -> None:
    """Write the runs of the study that are there, unless the file has more of them already: an unfinished study keeps
    what it has, and its tables say of how many seeds they are."""
    planned = [(arm, seed) for arm in study.arms for seed in range(planned_seeds(study, arm))]
    found = [results[key] for key in planned if key in results and has_steps(study, results[key], study.num_steps)]
    kept = read_json(path) if path.exists() else []
    if not found:
        print(f"{path.name} is not written: of {len(planned)} runs there are 0")
    elif len(found) < max(len(planned) * isinstance(kept, dict), len(kept)):  # a dict: tables of a whole study
        print(f"{path.name} is not written: it has {len(kept)} runs, and here are {len(found)} of {len(planned)}")
    else:
        if len(found) < len(planned):
            print(f"{path.name}: of {len(planned)} runs there are {len(found)}")
        write_json(path, found)


def which(names: Iterable[str]) -> str:
    """The command line's first word, which is taken off if it is one of the names; else the first name."""
    names = list(names)
    return sys.argv.pop(1) if sys.argv[1:] and sys.argv[1] in names else names[0]


def main(
    study: Study,
    about: str | None,
    columns: Sequence[str] = ("after",),
    stored: Path | None = None,
    run: Callable[[Study, Path, int, str, int], None] = run_one,
    draw: Callable[[Results, Path], None] | None = None,
) -> Results:
    """Run what is missing, print the tables, write the runs of a finished study to `stored`, and return the results.
    `run` is that of `run_missing`, and `draw` draws the figure beside `stored`. With `--report` nothing is written; if
    there are no runs the tables are those of `stored`, which has the runs, or the tables themselves if a study kept no
    more; then no results are returned."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / study.name)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, default=study.seeds)
    parser.set_defaults(num_steps=study.num_steps)
    if study.num_steps:  # of a study of 0 steps each arm has its own
        parser.add_argument("--num_steps", type=int)
    parser.add_argument("--arms", nargs="+", choices=study.arms, default=list(study.arms), metavar="ARM")
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of the runs that are there")
    options = parser.parse_args()
    root, seeds = options.output_dir, range(options.seeds)
    if not options.report:
        fewest = {arm: study.fewer.get(arm, study.seeds) for arm in options.arms}
        runs = [(arm, seed) for seed, arm in product(seeds, options.arms) if seed < fewest[arm]]
        run_missing(study, root, runs, num_steps=lambda _: options.num_steps, workers=options.workers, run=run)
    results, kept = load(root), None
    if options.report and not results and stored is not None:
        if not stored.exists():
            parser.error(f"--report: no runs below {root}, and no {stored}")
        kept = read_json(stored)
        results = {} if isinstance(kept, dict) else by_arm(kept)
    tables = {"arms": arm_rows(study, results, columns), "contrasts": contrast_rows(study, results)}
    for rows in filter(None, (kept if isinstance(kept, dict) else tables).values()):
        print(markdown(rows))
    if options.report:
        return results
    if results:
        write_rows(root / "tables.json", **tables)
    if stored is not None:
        store(stored, study, results)
        if draw is not None:
            draw(results, stored.with_suffix(".png"))
    return results
