"""Does mismatch as small as a kernel's rounding do harm over hundreds of steps?

VeXact's claim, at our size: rollouts differ from the learner by rounding alone, and nothing corrects it. Rounding to 8
bits a row (int8, weights and inputs, emulated) is the noise, somewhat more than bf16's; two updates a rollout, no dual
clip, which is where heavier mismatch does the most harm. Stated before the runs: it does none. The numbers:
mismatch.md.

    python -m recipes.studies.kernel_noise                 run what is missing, then print the table
"""

from dataclasses import replace
from pathlib import Path

from dllm_rl.quantization.schemes import FakeQuantize
from recipes.studies.mismatch import base
from recipes.studies.paired import Contrast, Study, main

INT8 = FakeQuantize(weight="int8", activation="int8")

study = Study(
    name="kernel_noise",
    base=replace(base, num_iterations=2),
    arms={"unquantized": {}, "int8": {"rollout_quantization": INT8}},
    against={"int8": "unquantized"},
    metrics={"mean abs log-ratio": "rollout_corr/abs_log_ratio_mean", "ESS": "rollout_corr/ess"},
    seeds=5,
    num_steps=300,
    contrasts=(Contrast("rounding to 8 bits harms", "int8", "unquantized"),),
)

if __name__ == "__main__":
    main(study, __doc__, ("after", "quantized"), Path(__file__).with_suffix(".json"))
