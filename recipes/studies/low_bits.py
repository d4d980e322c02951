"""Do corrections bring back what four-bit rollouts cost a pretrained diffusion model? Claims before the runs.

SmolLM2-135M, made a masked-diffusion model by recipes/smollm2_diffusion_sft.py, goes on with sums for 48 steps.
Settings are those of recipes/smollm2_diffusion.py with fp32 weights, no KL term and one update a step. Every run starts
from the same checkpoint; a seed is the order of prompts and the draws. The result is the greedy accuracy of the
unquantized learner on all 289 held-out sums; that of the quantized copy is stored too.

    unquantized             the learner's own weights sample
    fp8                     e4m3 weights, no corrector
    int4                    weights of 4 bits in groups of 32, no corrector
    int4, tis               token TIS with its defaults
    int4, ais               AIS with its defaults
    int4, permuted ais      AIS whose weights go to other tokens: what any gain of AIS must exceed
    int4, aligned           the learner's forward uses the rollout's quantized weights, no weights of tokens
    int4, qarl              QaRL: aligned, and TBPO's weights; with one update a step TBPO's band does not act

MORE, which runs after all of these, with claims of its own:

    int4, tbpo              TBPO's weights of sequences, without the aligned forward
    int4, icepop            tokens with a ratio outside 0.5 to 5 are left out
    int4, mis               tokens with a ratio outside 0.5 to 2 are left out
    int4, triage            only unlikely tokens of bad answers get a smaller weight
    int4, tis first half    TIS in steps 0 to 23, nothing afterwards
    int4, tis second half   nothing in steps 0 to 23, TIS afterwards
    int4 row                a harsher grid: one scale per output row, no corrector
    int4 row, tis           the same with TIS

Rates: `unquantized`, `int4`, `int4, tis` and `int4, aligned` try 5e-4, 1e-3 and 2e-3 on seeds 100 and 101, which the
study does not use. fp8 takes the rate of `unquantized`, `int4, qarl` that of `int4, aligned`, `int4 row` that of
`int4`, and the other arms with a corrector that of `int4, tis`.

Known before the runs: recipes/studies/late_pretrained.py, in which int4 without a correction ended at 0.35 and 0.38,
with TIS at 0.49 and 0.48, and unquantized at 0.50, at one rate and 64 completions a step. low_bits_first.json, three
runs of seed 100 with half the prompts a step at 2.5e-4: from 0.429 unquantized ended at 0.388, int4 at 0.422 and TIS at
0.457. low_bits_gradients.py, the gradients of the first step. At the start the copies solve 0.429 (fp8: the same),
0.301 (int4) and 0.187 (int4 row). The claims are the contrasts of `STUDY` and `MORE`.

    python recipes/smollm2_diffusion_sft.py
    python -m recipes.studies.low_bits --tune     the tuning runs, and their table
    python -m recipes.studies.low_bits            run what is missing, low_bits.json, the tables
    python -m recipes.studies.low_bits --more     the same for MORE, low_bits_more.json

A run takes ten minutes of a CPU core. On a GPU give --workers 12.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from dllm_rl import (
    Callback,
    RunControl,
    ais,
    aligned,
    fake_quantize,
    float8_weight_only,
    icepop,
    int4_weight_only,
    mis,
    no_correction,
    qarl,
    tbpo,
    tis,
    triage,
)
from dllm_rl.algorithms.correctors import Corrector, TokenStats, TokenWeights, unit_weights
from dllm_rl.files import read_json, write_json
from dllm_rl.members import configurable
from dllm_rl.monitoring.plots import read_metrics
from recipes.smollm2_diffusion import PlainSums, recipe
from recipes.studies.controls import weights_of_next_tokens
from recipes.studies.late_rollouts import QUIET
from recipes.studies.paired import Contrast, Study, arm_rows, load, main, markdown, result_path, run_missing, run_one

STORED = Path(__file__).with_suffix(".json")  # every run, with the metrics of each step
STORED_MORE = STORED.with_name("low_bits_more.json")
TUNING = STORED.with_name("low_bits_tuning.json")
TUNING_SEEDS = (100, 101)
TUNED = ("unquantized", "int4", "int4, tis", "int4, aligned")
FOLLOWS = {"fp8": "unquantized", "int4, qarl": "int4, aligned", "int4 row": "int4"}  # others: "int4, tis"
RATES = (5e-4, 1e-3, 2e-3)
UNQUANTIZED: dict[str, Any] = {"rollout_quantization": None}
FP8 = {"rollout_quantization": partial(float8_weight_only, dequantized=True)}
INT4 = {"rollout_quantization": int4_weight_only}
INT4_ROW = {"rollout_quantization": partial(fake_quantize, weight="int4")}
HALF = 24  # of 48 steps
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


class HalfTheSteps(Callback):
    """TIS in one half of the steps and weights of 1 in the other: a weight function, and the callback that counts."""

    def __init__(self, *, first: bool) -> None:
        self.first, self.step = first, 0

    def __call__(self, stats: TokenStats) -> TokenWeights:
        return tis().weight_fn(stats) if (self.step < HALF) == self.first else unit_weights(stats)

    def on_start(self, run: RunControl) -> None:
        self.step = run.step

    def on_step(self, run: RunControl, metrics: Mapping[str, float]) -> None:
        self.step = run.step


def tis_half(*, first: bool) -> dict[str, Any]:
    """Return the settings of TIS that acts in the first or in the second half of the steps alone."""
    half = HalfTheSteps(first=first)
    return {"corrector": Corrector(weight_fn=half), "callbacks": [half]}


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
        save_merged=False,
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
MORE_ARMS: dict[str, dict[str, Any]] = {
    "int4, tbpo": INT4 | {"corrector": tbpo()},
    "int4, icepop": INT4 | {"corrector": icepop()},
    "int4, mis": INT4 | {"corrector": mis()},
    "int4, triage": INT4 | {"corrector": triage()},
    "int4, tis first half": INT4 | tis_half(first=True),
    "int4, tis second half": INT4 | tis_half(first=False),
    "int4 row": INT4_ROW,
    "int4 row, tis": INT4_ROW | {"corrector": tis()},
}
MORE = replace(
    STUDY,
    arms=ARMS | MORE_ARMS,
    against=STUDY.against | dict.fromkeys(MORE_ARMS, "int4") | {"int4 row, tis": "int4 row"},
    contrasts=(
        Contrast("TBPO's weights are above no corrector", "int4, tbpo", "int4"),
        Contrast("IcePop is above no corrector", "int4, icepop", "int4"),
        Contrast("MIS is above no corrector", "int4, mis", "int4"),
        Contrast("TRIAGE is above no corrector", "int4, triage", "int4"),
        Contrast("TIS late is above TIS early", "int4, tis second half", "int4, tis first half"),
        Contrast("a harsher grid costs more", "int4", "int4 row"),
        Contrast("TIS is above no corrector on it", "int4 row, tis", "int4 row"),
    ),
)


def run_with_steps(study: Study, root: Path, num_steps: int, name: str, seed: int) -> None:
    """Run one arm, and store the metrics of each step beside its result."""
    run_one(study, root, num_steps, name, seed)
    path = result_path(root, name, seed)
    rows = read_metrics(root / "runs" / path.stem)
    steps = {metric: [round(row[metric], 5) for row in rows if metric in row] for metric in STORED_METRICS}
    rate = study.arms[name]["learning_rate"]
    write_json(path, read_json(path) | {"learning_rate": rate, "steps": {k: v for k, v in steps.items() if v}})


def rated(study: Study, rates: dict[str, float]) -> Study:
    """The study with its arms at their learning rates."""
    return replace(study, arms={name: arm | {"learning_rate": rates[name]} for name, arm in study.arms.items()})


def tune(root: Path) -> None:
    """Run the tuned arms at three rates on the tuning seeds, store the runs and print their table."""
    tuned = {f"{name} at {rate:g}": ARMS[name] | {"learning_rate": rate} for rate in RATES for name in TUNED}
    study = replace(STUDY, arms=tuned, against={}, contrasts=())
    runs = [(arm, seed) for seed, arm in product(TUNING_SEEDS, tuned)]
    run_missing(study, root, runs, num_steps=lambda _: study.num_steps, workers=None, run=run_with_steps)
    results = load(root)
    if len(results) == len(runs):
        write_json(TUNING, list(results.values()))
    print(markdown(arm_rows(study, results, ("before", "after", "quantized"))))


def best_rates(runs: list[dict[str, Any]]) -> dict[str, float]:
    """By arm the rate at which it, or the tuned arm that it follows, ended highest, as a mean of the tuning seeds."""
    ends: dict[str, dict[float, list[float]]] = {name: defaultdict(list) for name in TUNED}
    for run in runs:
        ends[run["arm"].split(" at ")[0]][run["learning_rate"]].append(run["after"])
    best = {name: max(by_rate, key=lambda rate: mean(by_rate[rate])) for name, by_rate in ends.items()}
    names = (*ARMS, *MORE_ARMS)
    return {name: best[name if name in best else FOLLOWS.get(name, "int4, tis")] for name in names}


if __name__ == "__main__":
    if "--tune" in sys.argv:
        tune(Path("runs") / "low-bits-tuning")
    elif not TUNING.exists():
        sys.exit(f"{TUNING.name} is missing; run with --tune first")
    else:
        more = "--more" in sys.argv
        sys.argv = [word for word in sys.argv if word != "--more"]
        study = rated(MORE if more else STUDY, best_rates(read_json(TUNING)))
        columns = ("before", "after", "quantized")
        main(study, __doc__, columns, STORED_MORE if more else STORED, run=run_with_steps)
