"""The engines study's question for a pretrained causal model: SmolLM2-135M's sums, whose rollouts llama.cpp computes.

No warm-up, adapters of rank 16, no KL term, 12 steps of 4 prompts x 8 completions: the rising part of the recipe's 30.
A seed draws the prompts, the adapters and the completions. The contrasts were written before the runs. Needs
`.[llamacpp]`.

    python -m recipes.studies.engines_ar              run what is missing, then print the tables
"""

import sys
from dataclasses import replace
from pathlib import Path

from dllm_rl.algorithms.correctors import TIS, NoCorrection
from recipes import weights
from recipes.smollm2_arithmetic import recipe
from recipes.studies import mismatch_ar
from recipes.studies.engines import arm
from recipes.studies.paired import Contrast, Study, main

STORED = Path(__file__).with_suffix(".json")  # every run

study = Study(
    name="engines_ar",
    base=replace(recipe, rollout_quantization=None, corrector=NoCorrection(), beta=0.0),
    arms={
        "unquantized": {},
        "Q8_0": arm("Q8_0"),
        "Q4_0": arm("Q4_0"),
        "Q4_0 TIS": arm("Q4_0", TIS()),
    },
    against={"Q8_0": "unquantized", "Q4_0": "unquantized", "Q4_0 TIS": "unquantized"},
    metrics=mismatch_ar.study.metrics,
    seeds=5,
    num_steps=12,
    contrasts=(
        Contrast("blocks of 8 bits harm", "Q8_0", "unquantized"),
        Contrast("blocks of 4 bits harm", "Q4_0", "unquantized"),
        Contrast("token TIS helps under 4 bits", "Q4_0 TIS", "Q4_0"),
    ),
    metric="accuracy",
)

if __name__ == "__main__":
    if "--report" not in sys.argv:
        weights.smollm2()  # before the workers, which would all write its folder
    main(study, __doc__, ("after", "quantized"), STORED)
