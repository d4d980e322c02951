"""Do corrections bring back what four-bit rollouts cost a pretrained diffusion model? Claims before the runs.

SmolLM2-135M, made a masked-diffusion model by recipes/smollm2_diffusion_sft.py, goes on with sums for 48 steps.
Settings are those of recipes/smollm2_diffusion.py, its rate of 5e-4 too, with no KL term and one update a step. Every
run starts from the same checkpoint; a seed is the order of prompts and the draws. The result is the greedy accuracy of
the unquantized learner on all 289 held-out sums; that of the quantized copy is stored too.

    int4                  weights of 4 bits in groups of 32, no corrector
    int4, tis             token TIS with its defaults
    int4, permuted tis    TIS whose weights go to other tokens: what any gain of TIS must exceed

Known before the runs: late_pretrained.py, the same in bf16 on 100 sums, in which int4 ended at 0.35 and 0.38 (start
0.44), with TIS at 0.49 and 0.48, unquantized at 0.50 and FP8 at 0.53, 0.54 and 0.61. low_bits_first.json, three runs of
seed 100 with half the prompts a step at 2.5e-4: from 0.429 unquantized ended at 0.388, int4 at 0.422 and TIS at 0.457.
low_bits_gradients.py, the gradients of the first step. A plan of sixteen arms with tuned rates did not fit: a run takes
twelve minutes of a core. It was cut before any of them ran, to the arms above and to `unquantized` after these.

The claims are the contrasts of `STUDY`. Seeds were run in their order until the time was over, planned as at most six;
which ones are in the tables depends on nothing else. `unquantized`, with the claim that int4 costs something, did not
finish: only late_pretrained.py measures what int4 costs at this rate.

    python recipes/smollm2_diffusion_sft.py
    python -m recipes.studies.quantized.low_bits            run what is missing, low_bits.json, the tables, low_bits.png
"""

from pathlib import Path
from statistics import mean
from typing import Any

from dllm_rl import TIS, Int4WeightOnly, NoCorrection
from dllm_rl.files import read_json
from dllm_rl.monitoring.plots import read_metrics
from recipes.smollm2_diffusion import PlainSums, recipe
from recipes.studies.controls import Permuted
from recipes.studies.late.late_rollouts import QUIET
from recipes.studies.paired import (
    Contrast,
    Results,
    Study,
    by_arm,
    contrast_values,
    counted,
    in_words,
    interval,
    keep,
    line,
    main,
    markdown,
    paired,
    result_path,
    runs_of,
    train_one,
    verdict_rows,
)

STORED = Path(__file__).with_suffix(".json")  # every run, with the metrics of each step
INT4 = {"rollout_quantization": Int4WeightOnly()}
STORED_METRICS = (
    "reward",
    "rewards/accuracy/mean",
    "rollout_corr/ess",
    "rollout_corr/abs_log_ratio_mean",
    "rollout_corr/abs_log_ratio_p99/step_0",
    "rollout_corr/abs_log_ratio_p99/step_1",
    "tis/capped_fraction",
    "grad_norm",
)


ARMS: dict[str, dict[str, Any]] = {
    "int4": INT4,
    "int4, tis": INT4 | {"corrector": TIS()},
    "int4, permuted tis": INT4 | {"corrector": Permuted(corrector=TIS())},
}
STUDY = Study(
    name="low-bits",
    base=recipe.replace(
        **QUIET | {"evaluation": {"steps": 0, "batch_size": 145}},
        eval_task=PlainSums(held_out=True, size=289),
        beta=0.0,
        corrector=NoCorrection(),
    ),
    arms=ARMS,
    against={name: "int4" for name in ARMS if name != "int4"},
    metrics={"ess": "rollout_corr/ess", "mean abs log ratio": "rollout_corr/abs_log_ratio_mean", "reward": "reward"},
    seeds=6,
    num_steps=48,
    contrasts=(
        Contrast("TIS is above no corrector", "int4, tis", "int4"),
        Contrast("TIS is above its permuted weights", "int4, tis", "int4, permuted tis"),
    ),
    metric="accuracy",
)


def run_with_steps(study: Study, root: Path, num_steps: int, name: str, seed: int) -> None:
    """Run one arm, and store the metrics of each step beside its result."""
    kept, _ = train_one(study, root, num_steps, name, seed)
    keep(root, kept | {"steps": steps_of(root, name, seed)})


def steps_of(root: Path, name: str, seed: int) -> dict[str, list[float]]:
    """The metrics of each step of a run, by name."""
    rows = read_metrics(root / "runs" / result_path(root, name, seed).stem)
    steps = {metric: [round(row[metric], 5) for row in rows if metric in row] for metric in STORED_METRICS}
    return {metric: values for metric, values in steps.items() if values}


WORDS = {  # by arm, in tables and pictures
    "learner's own completions": "own rollouts",
    "unquantized": "own rollouts",
    "FP8": "FP8, no correction",
    "int4": "INT4, no correction",
    "int4, tis": "INT4, TIS",
    "int4, ais": "INT4, AIS",
    "int4, aligned": "INT4, aligned forward",
    "int4, permuted tis": "INT4, shuffled TIS",
    "int4, permuted ais": "INT4, shuffled AIS",
    "int4 at half the rate": "INT4, half the learning rate",
}


def said(claim: str) -> str:
    """A claim in the words of the page."""
    changes = {
        "the aligned forward's INT4 weights are above those of no corrector": (
            "The INT4 copy is better with the aligned forward than with no correction"
        ),
        "above half the rate": "above no correction at half the learning rate",
        "its permuted weights": "shuffled TIS",
    }
    return in_words(claim, changes)


def picture(results: Results, path: Path, study: Study = STUDY, copy: str = "its INT4 copy") -> None:
    """By arm the accuracy of the learner and of the copy that sampled: a dot a seed, the mean and its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(study.arms)
    size = (9.0, 1.0 + 0.3 * len(arms))
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharex=True, sharey=True)
    titles = {"after": "learner (dotted: where RL began)", "quantized": copy}
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for place, arm in enumerate(arms):
            line(axis, -place, [run[column] for run in runs_of(results, arm)], "#1f77b4")
        axis.set_yticks([-place for place in range(len(arms))], [WORDS[arm] for arm in arms])
        axis.set_ylim(0.6 - len(arms), 0.6)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel(f"sums solved greedily after {study.num_steps} steps, share")
        axis.grid(axis="x", alpha=0.3)
    axes[0].axvline(mean(run["before"] for run in runs_of(results, "int4")), color="grey", linewidth=0.8, linestyle=":")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def solved_rows(results: Results) -> list[dict[str, str]]:
    """By arm what the learner and its copy solve, and what they gain over no correction."""
    rows = []
    for arm in ARMS:
        runs = runs_of(results, arm)
        row = {"trained on": WORDS[arm]}
        for head, column in {"learner": "after", "INT4 copy": "quantized"}.items():
            row[head] = interval([run[column] for run in runs])
            row[f"gain of the {head}"] = counted(paired(results, arm, "int4", column)) if arm != "int4" else "-"
        rows.append(row | {"reward": interval([run["reward"] for run in runs])})
        rows[-1]["ESS"] = f"{mean(run['ess'] for run in runs):.3f}"
    return rows


def page_tables() -> dict[str, str]:
    results = by_arm(read_json(STORED))
    claims = verdict_rows(contrast_values(STUDY, results), said)
    return {"arms": markdown(solved_rows(results)), "claims": markdown(claims)}


if __name__ == "__main__":
    main(STUDY, __doc__, ("before", "after", "quantized"), STORED, run=run_with_steps, draw=picture)
