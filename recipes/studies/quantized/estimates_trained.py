"""Does a correction pay in training where the likelihood is an estimate? Claims before the runs.

orders_trained.py asks this where every denoising step is scored. A large model cannot afford that: above three steps
`grpo` merges the steps into two segments, and both sides of every ratio are then estimates, of tokens as they look in
views that the sampler never saw. Here 4x4 Sudoku (sudoku_unique.py) is trained for 60 steps of one update, 16 cells in
eight steps, random order, scored in two segments. Ten paired seeds (10 to 19, which no pilot of this study had) start
from one warmed-up model each. Parts, in the order in which they run, each with Holm's correction over its claims:

decides        unquantized; INT4 (groups of 32) and NVFP4 rollouts, weights alone, each without a corrector and with TIS
exact          INT4 without a corrector and with TIS, all eight steps scored
controls       INT4 and NVFP4 with TIS's weights on other tokens (`Permuted`), and without a corrector at half the rate
other weights  INT4 and NVFP4 with AIS (the lambda of this library), TBPO with its own loss, the aligned forward, TIS
               with a cap of 1.2 and of 1.5, and TIS's weights divided by their mean over each view's tokens (`MeanOne`)
fp8            FP8 rollouts (weights alone): no corrector, TIS, permuted, half the rate, AIS (without a claim)
fp8, others    TBPO and the aligned forward with FP8, without claims

The last two were one part when the claims were made. After its first seed, the arms of the claims ran first, then AIS.

The rate is 1e-3, which int4_orders.py tuned in random order for unquantized rollouts, INT4 and INT4 with TIS.

Evaluated on 400 test puzzles, in eight steps: `after` and `quantized` (the learner; the copy that sampled, made of the
learner once more) are greedy in `MaxProb` order; `sampled` and `quantized, sampled` are at temperature 1 in random
order, whose expected reward the gradient is of. Every five steps 200 validation puzzles are solved greedily, and the
processor seconds of the run up to there are kept (`course`), so that arms can be compared at equal time, too.

The claims, two-sided, by flipping the signs of ten seeds, each greedily and at temperature 1 in random order:

decides (8): for INT4 and for NVFP4 TIS is above no corrector; unquantized is above no corrector.
exact (4): with the exact likelihood TIS is above no corrector; what TIS gains is more than with two segments.
controls (8): for INT4 and for NVFP4 TIS is above its permuted weights; above half the rate.
other weights (24): for INT4 and for NVFP4 each of the six is above no corrector.
fp8 (8): unquantized is above no corrector; TIS is above no corrector, above its permuted weights, above half the rate.

Known before the runs: a pilot with 60 steps of eight and two segments (greedy / temperature 1), seed 0: unquantized
0.823 / 0.653, INT4 0.783 / 0.648, with TIS 0.728 / 0.645; seeds 1, 2, 3: unquantized 0.763 / 0.653, 0.675 / 0.609,
0.878 / 0.656, NVFP4 0.760 / 0.605, 0.680 / 0.586, 0.838 / 0.645, with TIS 0.783 / 0.643, 0.618 / 0.519, 0.738 / 0.569;
exact likelihood, seed 0: unquantized 0.770 / 0.606. And orders_trained.json and int4_orders.json (exact, four steps).

    python -m recipes.studies.quantized.estimates_trained [--parts decides]   run what is missing, the JSON, the tables
    python -m recipes.studies.quantized.estimates_trained --report            run nothing
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from dllm_rl import (
    AIS,
    NVFP4,
    TBPO,
    TIS,
    Aligned,
    Callback,
    Corrector,
    Float8WeightOnly,
    Int4WeightOnly,
    LikelihoodEstimator,
    NoCorrection,
    RandomOrder,
    Scheme,
    Trajectory,
)
from dllm_rl.files import read_json, write_json
from dllm_rl.quantization.rollout_policy import quantized_copy
from recipes.studies.controls import MeanOne, Permuted
from recipes.studies.late.late_rollouts import QUIET
from recipes.studies.paired import (
    Results,
    Study,
    arm_rows,
    by_arm,
    in_words,
    interval,
    keep,
    load,
    markdown,
    paired,
    restore_runs,
    run_missing,
    runs_of,
    sampled_solve_rate,
    train_one,
    verdict_rows,
)
from recipes.sudoku_unique import recipe

STORED = Path(__file__).with_suffix(".json")  # every run that has ended
SEEDS, STEPS, SEGMENTS, RATE = range(10, 20), 8, 2, 1e-3
FORMATS: dict[str, Scheme] = {
    "int4": Int4WeightOnly(),
    "nvfp4": NVFP4(),
    "fp8": Float8WeightOnly(dequantized=True),
}
OTHER_WEIGHTS: dict[str, Corrector] = {
    "ais": AIS(),
    "tbpo": TBPO(),
    "aligned": Aligned(),
    "tis cap 1.2": TIS(cap=1.2),
    "tis cap 1.5": TIS(cap=1.5),
    "tis mean 1": MeanOne(num_views=SEGMENTS, num_steps=STEPS),
}
SHARED = {"sampler": recipe.sampler.replace(diffusion_steps=STEPS, rank=RandomOrder()), "evaluation": {"steps": 5}}


def arm(
    scheme: Scheme | None,
    corrector: Corrector = NoCorrection(),
    likelihood: LikelihoodEstimator = Trajectory(num_segments=SEGMENTS),
    rate: float = RATE,
) -> dict[str, Any]:
    return {
        **SHARED,
        "rollout_quantization": scheme,
        "corrector": corrector,
        "likelihood": likelihood,
        "learning_rate": rate,
    }


def with_weights(name: str) -> dict[str, dict[str, Any]]:
    """The arms of a format without a corrector and with TIS."""
    return {name: arm(FORMATS[name]), f"{name}, tis": arm(FORMATS[name], TIS())}


def control_arms(name: str) -> dict[str, dict[str, Any]]:
    return {
        f"{name}, permuted": arm(FORMATS[name], Permuted(corrector=TIS())),
        f"{name}, half rate": arm(FORMATS[name], rate=RATE / 2),
    }


def other_arms(name: str, *correctors: str) -> dict[str, dict[str, Any]]:
    return {f"{name}, {each}": arm(FORMATS[name], OTHER_WEIGHTS[each]) for each in correctors}


PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "decides": {"unquantized": arm(None)} | with_weights("int4") | with_weights("nvfp4"),
    "exact": {f"exact: {name}": each | {"likelihood": Trajectory()} for name, each in with_weights("int4").items()},
    "controls": control_arms("int4") | control_arms("nvfp4"),
    "other weights": other_arms("int4", *OTHER_WEIGHTS) | other_arms("nvfp4", *OTHER_WEIGHTS),
    "fp8": with_weights("fp8") | control_arms("fp8") | other_arms("fp8", "ais"),
    "fp8, others": other_arms("fp8", "tbpo", "aligned"),
}
COLUMNS = ("after", "sampled", "quantized", "quantized, sampled")
STUDY = Study(
    name="estimates-trained",
    base=recipe.replace(**QUIET, eval_sampler=recipe.eval_sampler.replace(diffusion_steps=STEPS)),
    arms={name: each for arms in PARTS.values() for name, each in arms.items()},
    against={},
    metrics={"ess": "rollout_corr/ess", "mismatch": "rollout_corr/abs_log_ratio_mean", "reward": "reward"},
    seeds=len(SEEDS),
    num_steps=60,
)
ON_PAGE = ("decides", "controls", "fp8")  # parts with tables on the page
Claims = Mapping[str, Sequence[float]]
BOTH = {"greedy": "after", "temperature 1": "sampled"}  # how the learner is evaluated


class Course(Callback):
    """A run's evaluations: `points` has (step, processor seconds since the start, share solved) of each."""

    def on_start(self, run: Any) -> None:
        self.began = time.process_time()
        self.points: list[tuple[int, float, float]] = []

    def on_evaluate(self, run: Any, metrics: Mapping[str, float]) -> None:
        seconds = time.process_time() - self.began
        self.points.append((run.step, round(seconds, 2), round(metrics["eval/solve_rate"], 4)))


def run_evaluated(study: Study, root: Path, num_steps: int, name: str, seed: int) -> None:
    """Train one arm of a seed, and evaluate it at temperature 1, too; leaves `root`/results/....json."""
    course = Course()
    settings = study.arms[name]
    study = replace(study, arms=study.arms | {name: settings | {"callbacks": (course,)}})
    kept, policy = train_one(study, root, num_steps, name, seed)
    if policy is None:
        kept |= dict.fromkeys(COLUMNS, 0.0)
    else:
        own, scheme, seeded = settings["sampler"], settings["rollout_quantization"], replace(study.base, seed=seed)
        kept["sampled"] = sampled_solve_rate(policy, seeded, own)
        copied = quantized_copy(policy, scheme) if scheme else policy
        kept["quantized, sampled"] = sampled_solve_rate(copied, seeded, own) if scheme else kept["sampled"]
    keep(root, kept | {"course": course.points})


def above(results: Results, name: str, others: Mapping[str, str]) -> dict[str, list[float]]:
    """By claim an arm less others (what they are -> arm), greedily and at temperature 1."""
    return {
        f"{name} is above {claim}, {how}": paired(results, name, other, column)
        for claim, other in others.items()
        for how, column in BOTH.items()
    }


def dear(results: Results, name: str) -> dict[str, list[float]]:
    """By claim what a format's rollouts cost without a corrector."""
    return {
        f"{name}: unquantized is above no corrector, {how}": paired(results, "unquantized", name, column)
        for how, column in BOTH.items()
    }


def families(results: Results) -> dict[str, Claims]:
    """By part its claims, as `claimed_rows` takes them."""
    more = {}
    for how, column in BOTH.items():
        gains = [
            {seed: run[column] - results[less, seed][column] for (name, seed), run in results.items()
             if name == tis and (less, seed) in results}
            for tis, less in (("exact: int4, tis", "exact: int4"), ("int4, tis", "int4"))
        ]  # fmt: skip
        both = sorted(gains[0].keys() & gains[1].keys())
        more[f"exact: int4, tis gains more than with two segments, {how}"] = [gains[0][s] - gains[1][s] for s in both]
    controls: dict[str, dict[str, list[float]]] = {
        name: above(results, f"{name}, tis", {"its permuted weights": f"{name}, permuted"})
        | above(results, f"{name}, tis", {"half the rate": f"{name}, half rate"})
        for name in FORMATS
    }
    tis = {name: above(results, f"{name}, tis", {"no corrector": name}) for name in (*FORMATS, "exact: int4")}
    others: dict[str, list[float]] = {}
    for name, each in product(("int4", "nvfp4"), OTHER_WEIGHTS):
        others |= above(results, f"{name}, {each}", {"no corrector": name})
    return {
        "decides": tis["int4"] | dear(results, "int4") | tis["nvfp4"] | dear(results, "nvfp4"),
        "exact": tis["exact: int4"] | more,
        "controls": controls["int4"] | controls["nvfp4"],
        "other weights": others,
        "fp8": dear(results, "fp8") | tis["fp8"] | controls["fp8"],
    }


def whole_seeds(results: Results, part: str) -> int:
    """How many seeds have all arms of a part."""
    return sum(all((name, seed) in results for name in PARTS[part]) for seed in SEEDS)


WORDS = {  # of arms and claims, in tables
    "exact: int4, tis gains": "INT4, exact likelihood: TIS gains",
    "exact: ": "exact likelihood, ",
    "unquantized": "own rollouts",
    "nvfp4": "NVFP4",
    "int4": "INT4",
    "fp8": "FP8",
    "its permuted weights": "shuffled TIS",
    "permuted": "shuffled TIS",
    "half the rate": "half the learning rate",
    "half rate": "half the learning rate",
    "tis mean 1": "TIS, mean 1 in each view",
    "tis cap": "TIS, cap",
    "ais": "AIS (our lambda)",
    "tbpo": "TBPO",
    ", aligned": ", aligned forward",
    ", tis": ", TIS",
}
HEADS = {
    "seeds": "seeds",
    "after": "greedy, `MaxProb` order",
    "sampled": "temperature 1, random order",
    "quantized": "copy, greedy",
    "quantized, sampled": "copy, temperature 1",
    "ess": "ESS of tokens",
    "mismatch": "mean abs. log-ratio, nats",
}


def said(text: str) -> str:
    return in_words(text, WORDS)


def arms_of_part(results: Results, part: str) -> str:
    """What each arm of a part solves."""
    rows = []
    for row in arm_rows(replace(STUDY, arms=PARTS[part]), results, COLUMNS):
        runs = runs_of(results, row["arm"])
        seconds = mean(run["course"][-1][1] for run in runs)
        rows.append({"trained on": said(row["arm"]) + (", no correction" if row["arm"] in FORMATS else "")})
        rows[-1] |= {head: row[name] for name, head in HEADS.items()} | {"processor seconds": f"{seconds:.0f}"}
    return markdown(rows)


def claims_of(claims: Claims) -> str:
    """The claims of a part, with Holm's correction over them."""
    return markdown(verdict_rows(claims, said))


def at_equal_time(run: Mapping[str, Any], seconds: float) -> float:
    """The share of validation puzzles that a run solved at its last evaluation within so many processor seconds."""
    return [solved for _, used, solved in run["course"] if used <= seconds][-1]


def equal_time_rows(results: Results) -> list[dict[str, str]]:
    """Arms less their baseline, after equal steps and at the processor time of the faster of the two, in validation."""
    pairs = {"int4, tis": "int4", "nvfp4, tis": "nvfp4", "fp8, tis": "fp8", "exact: int4, tis": "int4, tis"}
    pairs |= {"exact: int4": "int4"}
    rows = []
    for name, other in pairs.items():
        found = [
            (run, results[other, run["seed"]]) for run in runs_of(results, name) if (other, run["seed"]) in results
        ]
        if found:
            steps = [one["course"][-1][2] - two["course"][-1][2] for one, two in found]
            limits = [min(one["course"][-1][1], two["course"][-1][1]) for one, two in found]
            times = [
                at_equal_time(one, limit) - at_equal_time(two, limit)
                for (one, two), limit in zip(found, limits, strict=True)
            ]
            rows.append({"arm": said(name), "less": said(other), "seeds": str(len(found))})
            rows[-1] |= {"equal steps": interval(steps), "equal processor time": interval(times)}
    return rows


def whole_families(results: Results) -> list[Claims]:
    """The claims of the parts that have all of their seeds: no other claim is read."""
    return [claims for part, claims in families(results).items() if whole_seeds(results, part) == len(SEEDS)]


def begun(runs: Sequence[Mapping[str, Any]]) -> Study:
    """The study with the arms of which there are runs."""
    names = {run["arm"] for run in runs}
    return replace(STUDY, arms={name: changes for name, changes in STUDY.arms.items() if name in names})


def report(results: Results) -> str:
    """How much is there, and what the arms of each part solve; the claims of whole parts, as no claim is read before
    its last seed."""
    seeds = {part: whole_seeds(results, part) for part in PARTS}
    lines = [f"{part}: {number} of {len(SEEDS)} seeds" for part, number in seeds.items()]
    lines += [f"\n{arms_of_part(results, part)}" for part, number in seeds.items() if number]
    lines.append(markdown(equal_time_rows(results)))
    lines += [
        f"{part}:\n\n{claims_of(claims)}" for part, claims in families(results).items() if seeds[part] == len(SEEDS)
    ]
    return "\n".join(lines)


def page_tables() -> dict[str, str]:
    """The tables about training: of each part the arms and the claims, or how much is there."""
    results = by_arm(read_json(STORED))
    tables = {"equal time": markdown(equal_time_rows(results))}
    for part in ON_PAGE:
        seeds = whole_seeds(results, part)
        there = markdown([{"seeds with all runs": f"{seeds} of {len(SEEDS)}"}])
        tables[part] = arms_of_part(results, part) if seeds else there
        tables[f"claims, {part}"] = claims_of(families(results)[part]) if seeds == len(SEEDS) else there
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / STUDY.name)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="none: store what is there")
    parser.add_argument("--report", action="store_true", help=f"run nothing: the tables of {STORED.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root, kept = options.output_dir, read_json(STORED) if STORED.exists() else []
    if not options.report:
        restore_runs(kept, root)
        for part, seed in product(options.parts, SEEDS):
            runs = [(name, seed) for name in PARTS[part]]
            run_missing(STUDY, root, runs, num_steps=lambda _: STUDY.num_steps, workers=1, run=run_evaluated)
            write_json(STORED, list(load(root).values()))
        kept = list(load(root).values())
        write_json(STORED, kept)
    print(report(by_arm(kept)))


if __name__ == "__main__":
    main()
