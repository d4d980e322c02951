"""Real FP8 where it moves a pretrained model: SmolLM2-135M's sums, ten seeds. Claims stated before the runs.

Weights in FP8 (`Float8WeightOnly`), 12 steps of 4 prompts x 8 completions, adapters of rank 16, no KL term: as
engines_ar.py, whose arms are llama.cpp's formats. The seeds were five, and TBPO was no arm, until seed 0 of
unquantized, none, TIS and AIS had run. `half`: the same at half the learning rate.

    python -m recipes.studies.fp8_sums full           run what is missing, then print the tables
    python -m recipes.studies.fp8_sums half
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dllm_rl import AIS, TBPO, TIS, Aligned
from dllm_rl.files import read_json
from recipes import weights
from recipes.smollm2_arithmetic import recipe
from recipes.studies import engines_ar
from recipes.studies.paired import Contrast, Results, arm_rows, by_arm, contrast_rows, main, markdown, which

STORED = {rate: Path(__file__).with_name(f"fp8_sums_{rate}.json") for rate in ("full", "half")}  # every run
CORRECTORS = {"TIS": TIS(), "AIS": AIS(), "TBPO": TBPO(), "aligned": Aligned()}

study = replace(
    engines_ar.study,
    name="fp8-sums",
    base=replace(engines_ar.study.base, rollout_quantization=recipe.rollout_quantization),
    arms={"unquantized": {"rollout_quantization": None}, "none": {}}
    | {name: {"corrector": corrector} for name, corrector in CORRECTORS.items()},
    against=dict.fromkeys(("none", *CORRECTORS), "unquantized"),
    seeds=10,
    contrasts=(
        Contrast("FP8 weights harm", "none", "unquantized"),
        Contrast("token TIS helps", "TIS", "none"),
        Contrast("AIS helps", "AIS", "none"),
        Contrast("TBPO helps", "TBPO", "none"),
        Contrast("an aligned forward helps", "aligned", "none"),
    ),
)

half = replace(study.base, learning_rate=study.base.learning_rate / 2)
STUDIES = {"full": study, "half": replace(study, name="fp8-sums-half", base=half)}


def told(by_rate: Mapping[str, Results]) -> str:
    """The tables of both rates, as the document holds them."""
    arms: dict[str, dict[str, str]] = {}
    claims: dict[str, dict[str, str]] = {}
    for rate, results in by_rate.items():
        for row in arm_rows(study, results):
            cells = {f"{rate} rate": row["after"], f"ESS, {rate}": row["ESS"]}
            arms.setdefault(row["arm"], {"arm": row["arm"]}).update(cells)
        for row in contrast_rows(study, results):
            claim = row["stated before the runs"]
            cells = {f"{rate} rate": row["difference, 95 %"], f"Holm's p, {rate}": row["Holm's p"]}
            claims.setdefault(claim, {"stated before the runs": claim}).update(cells)
    return f"{markdown(list(arms.values()))}\n{markdown(list(claims.values()))}"


def page_tables() -> dict[str, str]:
    return {"arms and claims": told({rate: by_arm(read_json(path)) for rate, path in STORED.items()})}


if __name__ == "__main__":
    rate = which(STUDIES)
    if "--report" not in sys.argv:
        weights.smollm2()  # before the workers, which would all write its folder
    main(STUDIES[rate], __doc__, ("after", "quantized"), STORED[rate])
