"""Real FP8 where it moves a pretrained model: SmolLM2-135M's sums, five seeds. Claims stated before the runs.

Weights in FP8 (`float8_weight_only`), 12 steps of 4 prompts x 8 completions, adapters of rank 16, no KL term: as
engines_ar.py, whose arms are llama.cpp's formats. Not run yet: `python -m benchmarks.gpu --queue` runs it.

    python -m recipes.studies.fp8_sums                run what is missing, then print the tables
"""

from dataclasses import replace
from pathlib import Path

from dllm_rl import ais, aligned, none, tis
from dllm_rl.files import write_json
from recipes import weights
from recipes.smollm2_arithmetic import recipe
from recipes.studies import mismatch_ar
from recipes.studies.paired import Contrast, Study, main

STORED = Path(__file__).with_suffix(".json")  # every run

study = Study(
    name="fp8-sums",
    base=replace(recipe, corrector=none(), beta=0.0),
    arms={
        "unquantised": {"rollout_quantization": None},
        "none": {},
        "TIS": {"corrector": tis()},
        "AIS": {"corrector": ais()},
        "aligned": {"corrector": aligned()},
    },
    against=dict.fromkeys(("none", "TIS", "AIS", "aligned"), "unquantised"),
    metrics=mismatch_ar.study.metrics,
    seeds=5,
    num_steps=12,
    contrasts=(
        Contrast("FP8 weights harm", "none", "unquantised"),
        Contrast("token TIS helps", "TIS", "none"),
        Contrast("AIS helps", "AIS", "none"),
        Contrast("an aligned forward helps", "aligned", "none"),
    ),
    metric="accuracy",
)

if __name__ == "__main__":
    weights.smollm2()  # before the workers, which would all write its folder
    write_json(STORED, list(main(study, __doc__, ("after", "quantised")).values()))
