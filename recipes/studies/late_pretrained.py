"""A pretrained model under FP8 and under a lag: SmolLM2-135M, made a diffusion model, for its 48 steps of sums.

The study of late rollouts (late_rollouts.py) is of a small model made here. This one asks two things of the only
pretrained diffusion model that there is without a model hub. Does the effective sample size (ESS) go on falling when
RL goes on, as it did in the first steps of a look at it (0.997 to 0.974)? And does harm follow, of FP8 alone, or of
rollouts that are four updates old?

    FP8                  rollouts of FP8 weights, no corrector, no lag
    lag 4                the same with rollouts of weights that are four updates old
    lag 4, tis           TIS with its defaults
    lag 4, dual clip     ratios against the rollout itself, which PPO's clip bounds from both sides: the default of
                         recipes/async_sudoku.py
    int4, int4, tis      weights of 4 bits in groups of 32, no lag; two seeds
    lag 4, slow          the lag, without a correction, at a quarter of the learning rate; one seed
    unquantized          one seed

All settings are those of recipes/smollm2_diffusion.py, but for weights in bf16 and no KL term, which halve the time.
The learning rate is its 5e-4 in every other arm: none was tuned, as a run takes six minutes of a core. Three seeds, all
from the checkpoint of recipes/smollm2_diffusion_sft.py; 100 held-out sums.

Predicted before the runs: under FP8 the ESS of the last 12 steps is lower than that of the first 12, and stays above
0.9; the lag costs something; each of its two corrections is above none. Three seeds cannot show these by an exact test
(the least p is 0.25), so intervals are given and no p. Known before the runs: three steps of FP8, to time them. Changed
after seed 0 of the first four arms and of int4, in which the lag alone had ended at an accuracy of 0 and int4 below its
start: int4 got a second seed and TIS beside it, the slow arm was added, and the seeds, planned as four, became three.

    python recipes/smollm2_diffusion_sft.py && python -m recipes.studies.late_pretrained
"""

from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from dllm_rl import TIS, Int4WeightOnly, NoCorrection, PPOClip
from dllm_rl.files import read_json
from recipes.smollm2_diffusion import recipe
from recipes.studies.late_rollouts import METRICS, QUIET, run_late
from recipes.studies.paired import Results, Study, by_arm, interval, main, markdown, paired, runs_of

STORED = Path(__file__).with_suffix(".json")  # every run, with the ESS of each step
LATE = {"rollout_workers": 1, "max_staleness": 4}
INT4 = {"rollout_quantization": Int4WeightOnly()}
RATE = {"learning_rate": recipe.learning_rate}
STUDY = Study(
    name="late-pretrained",
    base=replace(recipe, **QUIET, dtype="bfloat16", beta=0.0, corrector=NoCorrection()),
    arms={
        "FP8": RATE,
        "lag 4": RATE | LATE,
        "lag 4, tis": RATE | LATE | {"corrector": TIS()},
        "lag 4, dual clip": RATE | LATE | {"old_logprobs": "rollout", "loss": PPOClip(delta=1.2)},
        "lag 4, slow": LATE | {"learning_rate": recipe.learning_rate / 4},
        "int4": RATE | INT4,
        "int4, tis": RATE | INT4 | {"corrector": TIS()},
        "unquantized": RATE | {"rollout_quantization": None},
    },
    against={
        "lag 4": "FP8",
        "lag 4, tis": "lag 4",
        "lag 4, dual clip": "lag 4",
        "lag 4, slow": "lag 4",
        "int4": "FP8",
        "int4, tis": "int4",
        "unquantized": "FP8",
    },
    metrics=METRICS,
    seeds=3,
    num_steps=48,
    fewer={"lag 4, slow": 1, "int4": 2, "int4, tis": 2, "unquantized": 1},
    metric="accuracy",
)


def quarters(results: Results) -> list[dict[str, str]]:
    """By arm the mean ESS of the steps 1 to 12, 13 to 24, 25 to 36 and 37 to 48, with intervals over the seeds."""
    rows = []
    for arm in STUDY.arms:
        found: list[Any] = [each["ess of steps"] for (name, _), each in sorted(results.items()) if name == arm]
        if found:
            row = {"arm": arm}
            for first in range(0, STUDY.num_steps, 12):
                row[f"steps {first + 1} to {first + 12}"] = interval([mean(run[first : first + 12]) for run in found])
            rows.append(row)
    return rows


WORDS = {  # by arm: rollouts, lag, correction
    "FP8": ("FP8", "0", "no correction"),
    "lag 4": ("FP8", "4", "no correction"),
    "lag 4, tis": ("FP8", "4", "TIS"),
    "lag 4, dual clip": ("FP8", "4", "dual clip"),
    "lag 4, slow": ("FP8", "4", "no correction, learning rate / 4"),
    "int4": ("INT4", "0", "no correction"),
    "int4, tis": ("INT4", "0", "TIS"),
    "unquantized": ("own", "0", "no correction"),
}


def named(arm: str) -> dict[str, str]:
    return dict(zip(("rollouts", "lag", "correction"), WORDS[arm], strict=True))


def solved_rows(results: Results) -> list[dict[str, str]]:
    """By arm what each seed solves, and the mean difference over the seeds that both arms have."""
    rows = []
    for arm in STUDY.arms:
        runs = runs_of(results, arm)
        row = named(arm) | {"each seed": ", ".join(f"{run['after']:.2f}" for run in runs)}
        row["mean"] = interval([run["after"] for run in runs])
        row["compared with"] = row["difference"] = "-"
        if against := STUDY.against.get(arm):
            rollouts, lag, correction = WORDS[against]
            row["compared with"] = f"{rollouts}, lag {lag}, {correction}"
            row["difference"] = interval(paired(results, arm, against))
        rows.append(row)
    return rows


def ess_rows(results: Results) -> list[dict[str, str]]:
    """By arm the ESS in four parts of the run, over all of it, and of its lowest step."""
    rows = []
    for arm, parts in zip(STUDY.arms, quarters(results), strict=True):
        runs = runs_of(results, arm)
        row = named(arm) | {head: cell for head, cell in parts.items() if head != "arm"}
        rows.append(row | {"lowest step": interval([run["least ess"] for run in runs])})
    return rows


def page_tables() -> dict[str, str]:
    results = by_arm(read_json(STORED))
    return {"solved": markdown(solved_rows(results)), "ess": markdown(ess_rows(results))}


if __name__ == "__main__":
    found = main(STUDY, __doc__, ("before", "after", "quantized", "least ess"), STORED, run=run_late)
    print(markdown(quarters(found)))
