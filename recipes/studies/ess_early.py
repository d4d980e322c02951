"""Does the ESS of the first ten steps warn of harm, before it is done? Claims before the runs.

ess.py has the mean over the whole run, of trials that others had chosen. Here every trial is made for the question: 4x4
Sudoku as in late_rollouts.py and Countdown (recipes/countdown_tiny.py), FP8 rollouts, 80 steps of one update, fresh
seeds (20 to 23). In each cell, a task and a seed, all start from one warmed-up model:

    lags    2, 4, 8
    rates   5e-4, 1e-3
    bounds  none        no corrector; the ratio of one update is 1
            one-sided   ratios against the rollout itself, and PPO's clip
            two-sided   the same, and a dual clip at 1.2

A trial is harmed if it ends more than 0.1 below its twin, the run of its cell without a lag at the same rate. Numbers
of the first ten steps warn; what they must beat is known before the run (lag times rate), or is on every run's screen:

    ESS      mean of `rollout_corr/ess` over steps 0 to 9, in which late batches begin with step 1
    known    lag times learning rate
    reward   the mean reward of these steps less the twin's

The claims, two-sided, on the eight cells by flipping the signs of their numbers, Holm's correction over both; a cell's
number is its AUC (a harmed and an unharmed trial: how often the harmed one has the lower ESS), less:

1. a half: the ESS warns;
2. the AUC of what is known: the ESS warns of more than was known.

Without a test: how many harmed and unharmed trials have an ESS below 0.70 and 0.95, the bounds that the library prints
(fixed before), and the AUCs by bound, over all cells.

Known before the runs: late_rollouts.json, and ess.md, in which the ESS over the whole run separates harmed from other
trials where nothing bounds the ratio, no better than lag times rate.

    python -m recipes.studies.ess_early            run what is missing, ess_early.json, the tables
    python -m recipes.studies.ess_early --report   run nothing
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from dllm_rl import NoCorrection, PPOClip
from dllm_rl.files import read_json, write_json
from dllm_rl.monitoring.plots import read_metrics
from recipes import countdown_tiny
from recipes.studies import late_rollouts
from recipes.studies.ess import FIRST, HARM, Trial, auc
from recipes.studies.late_rollouts import QUIET, run_late
from recipes.studies.paired import Study, by_arm, holm, interval, load, markdown, result_path, run_missing, sign_flip

STORED = Path(__file__).with_suffix(".json")  # by task its runs
SEEDS, LAGS, RATES, THRESHOLDS = range(20, 24), (2, 4, 8), (5e-4, 1e-3), (0.70, 0.95)
BOUNDS: dict[str, dict[str, Any]] = {
    "none": {"corrector": NoCorrection()},
    "one-sided": {"corrector": NoCorrection(), "old_logprobs": "rollout", "loss": PPOClip()},
    "two-sided": {"corrector": NoCorrection(), "old_logprobs": "rollout", "loss": PPOClip(delta=1.2)},
}
Run = Mapping[str, Any]
Trials = Sequence[Trial]


def name_of(lag: int, bound: str, rate: float) -> str:
    return f"lag {lag}, {bound} at {rate:g}" if lag else f"lag 0 at {rate:g}"


ARMS = {name_of(0, "", rate): {"learning_rate": rate} for rate in RATES} | {
    name_of(lag, bound, rate): BOUNDS[bound] | {"rollout_workers": 1, "max_staleness": lag, "learning_rate": rate}
    for lag, bound, rate in product(LAGS, BOUNDS, RATES)
}
SUDOKU = replace(late_rollouts.STUDY, name="ess-early-sudoku", arms=ARMS, against={}, fewer={}, contrasts=())
STUDIES = {
    "4x4 Sudoku": SUDOKU,
    "Countdown": replace(
        SUDOKU, name="ess-early-countdown", base=replace(countdown_tiny.recipe, **QUIET), metric="accuracy"
    ),
}


def run(study: Study, root: Path, num_steps: int, name: str, seed: int) -> None:
    """One run, with the ESS of its steps, and the rewards of the first."""
    run_late(study, root, num_steps, name, seed)
    path = result_path(root, name, seed)
    steps = read_metrics(root / "runs" / path.stem)[:FIRST]
    write_json(path, read_json(path) | {"reward of first steps": mean(row["reward"] for row in steps)})


def trials(runs: Mapping[tuple[str, int], Run]) -> list[Trial]:
    """The late runs of a task beside their twins; a run that diverged was harmed."""
    found = []
    for lag, bound, rate in product(LAGS, BOUNDS, RATES):
        for seed in SEEDS:
            late, twin = (runs[name_of(which, bound, rate), seed] for which in (lag, 0))
            found.append(
                Trial(
                    arm=bound,
                    kind=f"lag {lag}",
                    seed=seed,
                    ess=mean(late["ess of steps"][:FIRST]),
                    loss=twin["after"] - late["after"],
                    known=lag * rate,
                    reward=late["reward of first steps"],
                    twins=twin["reward of first steps"],
                )
            )
    return found


SCORES = {
    "ESS": lambda trial: trial.ess,
    "known before": lambda trial: -trial.known,
    "reward less the twin's": lambda trial: trial.reward - trial.twins,
}


def cells(stored: Mapping[str, Sequence[Run]]) -> dict[tuple[str, int], Trials]:
    """The trials of each task and seed."""
    every = {task: trials(by_arm(runs)) for task, runs in stored.items()}
    return {(task, seed): [trial for trial in every[task] if trial.seed == seed] for task in every for seed in SEEDS}


def auc_rows(stored: Mapping[str, Sequence[Run]]) -> list[dict[str, str]]:
    """By task and bound, over all seeds: how many trials are harmed, and each score's AUC."""
    rows = []
    for task, runs in stored.items():
        every = trials(by_arm(runs))
        for bound in ("all", *BOUNDS):
            those = [trial for trial in every if bound in ("all", trial.arm)]
            harmed = sum(trial.harmed for trial in those)
            row = {"task": task, "bound": bound, "harmed": f"{harmed} of {len(those)}"}
            for name, score in SCORES.items():
                value = auc(those, score)
                row[name] = "-" if value is None else f"{value:.2f}"
            rows.append(row)
    return rows


def threshold_rows(stored: Mapping[str, Sequence[Run]]) -> list[dict[str, str]]:
    """By bound, over both tasks: of harmed and of unharmed trials, how many the thresholds mark."""
    every = [trial for runs in stored.values() for trial in trials(by_arm(runs))]
    rows = []
    for bound in ("all", *BOUNDS):
        row = {"bound": bound}
        for threshold, harmed in product(THRESHOLDS, (True, False)):
            those = [trial for trial in every if bound in ("all", trial.arm) and trial.harmed is harmed]
            marked = sum(trial.ess < threshold for trial in those)
            row[f"ESS below {threshold:.2f}, {'harmed' if harmed else 'others'}"] = f"{marked} of {len(those)}"
        rows.append(row)
    return rows


def claim_rows(stored: Mapping[str, Sequence[Run]]) -> list[dict[str, str]]:
    """The claims, on the cells that have harmed and other trials."""
    found: dict[str, list[float]] = {"the ESS warns (AUC less a half)": [], "more than was known (AUC less AUC)": []}
    for cell in cells(stored).values():
        ess, known = (auc(cell, SCORES[name]) for name in ("ESS", "known before"))
        if ess is not None and known is not None:
            for values, value in zip(found.values(), (ess - 0.5, ess - known), strict=True):
                values.append(value)
    tests = holm([sign_flip(values) for values in found.values()])
    return [
        {
            "stated before the runs": claim,
            "found, 95 %": interval(values),
            "above 0": f"{sum(value > 0 for value in values)} of {len(values)}",
            "Holm's p": f"{p:.3f}",
        }
        for (claim, values), p in zip(found.items(), tests, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ess-early"))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--report", action="store_true", help=f"run nothing: the tables of {STORED.name}")
    options = parser.parse_args()
    if options.report:
        stored = read_json(STORED)
    else:
        stored = {}
        for task, study in STUDIES.items():
            root = options.output_dir / study.name
            pairs = [(name, seed) for seed, name in product(SEEDS, study.arms)]
            run_missing(study, root, pairs, num_steps=lambda _: SUDOKU.num_steps, workers=options.workers, run=run)
            stored[task] = list(load(root).values())
        missing = len(STUDIES) * len(SEEDS) * len(ARMS) - sum(map(len, stored.values()))
        if missing:
            raise SystemExit(f"{missing} runs failed; see {options.output_dir}")
        write_json(STORED, stored)
    for rows in (auc_rows, threshold_rows, claim_rows):
        print(markdown(rows(stored)))
    print(f"harmed: more than {HARM} below the twin")


if __name__ == "__main__":
    main()
