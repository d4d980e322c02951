"""Does the ESS of the first ten steps warn of harm, before it is done? Claims before the runs.

ess.py has the mean over the whole run, of trials that others had chosen. Here every trial is made for the question: 4x4
Sudoku as in late_rollouts.py (80 steps) and Countdown (recipes/countdown_tiny.py, 120 steps), FP8 rollouts, one update
a step, fresh seeds (20 to 23). In each cell, a task and a seed, all start from one warmed-up model:

    lags    2, 8
    rates   2.5e-4, 5e-4, 1e-3
    bounds  none        no corrector; the ratio of one update is 1
            one-sided   ratios against the rollout itself, and PPO's clip
            two-sided   the same, and a dual clip at 1.2

A trial is harmed if it ends more than 0.1 below its twin, the run of its cell without a lag at the same rate and bound.
What the first ten steps say, in which late batches come from the warmed-up model up to step 2 or 8:

    ESS      mean of `rollout_corr/ess` over these steps; also over the last five of them
    known    a control: lag times learning rate, known before the run
    reward   a control on every run's screen: their mean reward less the twin's

AUC is over pairs of a harmed and an unharmed trial of one bound, as the bound is known, too: how often the harmed one
has the lower ESS. The claims, two-sided, by flipping the signs of the cells' numbers (those with such a pair), Holm's
correction over both:

1. the AUC of the ESS is above a half: it warns;
2. it is above the AUC of what is known: it warns of more.

Without a test: how many harmed and unharmed trials have an ESS below 0.70 and 0.95, the bounds that the library prints
(fixed before); AUCs by task and bound; and the ESS's AUC over pairs of seeds that share task, bound, lag and rate.

Known before the runs: late_rollouts.json (of which seed 100 tried this grid without a bound and under the dual clip:
harmed 6 of 6, and 2 of 6), and ess.md, in which the ESS over the whole run separates harmed from other trials where
nothing bounds the ratio, no better than lag times rate.

    python -m recipes.studies.ess_early            run what is missing, ess_early.json, the tables
    python -m recipes.studies.ess_early --report   run nothing
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from dllm_rl import NoCorrection, PPOClip
from dllm_rl.files import read_json, write_json
from dllm_rl.monitoring.plots import read_metrics
from recipes import countdown_tiny
from recipes.studies import ess, late_rollouts
from recipes.studies.ess import FIRST, HARM, Trial, auc
from recipes.studies.late_rollouts import QUIET, run_late
from recipes.studies.paired import (
    Study,
    by_arm,
    claimed_rows,
    load,
    markdown,
    result_path,
    run_missing,
)

STORED = Path(__file__).with_suffix(".json")  # by task its runs
SEEDS, LAGS, RATES, THRESHOLDS = range(20, 24), (2, 8), (2.5e-4, 5e-4, 1e-3), (0.70, 0.95)
BOUNDS: dict[str, dict[str, Any]] = {
    "none": {"corrector": NoCorrection()},
    "one-sided": {"corrector": NoCorrection(), "old_logprobs": "rollout", "loss": PPOClip()},
    "two-sided": {"corrector": NoCorrection(), "old_logprobs": "rollout", "loss": PPOClip(delta=1.2)},
}
METRICS = {"ess of steps": "rollout_corr/ess", "reward of steps": "reward"}
Run = Mapping[str, Any]


def name_of(lag: int, bound: str, rate: float) -> str:
    return f"lag {lag}, {bound} at {rate:g}"


def arm(lag: int, bound: str, rate: float) -> dict[str, Any]:
    late = {"rollout_workers": 1, "max_staleness": lag} if lag else {}
    return late | BOUNDS[bound] | {"learning_rate": rate}


ARMS = {name_of(*each): arm(*each) for each in product((0, *LAGS), BOUNDS, RATES)}
SUDOKU = replace(late_rollouts.STUDY, name="ess-early-sudoku", arms=ARMS, against={}, fewer={}, contrasts=())
COUNTDOWN = {"base": replace(countdown_tiny.recipe, **QUIET), "num_steps": 120, "metric": "accuracy"}
STUDIES = {"4x4 Sudoku": SUDOKU, "Countdown": replace(SUDOKU, name="ess-early-countdown", **COUNTDOWN)}


def with_steps(root: Path, name: str, seed: int) -> dict[str, Any]:
    """A finished run's result with the metrics of its steps, which its folder has."""
    path = result_path(root, name, seed)
    steps = read_metrics(root / "runs" / path.stem)
    return read_json(path) | {
        key: [round(row[metric], 4) for row in steps if metric in row] for key, metric in METRICS.items()
    }


@dataclass(frozen=True)
class Early(Trial):
    """One late run beside its twin: `arm` is the bound, and ESS and rewards are means over the first steps.

    later  the ESS of the last five of these.
    """

    task: str
    later: float


SCORES: dict[str, Callable[[Early], float]] = {
    "ESS": ess.SCORES["ESS"],
    "ESS of steps 5 to 9": lambda trial: trial.later,
    **{name: ess.SCORES[name] for name in ("known before", "reward less the twin's")},
}


def trials(stored: Mapping[str, Sequence[Run]]) -> list[Early]:
    """The late runs of all tasks. A run that diverged ended at 0."""
    found = []
    for task, runs in stored.items():
        results = by_arm(runs)
        for seed, lag, bound, rate in product(SEEDS, LAGS, BOUNDS, RATES):
            late, twin = (results[name_of(which, bound, rate), seed] for which in (lag, 0))
            rewards = (mean(run["reward of steps"][:FIRST]) for run in (late, twin))
            found.append(
                Early(
                    bound,
                    f"lag {lag}",
                    seed,
                    mean(late["ess of steps"][:FIRST]),
                    twin["after"] - late["after"],
                    lag * rate,
                    *rewards,
                    task=task,
                    later=mean(late["ess of steps"][5:FIRST]),
                )
            )
    return found


def auc_of(every: Sequence[Early], score: str) -> float | None:
    """The AUC over pairs of one bound."""
    return auc(every, SCORES[score], lambda trial: trial.arm)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def auc_rows(every: Sequence[Early]) -> list[dict[str, str]]:
    """By task and bound, over all seeds: how many trials are harmed, and each score's AUC."""
    rows = []
    for task, bound in product(STUDIES, ("all", *BOUNDS)):
        those = [trial for trial in every if trial.task == task and bound in ("all", trial.arm)]
        row = {"task": task, "bound": bound, "harmed": f"{sum(trial.harmed for trial in those)} of {len(those)}"}
        row |= {score: shown(auc_of(those, score)) for score in SCORES}
        between = auc(those, SCORES["ESS"], lambda trial: (trial.arm, trial.kind, trial.known))
        rows.append(row | {"ESS between seeds": shown(between)})
    return rows


def threshold_rows(every: Sequence[Early]) -> list[dict[str, str]]:
    """By bound, over both tasks: of harmed and of other trials, how many the thresholds mark."""
    rows = []
    for bound in ("all", *BOUNDS):
        row = {"bound": bound}
        for threshold, harmed in product(THRESHOLDS, (True, False)):
            those = [trial for trial in every if bound in ("all", trial.arm) and trial.harmed is harmed]
            marked = sum(trial.ess < threshold for trial in those)
            row[f"below {threshold:.2f}, {'harmed' if harmed else 'others'}"] = f"{marked} of {len(those)}"
        rows.append(row)
    return rows


def claim_rows(every: Sequence[Early]) -> list[dict[str, str]]:
    """The claims, on the cells that have a pair."""
    found: dict[str, list[float]] = {"the ESS warns (AUC less a half)": [], "of more than was known (AUC less AUC)": []}
    for task, seed in product(STUDIES, SEEDS):
        cell = [trial for trial in every if (trial.task, trial.seed) == (task, seed)]
        here, known = auc_of(cell, "ESS"), auc_of(cell, "known before")
        if here is not None and known is not None:
            for values, value in zip(found.values(), (here - 0.5, here - known), strict=True):
                values.append(value)
    return claimed_rows(found)


def page_tables() -> dict[str, str]:
    every = trials(read_json(STORED))
    rows = {"claims": claim_rows, "AUC": auc_rows, "bounds": threshold_rows}
    return {name: markdown(of(every)) for name, of in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ess-early"))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--report", action="store_true", help=f"run nothing: the tables of {STORED.name}")
    options = parser.parse_args()
    if options.report:
        stored = read_json(STORED)
    else:
        stored = {task: complete(study, options.output_dir, options.workers) for task, study in STUDIES.items()}
        write_json(STORED, stored)
    every = trials(stored)
    print(f"{len(every)} trials; harmed: more than {HARM} below the twin\n")
    for rows in (auc_rows, threshold_rows, claim_rows):
        print(markdown(rows(every)))


def complete(study: Study, folder: Path, workers: int) -> list[dict[str, Any]]:
    """Run what is missing of a task, and return all of its runs."""
    root = folder / study.name
    pairs = [(name, seed) for seed, name in product(SEEDS, study.arms)]
    run_missing(study, root, pairs, num_steps=lambda _: study.num_steps, workers=workers, run=run_late)
    if failed := len(set(pairs) - load(root).keys()):
        raise SystemExit(f"{failed} runs failed; see {root / 'logs'}")
    return [with_steps(root, name, seed) for name, seed in pairs]


if __name__ == "__main__":
    main()
