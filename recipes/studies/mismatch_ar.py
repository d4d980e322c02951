"""The mismatch study's question for an autoregressive model, where no order can disagree: rollouts of five levels.

One update a rollout, 16 prompts of 8 completions. Stated before the runs: such rollouts harm, and token TIS helps. The
numbers: mismatch_reading.md.

    python -m recipes.studies.mismatch_ar                  run what is missing, then print the tables
"""

from dataclasses import replace

from dllm_rl.algorithms.correctors import none, tis
from dllm_rl.quantization.schemes import five_level_emulated
from recipes.studies.paired import Contrast, Study, main
from recipes.sudoku_tiny_ar import recipe

study = Study(
    name="mismatch_ar",
    base=replace(recipe, train_batch_size=16, rollout_quantization=None, corrector=none()),
    arms={
        "unquantised": {},
        "none": {"rollout_quantization": five_level_emulated},
        "TIS": {"rollout_quantization": five_level_emulated, "corrector": tis()},
    },
    against={"none": "unquantised", "TIS": "none"},
    metrics={"mean abs log-ratio": "rollout_corr/abs_log_ratio_mean", "ESS": "rollout_corr/ess"},
    seeds=5,
    num_steps=180,
    contrasts=(
        Contrast("rollouts of five levels harm", "none", "unquantised"),
        Contrast("token TIS helps", "TIS", "none"),
    ),
)

if __name__ == "__main__":
    main(study, __doc__, ("after", "quantised"))
