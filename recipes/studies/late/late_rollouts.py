"""What do late rollouts cost, and which corrector brings it back? 4x4 Sudoku, FP8 rollouts. Claims before the runs.

Every batch is sampled with weights that are `lag` updates old. The lag is exact and the bits are those of Ray's
workers, but the batches are made in the run's own process, so that an arm needs one thread and no Ray. All arms take 80
steps of one update from their seed's one warmed-up model, and are evaluated on 400 held-out puzzles.

    lag 0, 1, 2, 4, 8    no corrector
    dual clip            ratios against the rollout itself, which PPO's clip then bounds, from both sides
    decoupled            decoupled PPO: an unbounded weight leads from the rollout to the learner before its update, and
                         the clip bounds the step from there
    tis, ais, icepop     the correctors of these names with their defaults
    tbpo                 its weight alone: with one update the ratio is 1, and its band does not act
    placebo              TIS whose weights go to other tokens, which any gain of TIS must exceed
    none again           the arm without a corrector with other prompts and draws: what noise does

Each arm takes its own learning rate, tuned on two seeds that the study does not use. On seed 100 it tries 2.5e-4, 5e-4
and 1e-3, and further by factors of two while the best is at an edge; on seed 101 the best of these and the better one
of its neighbors. The higher mean of the two seeds wins.

Known before the runs: two seeds of a first look, in which lags 4 and 8 cost 0.05 to 0.16 at one rate, and TIS and AIS
brought some of it back; and most of seed 100's tuning, in which the dual clip at a lag of 4 nearly reached lag 0, and
TIS and AIS did not. The claims, on seeds 0 to 9, are those of `CLAIMS`. The arms of `FEWER`, of which there is no
claim, take the seeds 0 to 4.

    python -m recipes.studies.late.late_rollouts               tune, run, late_rollouts.json, the tables
    python -m recipes.studies.late.late_rollouts --report      run nothing
"""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from dllm_rl import AIS, TBPO, TIS, IcePop, NoCorrection, PPOClip
from dllm_rl.files import read_json, write_json
from dllm_rl.groups import Late
from dllm_rl.monitoring.plots import read_metrics
from dllm_rl.training.late_rollouts.schedule import InProcessPool
from recipes.studies.controls import Permuted
from recipes.studies.paired import (
    Contrast,
    Results,
    Study,
    arm_rows,
    by_arm,
    contrast_rows,
    contrast_values,
    counted,
    in_words,
    interval,
    load,
    markdown,
    paired,
    result_path,
    run_missing,
    run_one,
    runs_of,
    verdict_rows,
)
from recipes.sudoku_unique import recipe

STORED = Path(__file__).with_suffix(".json")  # the tuning, the rates, and every run
TUNING_SEEDS = (100, 101)
RATES = (2.5e-4, 5e-4, 1e-3)
UNBOUNDED = 1e9  # a cap that no ratio reaches: log-ratios are cut at 20 nats, and e^20 is 4.9e8


CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {"corrector": NoCorrection()},
    "dual clip": {"corrector": NoCorrection(), "old_logprobs": "rollout", "loss": PPOClip(delta=1.2)},
    "decoupled": {"corrector": TIS(cap=UNBOUNDED)},
    "tis": {"corrector": TIS()},
    "ais": {"corrector": AIS()},
    "tbpo": {"corrector": TBPO()},
    "icepop": {"corrector": IcePop()},
    "placebo": {"corrector": Permuted(corrector=TIS())},
}


def arm(lag: int, correction: str) -> dict[str, Any]:
    late = {"late": Late(workers=1, max_staleness=lag)} if lag else {}
    return late | CORRECTIONS[correction]


TUNED = {
    "lag 0": arm(0, "none"),
    "lag 1": arm(1, "none"),
    "lag 1, tis": arm(1, "tis"),
    "lag 1, dual clip": arm(1, "dual clip"),
    "lag 2": arm(2, "none"),
    "lag 4": arm(4, "none"),
    **{f"lag 4, {name}": arm(4, name) for name in CORRECTIONS if name != "none"},
    "lag 8": arm(8, "none"),
    "lag 8, dual clip": arm(8, "dual clip"),
}
AGAIN = "lag 4, none again"
CLAIMS = (
    Contrast("a lag of 1 costs something", "lag 0", "lag 1"),
    Contrast("a lag of 2 costs something", "lag 0", "lag 2"),
    Contrast("a lag of 4 costs something", "lag 0", "lag 4"),
    Contrast("a lag of 8 costs something", "lag 0", "lag 8"),
    Contrast("at a lag of 4 TIS is above no corrector", "lag 4, tis", "lag 4"),
    Contrast("at a lag of 4 AIS is above no corrector", "lag 4, ais", "lag 4"),
    Contrast("at a lag of 4 the dual clip is above no corrector", "lag 4, dual clip", "lag 4"),
    Contrast("at a lag of 4 TIS is above its placebo", "lag 4, tis", "lag 4, placebo"),
    Contrast("at a lag of 4 the dual clip is above TIS", "lag 4, dual clip", "lag 4, tis"),
    Contrast("at a lag of 8 the dual clip is above no corrector", "lag 8, dual clip", "lag 8"),
    Contrast("at a lag of 1 the dual clip is above no corrector", "lag 1, dual clip", "lag 1"),
)
FEWER = dict.fromkeys(("lag 1, tis", "lag 4, decoupled", "lag 4, tbpo", "lag 4, icepop", AGAIN), 5)
AGAINST = {name: name.split(",")[0] if "," in name else "lag 0" for name in (*TUNED, AGAIN) if name != "lag 0"}
METRICS = {
    "ess": "rollout_corr/ess",
    "k3": "rollout_corr/k3_kl",
    "k3 of quantization": "mismatch_split/quantization_k3_kl",
    "k3 of staleness": "mismatch_split/staleness_k3_kl",
    "reward": "reward",
}
QUIET = {"evaluation": {"steps": 0}, "saves": {"steps": 10**6}, "log": {"completions_steps": 0}}
STUDY = Study(
    name="late-rollouts",
    base=recipe.replace(**QUIET),
    arms=TUNED | {AGAIN: TUNED["lag 4"] | {"seed": 1000}},
    against=AGAINST,
    metrics=METRICS,
    seeds=10,
    num_steps=80,
    fewer=FEWER,
    contrasts=CLAIMS,
)
TWINS = {AGAIN: "lag 4"}  # an arm that is not tuned takes this one's rate


def at_rates(study: Study, rates: Mapping[str, float]) -> Study:
    """The study with its arms at their learning rates."""
    rated = {name: changes | {"learning_rate": rates[TWINS.get(name, name)]} for name, changes in study.arms.items()}
    return replace(study, arms=rated)


def run_late(study: Study, root: Path, num_steps: int, name: str, seed: int) -> None:
    """One run, its late batches made in its own process, and the ESS of its steps."""
    if name == AGAIN:
        study = replace(study, arms=study.arms | {AGAIN: study.arms[AGAIN] | {"seed": 1000 + seed}})
    run_one(study, root, num_steps, name, seed, InProcessPool())
    path = result_path(root, name, seed)
    result = read_json(path) | {"learning_rate": study.arms[name]["learning_rate"]}
    if steps := [row[METRICS["ess"]] for row in read_metrics(root / "runs" / path.stem) if METRICS["ess"] in row]:
        result |= {"least ess": min(steps), "ess of steps": [round(each, 4) for each in steps]}
    write_json(path, result)


def at_rate(name: str, rate: float) -> str:
    return f"{name} at {rate:g}"


def tune(
    study: Study,
    root: Path,
    workers: int | None,
    run: Callable[[Study, Path, int, str, int], None] = run_late,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """By arm the rate of the higher mean on the tuning seeds, and every run of the tuning."""
    first, second = TUNING_SEEDS

    def reached(seed: int, tried: dict[str, tuple[float, ...]]) -> dict[str, dict[float, float]]:
        pairs = [(name, rate) for name, rates in tried.items() for rate in rates]
        arms = {at_rate(name, rate): study.arms[name] | {"learning_rate": rate} for name, rate in pairs}
        trial, runs = replace(study, arms=arms), [(name, seed) for name in arms]
        run_missing(trial, root, runs, num_steps=lambda _: study.num_steps, workers=workers, run=run)
        results = load(root)
        return {
            name: {rate: results[at_rate(name, rate), seed]["after"] for rate in rates} for name, rates in tried.items()
        }

    tried = {name: RATES for name in study.arms if name not in TWINS}
    while True:
        after = reached(first, tried)
        wider = {name: widened(rates, max(rates, key=lambda rate: after[name][rate])) for name, rates in tried.items()}
        if wider == tried:
            break
        tried = wider
    kept = {name: best_two(after[name]) for name in tried}
    again = reached(second, kept)
    best = {name: max(rates, key=lambda rate: after[name][rate] + again[name][rate]) for name, rates in kept.items()}
    return best, list(load(root).values())


def best_two(after: dict[float, float]) -> tuple[float, float]:
    """The best rate, and the better one of its two neighbors."""
    rates = sorted(after)
    place = rates.index(max(rates, key=lambda rate: after[rate]))
    return rates[place], max(rates[place - 1], rates[place + 1], key=lambda rate: after[rate])


def widened(rates: tuple[float, ...], best: float) -> tuple[float, ...]:
    """The rates, and the next one beyond an edge that is the best."""
    if best == rates[0]:
        return (best / 2, *rates)
    return (*rates, best * 2) if best == rates[-1] else rates


def main(study: Study, stored: Path, about: str | None) -> None:
    """Tune the arms' rates, run what is missing, write every run to `stored`, and print the tables."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / study.name)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true", help=f"run nothing: the tables of {stored.name}")
    options = parser.parse_args()
    root = options.output_dir
    if options.report:
        kept = read_json(stored)
        results = by_arm(kept["runs"])
        study = at_rates(study, kept["rates"])
    else:
        rates, tuning = tune(study, root / "tuning", options.workers)
        study = at_rates(study, rates)
        every = product(range(study.seeds), study.arms)
        runs = [(name, seed) for seed, name in every if seed < study.fewer.get(name, study.seeds)]
        run_missing(study, root, runs, num_steps=lambda _: study.num_steps, workers=options.workers, run=run_late)
        results = load(root)
        if len(results) == len(runs):
            write_json(stored, {"rates": rates, "tuning": tuning, "runs": list(results.values())})
    print(markdown(arm_rows(study, results, ("before", "after", "quantized", "least ess"))))
    print(markdown(contrast_rows(study, results)))


WORDS = {  # of arms and claims, in tables
    "none again": "no correction, other prompts and draws",
    "none": "no correction",
    "dual clip": "dual clip",
    "decoupled": "decoupled PPO",
    "tis": "TIS",
    "ais": "AIS",
    "tbpo": "weights of TBPO",
    "icepop": "IcePop",
    "placebo": "shuffled TIS",
}


def lag_and_correction(arm: str) -> tuple[str, str]:
    """Of an arm's name, the correction in the words of the page."""
    lag, _, correction = arm.removeprefix("lag ").partition(", ")
    return lag, WORDS[correction or "none"]


def better(claim: str) -> str:
    """A claim in the words of the pages."""
    claim = in_words(claim, {"its placebo": "shuffled TIS"})
    return claim[0].upper() + claim[1:]


def measured(results: Results, arm: str, *columns: str) -> list[str]:
    """Of each column the mean over the arm's runs, with its interval."""
    runs = runs_of(results, arm)
    return [interval([run[column] for run in runs]) for column in columns]


def rates_tried(stored: Mapping[str, Any]) -> dict[str, str]:
    """By arm the rate that was chosen, and in brackets the lowest and the highest one that were tried."""
    tried: dict[str, list[float]] = {}
    for run in stored["tuning"]:
        tried.setdefault(run["arm"].rpartition(" at ")[0], []).append(run["learning_rate"])
    return {arm: f"{rate:g} ({min(tried[arm]):g} to {max(tried[arm]):g})" for arm, rate in stored["rates"].items()}


def rate_rows(stored: Mapping[str, Any]) -> list[dict[str, str]]:
    """By correction its rates at each lag."""
    tried = rates_tried(stored)
    rows: dict[str, dict[str, str]] = {}
    for arm in tried:
        lag, correction = lag_and_correction(arm)
        empty = {"correction": correction} | {f"lag {each}": "-" for each in (0, 1, 2, 4, 8)}
        rows.setdefault(correction, empty)[f"lag {lag}"] = tried[arm]
    return list(rows.values())


def cost_rows(study: Study, results: Results) -> list[dict[str, str]]:
    """By lag what it costs without a correction."""
    rows = []
    for arm, settings in study.arms.items():
        if "," not in arm:
            solved, ess, least = measured(results, arm, "after", "ess", "least ess")
            row = {"lag": lag_and_correction(arm)[0], "learning rate": f"{settings['learning_rate']:g}"}
            cost = counted(paired(results, "lag 0", arm)) if arm != "lag 0" else "-"
            rows.append(row | {"solved": solved, "cost": cost, "mean ESS": ess.partition("±")[0], "lowest ESS": least})
    return rows


def gain_rows(study: Study, results: Results) -> list[dict[str, str]]:
    """By lag and correction what it gains, and what is left of the cost."""
    rows = []
    for arm, settings in study.arms.items():
        if "," in arm:
            lag, correction = lag_and_correction(arm)
            solved, ess, least = measured(results, arm, "after", "ess", "least ess")
            row = {"lag": lag, "correction": correction, "learning rate": f"{settings['learning_rate']:g}"}
            row |= {"solved": solved, "gain": counted(paired(results, arm, f"lag {lag}"))}
            row["cost that is left"] = counted(paired(results, "lag 0", arm))
            rows.append(row | {"mean ESS": ess.partition("±")[0], "lowest ESS": least})
    return sorted(rows, key=lambda row: int(row["lag"]))


def page_tables() -> dict[str, str]:
    stored = read_json(STORED)
    study, results = at_rates(STUDY, stored["rates"]), by_arm(stored["runs"])
    return {
        "rates": markdown(rate_rows(stored)),
        "costs": markdown(cost_rows(study, results)),
        "gains": markdown(gain_rows(study, results)),
        "claims": markdown(verdict_rows(contrast_values(study, results), better)),
    }


if __name__ == "__main__":
    main(STUDY, STORED, __doc__)
