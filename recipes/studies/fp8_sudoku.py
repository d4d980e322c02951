"""What FP8 rollouts save and cost on one GPU: 9x9 Sudoku, 85 million weights, three seeds. Claims before the runs.

    bf16        rollouts of the learner's own weights, compiled
    FP8         `Float8Dynamic`, compiled, no corrector
    FP8, AIS    the same with AIS

The AIS paper reports rollouts 1.5 to 2.76 times as fast at the same accuracy. A seed's arms start from one model,
warmed up by supervision. `s` is the run's wall clock. Not run yet.

    python -m recipes.studies.fp8_sudoku              run what is missing, then print the tables
"""

from pathlib import Path

from dllm_rl import AIS
from recipes.studies.paired import Contrast, Study, main
from recipes.sudoku_9x9_gpu import recipe

STORED = Path(__file__).with_suffix(".json")  # every run

study = Study(
    name="fp8-sudoku",
    base=recipe,
    arms={
        "bf16": {"rollout_quantization": None},
        "FP8": {},
        "FP8, AIS": {"corrector": AIS()},
    },
    against={"FP8": "bf16", "FP8, AIS": "bf16"},
    metrics={"ESS": "rollout_corr/ess", "rollout, s": "time/rollout", "step, s": "step_time"},
    seeds=3,
    num_steps=150,
    contrasts=(
        Contrast("FP8 rollouts take less of the clock", "FP8", "bf16", "s"),
        Contrast("FP8 rollouts harm", "FP8", "bf16"),
        Contrast("AIS helps under FP8", "FP8, AIS", "FP8"),
    ),
)

if __name__ == "__main__":
    main(study, __doc__, stored=STORED)
