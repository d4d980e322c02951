"""How much of the cost of a lag of 2 was its low learning rate? An addition to late_rollouts.py. Claim first.

There the tuning on two seeds gave the lag of 2 a rate of 1.25e-4, a quarter of that of lag 0. Here it runs at 2.5e-4
too, beside both arms of that study; all three are run again, because the warmed-up models of another CPU differ in
their last bits. The claims are the contrasts of `STUDY`. Ten seeds were planned; three were left out to save
time, which was decided before the results were looked at. Known before the runs: the results at 1.25e-4, and on the
tuning's seeds 100 and 101 those at 2.5e-4.

    python -m recipes.studies.lag_two               run, lag_two.json, the tables
    python -m recipes.studies.lag_two --report      run nothing
"""

import argparse
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

from dllm_rl.files import read_json, write_json
from recipes.studies import late_rollouts
from recipes.studies.paired import (
    Contrast,
    Results,
    by_arm,
    contrast_rows,
    contrast_values,
    counted,
    load,
    markdown,
    paired,
    run_missing,
    verdict_rows,
)

STORED = Path(__file__).with_suffix(".json")
RATES = {"lag 0": 5e-4, "lag 2": 1.25e-4, "lag 2 at 2.5e-4": 2.5e-4}
STUDY = replace(
    late_rollouts.STUDY,
    name="lag-two",
    seeds=7,
    arms={arm: late_rollouts.arm(int(arm[4]), "none") | {"learning_rate": rate} for arm, rate in RATES.items()},
    against={arm: "lag 0" for arm in RATES if arm != "lag 0"},
    fewer={},
    contrasts=(
        Contrast("a lag of 2 costs something at 2.5e-4", "lag 0", "lag 2 at 2.5e-4"),
        Contrast("2.5e-4 is above 1.25e-4", "lag 2 at 2.5e-4", "lag 2"),
    ),
)


def cost_rows(results: Results) -> list[dict[str, str]]:
    """By lag and rate what the lag costs."""
    rows = []
    for arm, rate in RATES.items():
        (solved,) = late_rollouts.measured(results, arm, "after")
        cost = counted(paired(results, "lag 0", arm)) if arm != "lag 0" else "-"
        rows.append({"lag": arm[4], "learning rate": f"{rate:g}", "solved": solved, "cost": cost})
    return rows


def page_tables() -> dict[str, str]:
    results = by_arm(read_json(STORED))
    claims = verdict_rows(contrast_values(STUDY, results), late_rollouts.better)
    return {"costs": markdown(cost_rows(results)), "claims": markdown(claims)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / STUDY.name)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of lag_two.json")
    options = parser.parse_args()
    if options.report:
        results = by_arm(read_json(STORED))
    else:
        runs = [(arm, seed) for seed, arm in product(range(STUDY.seeds), STUDY.arms)]
        run_missing(
            STUDY,
            options.output_dir,
            runs,
            num_steps=lambda _: STUDY.num_steps,
            workers=options.workers,
            run=late_rollouts.run_late,
        )
        results = load(options.output_dir)
        if len(results) == len(runs):
            write_json(STORED, list(results.values()))
    print(markdown(cost_rows(results)))
    print(markdown(contrast_rows(STUDY, results)))


if __name__ == "__main__":
    main()
