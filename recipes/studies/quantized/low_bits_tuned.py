"""What do four-bit rollouts cost a pretrained diffusion model, and what brings it back? Claims before the runs.

The model, the task and the settings are those of low_bits.py: SmolLM2-135M, made a masked-diffusion model, goes on with
sums for 48 steps, in fp32, with one update a step and no KL term. There six seeds at one rate, which nobody had tuned,
had no unquantized arm. Here every arm has its own rate:

    unquantized           the learner's own weights sample
    FP8                   weights in e4m3
    int4                  weights of 4 bits in groups of 32, no corrector
    int4, tis             token TIS with its defaults
    int4, ais             AIS with its defaults
    int4, aligned         the learner computes with the weights of 4 bits, too
    int4, permuted tis    TIS whose weights go to other tokens: what any gain of TIS must exceed
    int4 at half the rate half of the rate of `int4`: does TIS only tame a step that is too large?

Rates: the rule of late_rollouts.py for every arm but the last. On seed 100 an arm tries 2.5e-4, 5e-4 and 1e-3, and
further by factors of two while the best is at an edge; on seed 101 the best of these and the better one of its
neighbors. The higher mean of the two seeds wins. Trials are evaluated on `SpareSums`, which neither training nor the
study's evaluation has.

Evaluated at the end on all 289 held-out sums: the learner, greedily (`after`) and at temperature 1 in random order, as
rollouts are drawn (`sampled`); the rollouts' weights, made from the learner, likewise (`quantized`, `quantized,
sampled`); and, for every arm, INT4 weights made from the learner (`int4 weights`).

The claims are the contrasts of `STUDY`, two-sided, with Holm's correction over all of them. Predicted without a test:
the 95 % interval of unquantized less FP8 lies within 0.05 of 0. Known before the runs: low_bits.json (seeds 0 to 5 of
`int4`, `int4, tis` and `int4, permuted tis` at 5e-4: 0.400, 0.505 and 0.360), low_bits_first.json and
late_pretrained.json. So the seeds are fresh, from 10 on.

All arms of a seed run on one machine, from one checkpoint: a seed that was begun on another (`here`: processor,
versions, the checkpoint's weights) waits until that one is back, and the next seed is taken. The study is the first ten
seeds that have all arms. Tuning trials count wherever they ran: they choose a rate, and are not compared otherwise.
What order the runs have depends on no result: all trials, then seed by seed all arms.

    python recipes/smollm2_diffusion_sft.py
    python -m recipes.studies.quantized.low_bits_tuned           go on: run what neither --output_dir nor --stored has
    python -m recipes.studies.quantized.low_bits_tuned --report  no run: --output_dir goes to --stored; tables, picture
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from dllm_rl import AIS, TIS, Aligned, Float8WeightOnly, Int4WeightOnly, Policy
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.files import read_json, write_json
from dllm_rl.manifest import digest
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.tasks import Problem
from recipes.smollm2_arithmetic import pairs
from recipes.smollm2_diffusion import recipe
from recipes.smollm2_diffusion_sft import PlainSums
from recipes.studies.controls import Permuted
from recipes.studies.late.late_rollouts import at_rates, measured, rates_tried, tune
from recipes.studies.paired import (
    Contrast,
    Results,
    Study,
    arm_rows,
    by_arm,
    capability,
    contrast_rows,
    contrast_values,
    counted,
    keep,
    load,
    markdown,
    paired,
    result_path,
    run_missing,
    train_one,
    verdict_rows,
)
from recipes.studies.quantized import low_bits
from recipes.studies.quantized.low_bits import INT4, WORDS, said, steps_of

STORED = Path(__file__).with_suffix(".json")  # {"rates", "tuning", "runs"}: every finished run
SEEDS, FIRST_SEED = 10, 10
HALF = "int4 at half the rate"
TUNED: dict[str, dict[str, Any]] = {
    "unquantized": {"rollout_quantization": None},
    "FP8": {"rollout_quantization": Float8WeightOnly(dequantized=True)},
    "int4": INT4,
    "int4, tis": INT4 | {"corrector": TIS()},
    "int4, ais": INT4 | {"corrector": AIS()},
    "int4, aligned": INT4 | {"corrector": Aligned()},
    "int4, permuted tis": INT4 | {"corrector": Permuted(corrector=TIS())},
}
COLUMNS = ("after", "sampled", "quantized", "quantized, sampled", "int4 weights")
STUDY = replace(
    low_bits.STUDY,
    name="low-bits-tuned",
    base=low_bits.STUDY.base.replace(saves={"steps": 12}),  # where a stopped run goes on
    arms=TUNED | {HALF: INT4},
    against={"FP8": "unquantized", "int4": "unquantized"}
    | {arm: "int4" for arm in (*TUNED, HALF) if arm.startswith("int4") and arm != "int4"},
    seeds=SEEDS,
    contrasts=(
        Contrast("INT4 costs something", "unquantized", "int4"),
        Contrast("TIS is above no corrector", "int4, tis", "int4"),
        Contrast("TIS is above its permuted weights", "int4, tis", "int4, permuted tis"),
        Contrast("TIS is above half the rate", "int4, tis", HALF),
        Contrast("AIS is above no corrector", "int4, ais", "int4"),
        Contrast(
            "the aligned forward's INT4 weights are above those of no corrector", "int4, aligned", "int4", "quantized"
        ),
    ),
)


@dataclass(frozen=True)
class SpareSums(PlainSums):
    """Sums of the side that is trained on, behind the `size` that training takes: seen in no training."""

    def __len__(self) -> int:
        return len(pairs(self.held_out)) - self.size

    def __getitem__(self, index: int) -> Problem:
        return PlainSums(self.held_out, len(pairs(self.held_out)))[self.size + index]


TUNING = replace(
    STUDY, base=replace(STUDY.base, eval_task=SpareSums(held_out=False, size=1200)), arms=TUNED, contrasts=()
)


def here() -> dict[str, str]:
    """What bits depend on: the processor, versions, and the weights of the checkpoint that all runs start from."""
    lines = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in lines}
    (weights,) = Path(str(recipe.model)).glob("*.safetensors")
    return {
        "cpu": f"{cpu['model name']}, family {cpu['cpu family']}, model {cpu['model']}, {capability()}",
        "torch": version("torch"),
        "torchao": version("torchao"),
        "start": digest(weights),
    }


def evaluated(policy: Policy, study: Study, name: str, seed: int) -> dict[str, float]:
    """The learner, and weights quantized from it, on the study's sums."""

    def rate(policy: Policy, sampler: Any) -> float:
        policy.module.eval()
        base = study.base
        found = evaluate(policy, base.eval_task, sampler, seed=seed, batch_size=base.evaluation_batch_size).means
        return found[study.metric]

    greedy, drawn = study.base.eval_sampler, study.base.sampler
    found = {"sampled": rate(policy, drawn)}
    if scheme := study.arms[name]["rollout_quantization"]:
        found["quantized, sampled"] = rate(quantized_copy(policy, scheme), drawn)
    else:
        found["quantized, sampled"] = found["sampled"]
    return found | {"int4 weights": rate(quantized_copy(policy, Int4WeightOnly()), greedy)}


def run_evaluated(study: Study, root: Path, num_steps: int, name: str, seed: int) -> None:
    """Train one arm of a seed, and evaluate it; leaves `root`/results/....json."""
    kept, policy = train_one(study, root, num_steps, name, seed)
    kept |= {"learning_rate": study.arms[name]["learning_rate"], "machine": here()}
    if policy is None:
        kept |= dict.fromkeys(COLUMNS, 0.0)
    elif study.base.eval_task == STUDY.base.eval_task:  # not in trials
        kept |= evaluated(policy, study, name, seed)
    keep(root, kept | {"steps": steps_of(root, name, seed)})


def whole(results: Results) -> Results:
    """The runs of the first ten seeds that have all arms."""
    seeds = sorted({seed for _, seed in results})
    seeds = [seed for seed in seeds if all((arm, seed) in results for arm in STUDY.arms)][:SEEDS]
    return {(arm, seed): run for (arm, seed), run in results.items() if seed in seeds}


def rated(rates: Mapping[str, float]) -> Study:
    """The study with its arms at the rates that tuning chose."""
    return at_rates(STUDY, {**rates, HALF: rates["int4"] / 2})


def go_on(root: Path, workers: int) -> None:
    """Run what is missing, `workers` at a time."""
    rates, _ = tune(TUNING, root / "tuning", workers, run_evaluated)
    write_json(root / "rates.json", rates)
    study, machine = rated(rates), here()
    for seed in count(FIRST_SEED):
        results = load(root)
        begun = [run for (_, other), run in results.items() if other == seed]
        if any(run["machine"] != machine for run in begun):
            continue
        if len(whole(results)) == SEEDS * len(study.arms):
            return
        run_missing(
            study,
            root,
            [(arm, seed) for arm in study.arms],
            num_steps=lambda _: study.num_steps,
            workers=workers,
            run=run_evaluated,
        )
        if any((arm, seed) not in load(root) for arm in study.arms):
            raise SystemExit(f"a run of seed {seed} failed; see {root / 'logs'}")


def tables(stored: Mapping[str, Any]) -> str:
    """The arms at their rates, and the claims, over the seeds that have all arms."""
    results, rates = whole(by_arm(stored["runs"])), rated(stored["rates"]).arms
    arms = [row | {"rate": f"{rates[row['arm']]['learning_rate']:g}"} for row in arm_rows(STUDY, results, COLUMNS)]
    heads = ("arm", "rate", *COLUMNS, "difference, 95 %")
    claims = ("stated before the runs", "difference, 95 %", "above 0", "Holm's p")
    return f"{markdown(arms, heads)}\n{markdown(contrast_rows(STUDY, results), claims)}"


def picture(stored: Mapping[str, Any], path: Path) -> None:
    low_bits.picture(whole(by_arm(stored["runs"])), path, STUDY, "the copy that wrote its rollouts")


COMPARED = {  # in words: an arm less another one
    "cost of FP8: own rollouts minus FP8": ("unquantized", "FP8"),
    "cost of INT4: own rollouts minus no correction": ("unquantized", "int4"),
    "FP8 minus INT4, both without a correction": ("FP8", "int4"),
    "FP8 without a correction minus INT4 with TIS": ("FP8", "int4, tis"),
    "INT4: TIS minus no correction": ("int4, tis", "int4"),
    "INT4: AIS minus no correction": ("int4, ais", "int4"),
    "INT4: aligned forward minus no correction": ("int4, aligned", "int4"),
    "INT4: TIS minus shuffled TIS": ("int4, tis", "int4, permuted tis"),
    "INT4: TIS minus half the learning rate": ("int4, tis", HALF),
    "INT4: the cost that TIS leaves, own rollouts minus TIS": ("unquantized", "int4, tis"),
}


def solved_rows(results: Results, rates: Mapping[str, str]) -> list[dict[str, str]]:
    """By arm what the learner solves, and the ESS and the reward of its rollouts."""
    rows = []
    for arm in STUDY.arms:
        solved, sampled, ess, reward = measured(results, arm, "after", "sampled", "ess", "reward")
        row = {"trained on": WORDS[arm], "learning rate": rates[arm], "greedy": solved, "temperature 1": sampled}
        rows.append(row | {"ESS": ess.partition("±")[0], "reward of its rollouts": reward})
    return rows


def difference_rows(results: Results) -> list[dict[str, str]]:
    heads = {"greedy": "after", "temperature 1": "sampled"}
    return [
        {"difference": words} | {head: counted(paired(results, *arms, column)) for head, column in heads.items()}
        for words, arms in COMPARED.items()
    ]


def copy_rows(results: Results) -> list[dict[str, str]]:
    """By arm what an INT4 copy of the trained learner solves, and what that is above no correction."""
    rows = []
    for arm in STUDY.arms:
        (solved,) = measured(results, arm, "int4 weights")
        row = {"trained on": WORDS[arm], "INT4 copy, greedy": solved}
        row["minus no correction"] = counted(paired(results, arm, "int4", "int4 weights")) if arm != "int4" else "-"
        is_int4 = arm.startswith("int4")
        row["INT4 copy, temperature 1"] = measured(results, arm, "quantized, sampled")[0] if is_int4 else "-"
        rows.append(row)
    return rows


def page_tables() -> dict[str, str]:
    stored = read_json(STORED)
    results, rates = whole(by_arm(stored["runs"])), rates_tried(stored)
    rates[HALF] = f"{stored['rates']['int4'] / 2:g} (not tuned)"
    return {
        "learners": markdown(solved_rows(results, rates)),
        "differences": markdown(difference_rows(results)),
        "copies": markdown(copy_rows(results)),
        "claims": markdown(verdict_rows(contrast_values(STUDY, results), said)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / STUDY.name)
    parser.add_argument("--stored", type=Path, default=STORED, help="the finished runs; --report alone writes it")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, of one thread and 5 GiB each")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    root, parts = options.output_dir, {"tuning": options.output_dir / "tuning", "runs": options.output_dir}
    stored = read_json(options.stored) if options.stored.exists() else {"rates": None, "tuning": [], "runs": []}
    if not options.report:
        for part, folder in parts.items():
            for run in stored[part]:
                if not result_path(folder, run["arm"], run["seed"]).exists():
                    keep(folder, run)
        go_on(root, options.workers)
        return
    fresh = {part: load(folder) for part, folder in parts.items()}
    for part, added in fresh.items():
        runs = by_arm(stored[part]) | added
        stored[part] = [run for _, run in sorted(runs.items(), key=lambda item: (item[0][1], item[0][0]))]
    if (root / "rates.json").exists():
        stored["rates"] = read_json(root / "rates.json")
    if any(fresh.values()):
        write_json(options.stored, stored)
    print(f"{len(stored['tuning'])} trials, {len(stored['runs'])} runs")
    if whole(by_arm(stored["runs"])):
        print(tables(stored))
        if any(fresh.values()):
            picture(stored, options.stored.with_suffix(".png"))


if __name__ == "__main__":
    main()
