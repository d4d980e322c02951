"""Does mismatch harm at the learning rate that suits it? Four formats, four correctors. Claims before the runs.

A smaller learning rate may do what a corrector does. So every arm takes its own best of RATES, and harm is counted from
unquantized rollouts at their own best. 4x4 Sudoku, one update a rollout, 60 steps; all formats round inputs to e4m3.
A rate is chosen by the mean of seeds 100 to 102; the claims are of seeds 10 to 19. "other rounding" is the unquantized
arm in other micro-batches: the same sums in another order, and so the design's own noise.

Trials of three seeds hardly tell two rates apart. So unquantized rollouts and every format without a corrector also ran
at EQUAL rates on seeds 10 to 19; this was added after the runs, and nothing is claimed of it.

    python -m recipes.studies.rates                   run what is missing, then print the tables
    python -m recipes.studies.rates --report          the tables of rates.json
"""

import argparse
import os
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from dllm_rl import AIS, TIS, Aligned, NoCorrection
from dllm_rl.files import read_json, write_json
from dllm_rl.quantization.schemes import FakeQuantize
from recipes.studies import mismatch
from recipes.studies.paired import (
    Contrast,
    Results,
    Study,
    arm_rows,
    by_arm,
    contrast_rows,
    interval,
    load,
    markdown,
    paired,
    run_missing,
    share,
)

STORED = Path(__file__).with_suffix(".json")  # every run
RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3)
EQUAL = (2.5e-4, 5e-4)
TUNED_ON, TESTED_ON = range(100, 103), range(10, 20)
TIS_RATE = 2.5e-4  # of five levels. AIS's trials chose half of it, by 0.003: AIS ran at this one after the claims
FORMATS = {"FP8": "e4m3", "int4": "int4", "int3": "int3", "five levels": "five_level"}
CORRECTORS = {"none": NoCorrection(), "TIS": TIS(), "AIS": AIS(), "aligned": Aligned()}
OTHER = "unquantized, other rounding"


ARMS: dict[str, dict[str, Any]] = {"unquantized": {}, OTHER: {"micro_batch_size": 32}} | {
    f"{name}: {corrector}": {
        "rollout_quantization": FakeQuantize(weight=weight, activation="e4m3"),
        "corrector": made,
    }
    for (name, weight), (corrector, made) in product(FORMATS.items(), CORRECTORS.items())
}
study = Study(
    name="rates",
    base=mismatch.base,
    arms=ARMS,
    against={OTHER: "unquantized"}
    | {f"{name}: none": "unquantized" for name in FORMATS}
    | {f"{name}: {corrector}": f"{name}: none" for name in FORMATS for corrector in ("TIS", "AIS", "aligned")},
    metrics=mismatch.study.metrics,
    seeds=10,
    num_steps=60,
    contrasts=(
        *(Contrast(f"{name} harms", f"{name}: none", "unquantized") for name in FORMATS),
        *(Contrast(f"token TIS helps under {name}", f"{name}: TIS", f"{name}: none") for name in FORMATS),
        Contrast("AIS does better than TIS under five levels", "five levels: AIS", "five levels: TIS"),
        Contrast(
            "aligned helps the quantized net of five levels", "five levels: aligned", "five levels: none", "quantized"
        ),
    ),
)


def at(arm: str, rate: float) -> str:
    return f"{arm} at {rate:g}"


trials = replace(
    study,
    arms={
        at(arm, rate): changes | {"learning_rate": rate}
        for (arm, changes), rate in product(study.arms.items(), RATES)
        if arm != OTHER
    },
    against={},
    contrasts=(),
)


def best(tuning: Results) -> dict[str, float]:
    """By arm: the rate with the best mean over the trials' seeds."""
    means = {name: mean(tuning[name, seed]["after"] for seed in TUNED_ON) for name in trials.arms}
    found = {arm: max(RATES, key=lambda rate: means[at(arm, rate)]) for arm in ARMS if arm != OTHER}
    return found | {OTHER: found["unquantized"]}


def at_equal_rates(results: Results, more: Results, rates: dict[str, float]) -> list[dict[str, str]]:
    """By format: what it costs without a corrector at each of EQUAL; `more`: the runs that `results` lacks."""
    runs = {(at(arm, rates[arm]), seed): run for (arm, seed), run in results.items()} | dict(more)
    rows = []
    for name in FORMATS:
        row = {"minus unquantized at the same rate, 95 %": name}
        for rate in EQUAL:
            apart = paired(runs, at(f"{name}: none", rate), at("unquantized", rate))
            row[f"{rate:g}"] = interval(apart)
        rows.append(row)
    return rows


def rows_of(results: Results) -> list[dict[str, str]]:
    """By format: the accuracy under each corrector, and what part of the harm it undoes."""
    rows = []
    for name in FORMATS:
        row = {"held-out rate, 95 %": name}
        for corrector in CORRECTORS:
            arm = f"{name}: {corrector}"
            row[corrector] = interval([run["after"] for (other, _), run in results.items() if other == arm])
        for corrector in list(CORRECTORS)[1:]:
            part = share(results, f"{name}: {corrector}", f"{name}: none", "unquantized")
            row[f"share, {corrector}"] = part
        rows.append(row)
    return rows


def told(results: Results, more: Results, rates: dict[str, float]) -> str:
    """The tables, as the document holds them."""
    claims = markdown(contrast_rows(study, results), ("stated before the runs", "difference, 95 %", "Holm's p"))
    return f"{markdown(rows_of(results))}\n{claims}\n{markdown(at_equal_rates(results, more, rates))}"


def go_on(root: Path, workers: int) -> None:
    """Run what is missing, and write every run."""
    trial_root = root / "tuning"
    run = partial(run_missing, num_steps=lambda _: study.num_steps, workers=workers)
    run(trials, trial_root, product(trials.arms, TUNED_ON))
    tuning = load(trial_root)
    rates = best(tuning)
    arms = {arm: changes | {"learning_rate": rates[arm]} for arm, changes in ARMS.items()}
    run(replace(study, arms=arms), root, [(arm, seed) for seed, arm in product(TESTED_ON, arms)])
    results = load(root)
    plain = ("unquantized", *(f"{name}: none" for name in FORMATS))
    other = [at(arm, rate) for arm, rate in product(plain, EQUAL) if rate != rates[arm]]
    other += [at(f"five levels: {corrector}", TIS_RATE) for corrector in ("AIS", "TIS")]
    run(trials, root / "equal", product(other, TESTED_ON))
    more = load(root / "equal")
    parts = {"tuning": tuning, "runs": results, "equal": more}
    write_json(STORED, {name: list(part.values()) for name, part in parts.items()})


def page_tables() -> dict[str, str]:
    tuning, results, more = (by_arm(read_json(STORED)[part]) for part in ("tuning", "runs", "equal"))
    return {"arms, claims, equal rates": told(results, more, best(tuning))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / study.name)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true", help=f"run nothing: the tables of {STORED.name}")
    options = parser.parse_args()
    if not options.report:
        go_on(options.output_dir, options.workers)
    stored = read_json(STORED)
    tuning, results, more = (by_arm(stored[part]) for part in ("tuning", "runs", "equal"))
    rates = best(tuning)
    print(markdown(arm_rows(study, results, ("after", "quantized"))), rates, told(results, more, rates), sep="\n")


if __name__ == "__main__":
    main()
