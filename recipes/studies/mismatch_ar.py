"""The mismatch study's question for an autoregressive model, where no order can disagree: rollouts of five levels.

One update a rollout, 16 prompts of 8 completions, half the recipe's learning rate, at which so small a batch learns
(seed 0 unquantized, 180 steps: 0.39 of the held-out puzzles; 0.30 at the recipe's own, 0.03 at twice that). Stated
before the runs: such rollouts harm, and token TIS helps. The numbers: mismatch.md.

    python -m recipes.studies.mismatch_ar                  run what is missing, then print the tables
"""

from dataclasses import replace
from pathlib import Path

from dllm_rl.algorithms.correctors import TIS, NoCorrection
from dllm_rl.files import read_json
from dllm_rl.quantization.schemes import FakeQuantize
from recipes.studies.mismatch import DIFFERENCE, two_digits
from recipes.studies.paired import Contrast, Study, main, markdown
from recipes.sudoku_tiny_ar import recipe

STORED = Path(__file__).with_suffix(".json")  # the tables
FIVE_LEVELS = FakeQuantize(weight="five_level", activation="e4m3")

study = Study(
    name="mismatch_ar",
    base=replace(
        recipe, train_batch_size=16, learning_rate=2.5e-4, rollout_quantization=None, corrector=NoCorrection()
    ),
    arms={
        "unquantized": {},
        "none": {"rollout_quantization": FIVE_LEVELS},
        "TIS": {"rollout_quantization": FIVE_LEVELS, "corrector": TIS()},
    },
    against={"none": "unquantized", "TIS": "none"},
    metrics={"mean abs log-ratio": "rollout_corr/abs_log_ratio_mean", "ESS": "rollout_corr/ess"},
    seeds=10,
    num_steps=180,
    contrasts=(
        Contrast("rollouts of five levels harm", "none", "unquantized"),
        Contrast("token TIS helps", "TIS", "none"),
    ),
)


def page_tables() -> dict[str, str]:
    stored, rows = read_json(STORED), []
    p_values = {row["arm"]: row["Holm's p"] for row in stored["contrasts"]}
    for row in stored["arms"]:
        apart = f"{two_digits(row[DIFFERENCE])} to {row['less']}" if row["arm"] in p_values else "-"
        cells = {"arm": row["arm"], "after": two_digits(row["after"]), DIFFERENCE: apart}
        cells |= {"Holm's p": p_values.get(row["arm"], "-")}
        rows.append(cells | {column: two_digits(row[column]) for column in ("mean abs log-ratio", "ESS")})
    return {"arms": markdown(rows)}


if __name__ == "__main__":
    main(study, __doc__, ("after", "quantized"), STORED)
