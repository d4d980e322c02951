"""Do the weights of TIS bring its gain in random order (int4_orders.py)? Two controls; claims before the runs.

In int4_orders.py TIS ended 0.040±0.024 above no corrector in random order, both at a rate of 1e-3, which was tuned for
each. Here, with the settings, the warmed-up models and the seeds of that study:

    random: int4, permuted tis      TIS whose weights go to other tokens, at TIS's rate
    random: int4 at half the rate   no corrector, half of its rate: does TIS only tame a step that is too large?

The claims, two-sided, by flipping the signs of ten seeds, Holm's correction over both:

1. TIS is above its permuted weights;
2. TIS is above half the rate.

Known before the runs: int4_orders.json, and low_bits_tuned.json, in which both hold for a pretrained model.

    python -m recipes.studies.quantized.int4_orders_controls            run what the JSON lacks, write it, the tables
    python -m recipes.studies.quantized.int4_orders_controls --report   run nothing
"""

import argparse
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

from dllm_rl import TIS
from dllm_rl.files import read_json, write_json
from recipes.studies.controls import Permuted
from recipes.studies.late.late_rollouts import at_rates
from recipes.studies.paired import (
    Results,
    Study,
    by_arm,
    load,
    markdown,
    paired,
    restore_runs,
    run_missing,
    verdict_rows,
)
from recipes.studies.quantized import int4_orders

STORED = Path(__file__).with_suffix(".json")  # every run
NONE, GAINS = "random: int4", "random: int4, tis"  # arms of int4_orders.py
PERMUTED, HALF = "random: int4, permuted tis", "random: int4 at half the rate"
STUDY = replace(
    int4_orders.STUDY,
    name="int4-orders-controls",
    arms={
        PERMUTED: int4_orders.STUDY.arms[GAINS] | {"corrector": Permuted(corrector=TIS())},
        HALF: int4_orders.STUDY.arms[NONE],
    },
    against={PERMUTED: NONE, HALF: NONE},
)


def rates() -> dict[str, float]:
    """By arm, from the rates that int4_orders.py chose."""
    chosen = read_json(int4_orders.STORED)["rates"]
    return {PERMUTED: chosen[GAINS], HALF: chosen[NONE] / 2}


def rated() -> Study:
    return at_rates(STUDY, rates())


def claims(results: Results) -> dict[str, list[float]]:
    """By claim the number of each seed that is above 0 where it holds, from the runs of both studies."""
    return {
        "TIS is above its permuted weights": paired(results, GAINS, PERMUTED),
        "TIS is above half the rate": paired(results, GAINS, HALF),
    }


CLAIMS = {
    "TIS is above its permuted weights": "random order: TIS is better than shuffled TIS",
    "TIS is above half the rate": "random order: TIS is better than no correction at half the learning rate",
}


def page_tables() -> dict[str, str]:
    results = by_arm([*read_json(STORED), *read_json(int4_orders.STORED)["runs"]])
    return {
        "arms": int4_orders.arms_table(STUDY, results, rates()),
        "claims": markdown(verdict_rows(claims(results), CLAIMS.__getitem__)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / STUDY.name)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true", help=f"run nothing: the tables of {STORED.name}")
    options = parser.parse_args()
    root = options.output_dir
    pairs = [(arm, seed) for seed, arm in product(range(STUDY.seeds), STUDY.arms)]
    kept = read_json(STORED) if STORED.exists() else []
    if not options.report:
        restore_runs(kept, root)
        run_missing(rated(), root, pairs, num_steps=lambda _: STUDY.num_steps, workers=options.workers)
        kept = list(load(root).values())
        write_json(STORED, kept)
    if missing := len(pairs) - len(kept):
        raise SystemExit(f"{missing} of {len(pairs)} runs are missing: no claim is read before the last; see {root}")
    print("\n".join(page_tables().values()))


if __name__ == "__main__":
    main()
