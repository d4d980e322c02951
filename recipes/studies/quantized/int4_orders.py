"""Does training with INT4 rollouts and TIS lose less in random order than in `MaxProb` order? Claims before the runs.

order_flips.py says that TIS leaves less bias of the gradient in random order. Here 4x4 Sudoku (sudoku_unique.py) is
trained in both orders: 180 steps of one update, 16 cells in four steps, each scored, with unquantized rollouts, with
INT4 (`Int4WeightOnly`, groups of 32), and with INT4 and TIS. Every arm has its own rate by late_rollouts.py's rule,
tried on seeds 100 and 101 and validation puzzles; then ten paired seeds (0 to 9) start from one warmed-up model each,
and are evaluated on 400 test puzzles, greedily and, whatever the training's order, in `MaxProb` order.

The claims, two-sided, by flipping the signs of ten seeds, Holm's correction over all:

1. in random order, less what it is in `MaxProb` order: INT4 with TIS less unquantized;
2. under `MaxProb`: unquantized is above INT4;
3. under `MaxProb`: TIS is above no corrector;
4. in random order: TIS is above no corrector.

Known before the runs: order_flips.json; and mismatch.md, in which emulated INT4 with inputs in FP8 ended 0.040±0.039
below unquantized rollouts at one rate, and with five levels and TIS random order ended no higher (-0.01±0.05).

    python -m recipes.studies.quantized.int4_orders            tune, run what the JSON lacks, write it, the tables
    python -m recipes.studies.quantized.int4_orders --report   run nothing
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from dllm_rl import TIS, Int4WeightOnly, MaxProb, NoCorrection, RandomOrder
from dllm_rl.files import read_json, write_json
from recipes.studies.late.late_rollouts import QUIET, at_rates, tune
from recipes.studies.paired import (
    Results,
    Study,
    arm_rows,
    by_arm,
    interval,
    load,
    markdown,
    paired,
    restore_runs,
    run_missing,
    run_one,
    verdict_rows,
)
from recipes.sudoku_unique import recipe

STORED = Path(__file__).with_suffix(".json")  # the tuning, the rates, and every run
ORDERS = {"max_prob": MaxProb(), "random": RandomOrder()}
INT4 = {"rollout_quantization": Int4WeightOnly()}
ROLLOUTS: dict[str, dict[str, Any]] = {
    "unquantized": {"rollout_quantization": None},
    "int4": INT4,
    "int4, tis": INT4 | {"corrector": TIS()},
}
IN_FOUR = {"diffusion_steps": 4}
STUDY = Study(
    name="int4-orders",
    base=recipe.replace(**QUIET, eval_sampler=recipe.eval_sampler.replace(**IN_FOUR), corrector=NoCorrection()),
    arms={
        f"{order}: {name}": {"sampler": recipe.sampler.replace(**IN_FOUR, rank=ORDERS[order])} | rollouts
        for order, (name, rollouts) in product(ORDERS, ROLLOUTS.items())
    },
    against={
        f"{order}: {name}": f"{order}: unquantized" for order in ORDERS for name in ROLLOUTS if name != "unquantized"
    },
    metrics={"ess": "rollout_corr/ess", "reward": "reward"},
    seeds=10,
    num_steps=180,
)


def claims(results: Results) -> Mapping[str, list[float]]:
    """By claim the number of each seed that is above 0 where it holds."""

    def apart(order: str, arm: str, against: str) -> list[float]:
        return paired(results, f"{order}: {arm}", f"{order}: {against}")

    lost = {order: apart(order, "int4, tis", "unquantized") for order in ORDERS}
    return {
        "INT4 with TIS loses less in random order": [
            random - max_prob for random, max_prob in zip(lost["random"], lost["max_prob"], strict=True)
        ],
        "MaxProb: unquantized is above INT4": apart("max_prob", "unquantized", "int4"),
        "MaxProb: TIS is above no corrector": apart("max_prob", "int4, tis", "int4"),
        "random order: TIS is above no corrector": apart("random", "int4, tis", "int4"),
    }


ORDER_NAMES = {"max_prob": "`MaxProb`", "random": "random order"}  # in tables
ROLLOUT_NAMES = {
    "unquantized": "own rollouts",
    "int4": "INT4, no correction",
    "int4, tis": "INT4, TIS",
    "int4, permuted tis": "INT4, shuffled TIS",
    "int4 at half the rate": "INT4, no correction, half the learning rate",
}
CLAIMS = {
    "INT4 with TIS loses less in random order": "INT4 with TIS costs less in random order than under `MaxProb`",
    "MaxProb: unquantized is above INT4": "`MaxProb`: own rollouts are better than INT4 without a correction",
    "MaxProb: TIS is above no corrector": "`MaxProb`: TIS is better than no correction",
    "random order: TIS is above no corrector": "random order: TIS is better than no correction",
}


def arms_table(study: Study, results: Results, rates: Mapping[str, float]) -> str:
    """What each arm solves, and what that is beside own rollouts and beside no correction of the same order."""

    def apart(arm: str, against: str) -> str:
        return interval(paired(results, arm, against))

    rows = []
    for row in arm_rows(study, results):
        order, rollouts = (arm := row["arm"]).split(": ")
        own, plain = f"{order}: unquantized", f"{order}: int4"
        rows.append({"trained on": f"{ORDER_NAMES[order]}, {ROLLOUT_NAMES[rollouts]}"})
        rows[-1] |= {"learning rate": f"{rates[arm]:.0e}".replace("e-0", "e-"), "solved": row["after"]}
        rows[-1]["cost"] = "-" if arm == own else apart(own, arm)
        rows[-1]["gain"] = "-" if arm in (own, plain) else apart(arm, plain)
        rows[-1]["ESS"] = row["ess"]
    return markdown(rows)


def page_tables() -> dict[str, str]:
    kept = read_json(STORED)
    results = by_arm(kept["runs"])
    return {
        "arms": arms_table(STUDY, results, kept["rates"]),
        "claims": markdown(verdict_rows(claims(results), CLAIMS.__getitem__)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / STUDY.name)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true", help=f"run nothing: the tables of {STORED.name}")
    options = parser.parse_args()
    root, workers = options.output_dir, options.workers
    pairs = [(arm, seed) for seed, arm in product(range(STUDY.seeds), STUDY.arms)]
    kept = read_json(STORED) if STORED.exists() else {"runs": [], "tuning": []}
    if not options.report:
        restore_runs(kept["tuning"], root / "tuning")
        restore_runs(kept["runs"], root)
        trials = replace(STUDY, base=replace(STUDY.base, eval_task=STUDY.base.validation_task))
        rates, tuning = tune(trials, root / "tuning", workers, run_one)
        rated = at_rates(STUDY, rates)
        run_missing(rated, root, pairs, num_steps=lambda _: STUDY.num_steps, workers=workers)
        kept = {"rates": rates, "tuning": tuning, "runs": list(load(root).values())}
        write_json(STORED, kept)
    if missing := len(pairs) - len(kept["runs"]):
        raise SystemExit(f"{missing} of {len(pairs)} runs are missing: no claim is read before the last; see {root}")
    print("\n".join(page_tables().values()))


if __name__ == "__main__":
    main()
