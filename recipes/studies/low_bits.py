"""Do corrections bring back what four-bit rollouts cost a pretrained diffusion model? Claims before the runs.

SmolLM2-135M, made a masked-diffusion model by recipes/smollm2_diffusion_sft.py, goes on with sums for 48 steps.
Settings are those of recipes/smollm2_diffusion.py with fp32 weights, no KL term and one update a step; a run takes ten
minutes of a core. Every run starts from the same checkpoint; a seed is the order of prompts and the draws. The result
is the greedy accuracy of the unquantized learner on all 289 held-out sums; that of the quantized copy is stored too.

    unquantized             the learner's own weights sample
    fp8                     e4m3 weights, no corrector
    int4                    weights of 4 bits in groups of 32, no corrector
    int4, tis               token TIS with its defaults
    int4, ais               AIS with its defaults
    int4, permuted ais      AIS whose weights go to other tokens: what any gain of AIS must exceed
    int4, aligned           the learner's forward uses the rollout's quantized weights, no weights of tokens
    int4, qarl              QaRL: aligned, and TBPO's weights; with one update a step TBPO's band does not act

Rates: `unquantized`, `int4` and `int4, tis` try 5e-4, 1e-3 and 2e-3 on seed 100, which the study does not use. fp8
takes the rate of `unquantized`; the other arms with a corrector take that of `int4, tis`.

Known before the runs: recipes/studies/late_pretrained.py, in which int4 without a correction ended at 0.35 and 0.38,
with TIS at 0.49 and 0.48, and unquantized at 0.50, at one rate and 64 completions a step. And low_bits_first.json,
three runs of seed 100 with half the prompts a step at 2.5e-4: from 0.429 unquantized ended at 0.388, int4 at 0.422 and
TIS at 0.457. So little is learned there that batches are whole again and rates higher. The claims are the contrasts of
`STUDY`. None of its runs is done yet; low_bits_gradients.py has the gradients of the first step.

    python recipes/smollm2_diffusion_sft.py
    python -m recipes.studies.low_bits --tune     the runs of seed 100, and their table
    python -m recipes.studies.low_bits            run what is missing, low_bits.json, the tables
"""

import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from dllm_rl import ais, aligned, float8_weight_only, int4_weight_only, no_correction, qarl, tis
from dllm_rl.algorithms.correctors import Corrector
from dllm_rl.files import read_json, write_json
from dllm_rl.members import configurable
from dllm_rl.monitoring.plots import read_metrics
from recipes.smollm2_diffusion import PlainSums, recipe
from recipes.studies.controls import weights_of_next_tokens
from recipes.studies.late_rollouts import QUIET
from recipes.studies.paired import Contrast, Study, arm_rows, load, main, markdown, result_path, run_missing, run_one

STORED = Path(__file__).with_suffix(".json")  # every run, with the metrics of each step
TUNING = Path(__file__).with_name("low_bits_tuning.json")  # the runs of seed 100
TUNING_SEED = 100
TUNED = ("int4", "int4, tis", "unquantized")
RATES = (5e-4, 1e-3, 2e-3)
UNQUANTIZED: dict[str, Any] = {"rollout_quantization": None}
FP8 = {"rollout_quantization": partial(float8_weight_only, dequantized=True)}
INT4 = {"rollout_quantization": int4_weight_only}
STORED_METRICS = (
    "reward",
    "rewards/accuracy/mean",
    "rollout_corr/ess",
    "rollout_corr/abs_log_ratio_mean",
    "rollout_corr/abs_log_ratio_p99/step_0",
    "rollout_corr/abs_log_ratio_p99/step_1",
    "ais/lambda",
    "tis/capped_fraction",
    "tbpo/capped_fraction",
    "grad_norm",
)


@configurable
def permuted_ais() -> Corrector:
    """Make the control of AIS: the same weights, which have nothing to do with their tokens."""
    return Corrector(weight_fn=partial(weights_of_next_tokens, weight_fn=ais().weight_fn))


ARMS: dict[str, dict[str, Any]] = {
    "unquantized": UNQUANTIZED,
    "fp8": FP8,
    "int4": INT4,
    "int4, tis": INT4 | {"corrector": tis()},
    "int4, ais": INT4 | {"corrector": ais()},
    "int4, permuted ais": INT4 | {"corrector": permuted_ais()},
    "int4, aligned": INT4 | {"corrector": aligned()},
    "int4, qarl": INT4 | {"corrector": qarl()},
}
STUDY = Study(
    name="low-bits",
    base=replace(
        recipe,
        **QUIET,
        eval_task=PlainSums(held_out=True, size=289),
        eval_batch_size=145,
        beta=0.0,
        corrector=no_correction(),
    ),
    arms=ARMS,
    against={name: "int4" if "," in name else "unquantized" for name in ARMS if name != "unquantized"},
    metrics={"ess": "rollout_corr/ess", "mean abs log ratio": "rollout_corr/abs_log_ratio_mean", "reward": "reward"},
    seeds=10,
    num_steps=48,
    contrasts=(
        Contrast("int4 costs something", "unquantized", "int4"),
        Contrast("fp8 costs something", "unquantized", "fp8"),
        Contrast("TIS is above no corrector", "int4, tis", "int4"),
        Contrast("AIS is above no corrector", "int4, ais", "int4"),
        Contrast("AIS is above its permuted weights", "int4, ais", "int4, permuted ais"),
        Contrast("the aligned forward is above no corrector", "int4, aligned", "int4"),
        Contrast("QaRL is above no corrector", "int4, qarl", "int4"),
        Contrast("sampled by the quantized copy, QaRL is above no corrector", "int4, qarl", "int4", "quantized"),
        Contrast("what TIS does not bring back is something", "unquantized", "int4, tis"),
    ),
    metric="accuracy",
)


def run_with_steps(study: Study, root: Path, num_steps: int, name: str, seed: int) -> None:
    """Run one arm, and store the metrics of each step beside its result."""
    run_one(study, root, num_steps, name, seed)
    path = result_path(root, name, seed)
    rows = read_metrics(root / "runs" / path.stem)
    steps = {metric: [round(row[metric], 5) for row in rows if metric in row] for metric in STORED_METRICS}
    rate = study.arms[name]["learning_rate"]
    write_json(path, read_json(path) | {"learning_rate": rate, "steps": {k: v for k, v in steps.items() if v}})


def tune(root: Path) -> None:
    """Run three arms at three rates on the tuning seed, store the runs and print their table."""
    tuned = {f"{name} at {rate:g}": ARMS[name] | {"learning_rate": rate} for rate in RATES for name in TUNED}
    study = replace(STUDY, arms=tuned, against={}, contrasts=())
    runs = list(product(tuned, [TUNING_SEED]))
    run_missing(study, root, runs, num_steps=lambda _: study.num_steps, workers=None, run=run_with_steps)
    results = load(root)
    if len(results) == len(runs):
        write_json(TUNING, list(results.values()))
    print(markdown(arm_rows(study, results, ("before", "after", "quantized"))))


def best_rates(runs: list[dict[str, Any]]) -> dict[str, float]:
    """By arm the rate at which its tuned arm, or the one that it follows, ended highest on the tuning seed."""
    best = {}
    for tuned in TUNED:
        tried = [run for run in runs if run["arm"].split(" at ")[0] == tuned]
        best[tuned] = max(tried, key=lambda run: run["after"])["learning_rate"]
    follows = {"fp8": "unquantized"}
    return {name: best[name if name in best else follows.get(name, "int4, tis")] for name in ARMS}


if __name__ == "__main__":
    if "--tune" in sys.argv:
        tune(Path("runs") / "low-bits-tuning")
    elif not TUNING.exists():
        sys.exit(f"{TUNING.name} is missing; run with --tune first")
    else:
        rates = best_rates(read_json(TUNING))
        rated = replace(STUDY, arms={name: ARMS[name] | {"learning_rate": rates[name]} for name in ARMS})
        main(rated, __doc__, ("before", "after", "quantized"), STORED, run=run_with_steps)
