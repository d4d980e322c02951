"""Rollouts of a mixture of experts, with and without router replay, under FP8 and under three bits.

All arms train the same warmed-up mixture (one per seed) on 4x4 Sudoku; held-out puzzles are filled in greedily by the
unquantized model. Stated before the runs: that replay (R3) raises the solve rate under three bits. What the numbers
say: experts.md.

    python -m recipes.studies.experts                      run what is missing, then write experts.json, print the table
    python -m recipes.studies.experts --num_steps 60 --seeds 2
"""

from pathlib import Path

from dllm_rl import AIS
from dllm_rl.quantization.schemes import FakeQuantize, Float8WeightOnly
from recipes.studies.paired import Study, main
from recipes.sudoku_tiny_moe import recipe

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

if __name__ == "__main__":
    main(study, __doc__, stored=Path(__file__).with_suffix(".json"))
