"""Real FP8 where it moves a pretrained model: SmolLM2-135M's sums, five seeds. Claims stated before the runs.

Weights in FP8 (`float8_weight_only`), 12 steps of 4 prompts x 8 completions, adapters of rank 16, no KL term: as
engines_ar.py, whose arms are llama.cpp's formats. Not run yet: `python -m benchmarks.gpu --queue` runs it.

    python -m recipes.studies.fp8_sums                run what is missing, then print the tables
"""

from dataclasses import replace
from pathlib import Path

from dllm_rl import ais, aligned, tis
from dllm_rl.files import write_json
from recipes import weights
from recipes.smollm2_arithmetic import recipe
from recipes.studies import engines_ar
from recipes.studies.paired import Contrast, main

STORED = Path(__file__).with_suffix(".json")  # every run
CORRECTORS = {"TIS": tis(), "AIS": ais(), "aligned": aligned()}

study = replace(
    engines_ar.study,
    name="fp8-sums",
    base=replace(engines_ar.study.base, rollout_quantization=recipe.rollout_quantization),
    arms={"unquantised": {"rollout_quantization": None}, "none": {}}
    | {name: {"corrector": corrector} for name, corrector in CORRECTORS.items()},
    against=dict.fromkeys(("none", *CORRECTORS), "unquantised"),
    contrasts=(
        Contrast("FP8 weights harm", "none", "unquantised"),
        Contrast("token TIS helps", "TIS", "none"),
        Contrast("AIS helps", "AIS", "none"),
        Contrast("an aligned forward helps", "aligned", "none"),
    ),
)

if __name__ == "__main__":
    weights.smollm2()  # before the workers, which would all write its folder
    write_json(STORED, list(main(study, __doc__, ("after", "quantised")).values()))
