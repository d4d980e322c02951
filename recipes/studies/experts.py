"""Rollouts of a mixture of experts, with and without router replay, under FP8 and under three bits.

All arms train the same warmed-up mixture (one per seed) on 4x4 Sudoku; held-out puzzles are filled in greedily by the
unquantized model. Stated before the runs: that replay (R3) raises the solve rate under three bits. What the numbers
say: experts.md.

    python -m recipes.studies.experts                      run what is missing, then write experts.json, print the table
    python -m recipes.studies.experts --num_steps 60 --seeds 2
"""

from pathlib import Path
from statistics import mean

from dllm_rl import AIS
from dllm_rl.files import read_json
from dllm_rl.quantization.schemes import FakeQuantize, Float8WeightOnly
from recipes.studies.paired import Study, arm_rows, by_arm, main, markdown
from recipes.sudoku_tiny_moe import recipe

STORED = Path(__file__).with_suffix(".json")  # every run
INT3 = FakeQuantize(weight="int3", activation="e4m3")

study = Study(
    name="experts",
    base=recipe.replace(corrector=AIS()),
    arms={
        "FP8": {"rollout_quantization": Float8WeightOnly()},
        "FP8, R3": {"rollout_quantization": Float8WeightOnly(), "router_replay": "R3"},
        "int3": {"rollout_quantization": INT3},
        "int3, R3": {"rollout_quantization": INT3, "router_replay": "R3"},
    },
    against={"FP8, R3": "FP8", "int3, R3": "int3"},
    metrics={"mean |log ratio|": "rollout_corr/abs_log_ratio_mean", "same experts": "routing/agreement"},
    seeds=3,
    num_steps=180,
)


def page_tables() -> dict[str, str]:
    results, rows = by_arm(read_json(STORED)), []
    for row in arm_rows(study, results):
        rates = [results[row["arm"], seed]["after"] for seed in range(study.seeds)]
        seeds = {"seeds 0, 1, 2": ", ".join(f"{rate:.3f}" for rate in rates), "mean": f"{mean(rates):.3f}"}
        rows.append({"rollout": row["arm"]} | seeds | {"less no replay, 95 %": row["difference, 95 %"]})
    return {"arms": markdown(rows)}


if __name__ == "__main__":
    main(study, __doc__, stored=STORED)
