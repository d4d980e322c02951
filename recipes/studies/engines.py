"""What rollouts by another engine cost: llama.cpp's kernels, its formats, and what correctors bring back.

Every arm trains its seed's one warmed-up model of LLaDA's layout on 4x4 Sudoku, 16 prompts of 8 completions, 150 steps.
Its rollouts come from torch and the learner's own weights ("unquantized"), or from llama.cpp with the blocks' matrices
in a format; evaluations of the rollout's net ("quantized") are by llama.cpp too. F32 less unquantized is the kernels'
doing, a format less F32 the format's. The contrasts below were written before the runs. Needs `.[llamacpp]`.

    python -m recipes.studies.engines                 run what is missing, then print the tables
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dllm_rl.algorithms import correctors as c
from recipes.engines.llama_cpp import LlamaCpp
from recipes.studies import mismatch
from recipes.studies.paired import Contrast, Study, main
from recipes.sudoku_tiny_llada import recipe

STORED = Path(__file__).with_suffix(".json")  # every run

base = replace(
    recipe, train_batch_size=16, max_retained_graphs=2, rollout_quantization=None, corrector=c.NoCorrection()
)


def arm(format: Any, corrector: c.Corrector | None = None) -> dict[str, Any]:
    return {"rollout_engine": LlamaCpp(format=format, threads=1), "corrector": corrector or c.NoCorrection()}


ARMS: dict[str, dict[str, Any]] = {
    "unquantized": {},
    "F32": arm("F32"),
    "F16": arm("F16"),
    "Q8_0": arm("Q8_0"),
    "Q8_0 TIS": arm("Q8_0", c.TIS()),
    "Q8_0 AIS": arm("Q8_0", c.AIS()),
    "Q4_0": arm("Q4_0"),
    "Q4_0 TIS": arm("Q4_0", c.TIS()),
    "Q4_0 AIS": arm("Q4_0", c.AIS()),
}
CONTRASTS = (
    Contrast("another engine's kernels harm", "F32", "unquantized"),
    Contrast("blocks of 8 bits harm", "Q8_0", "F32"),
    Contrast("blocks of 4 bits harm", "Q4_0", "F32"),
    Contrast("token TIS helps under 8 bits", "Q8_0 TIS", "Q8_0"),
    Contrast("token TIS helps under 4 bits", "Q4_0 TIS", "Q4_0"),
    Contrast("AIS does better than TIS under 4 bits", "Q4_0 AIS", "Q4_0 TIS"),
)
study = Study(
    name="engines",
    base=base,
    arms=ARMS,
    against={arm: "unquantized" for arm in ARMS if arm != "unquantized"},
    metrics=mismatch.study.metrics,
    seeds=10,
    num_steps=150,  # 60 raise this model's solve rate by 0.03 only: no harm would show
    contrasts=CONTRASTS,
)

if __name__ == "__main__":
    main(study, __doc__, ("after", "quantized"), STORED)
