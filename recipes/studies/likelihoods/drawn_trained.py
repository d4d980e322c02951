"""Drawn steps, segments or every step: which learns most in equal processor time? Claims before the runs.

`Trajectory(variance_growth=0.1)` keeps the ratios exact and scores few steps of a policy that is certain; segments are
cheap whatever the policy is, and biased. 4x4 Sudoku (sudoku_unique.py), answers of 16 cells in 8 or 16 steps in random
order, 32 prompts x 8, one update a rollout. Ten paired seeds (20 to 29, which no pilot had). Two starts:

soft       the seed's warmed-up model, which solves about a fifth greedily
certain    the same model after 60 more steps of RL with segments on its own rollouts

Every arm then trains for the same number of processor seconds (`SECONDS`, of steps alone: evaluations are not counted),
at the rate 1e-3, which int4_orders.py tuned for full replay in random order; no arm's rate was tuned here.

segments   `Trajectory(num_segments=2)` with 8 steps and 4 with 16, what `grpo` takes
drawn      `Trajectory(variance_growth=0.1)`
every      `Trajectory()`

each unquantized, with INT4 rollouts (groups of 32, weights alone), and with INT4 rollouts and TIS. Parts, in the order
in which they run, each with Holm's correction over its claims: "certain, 8", "soft, 8", "certain, 16", "soft, 16" have
segments and drawn, unquantized and INT4 with TIS; the same names with "rest" have the other five arms.

Evaluated on 400 test puzzles: `after` is greedy in `MaxProb` order in as many steps, `sampled` at temperature 1 in
random order, whose expected reward the gradient is of. Every ten steps 200 validation puzzles are solved greedily
(`course`: step, processor seconds, share solved).

The claims, two-sided, by flipping the signs of the seeds, each greedily and at temperature 1:

parts (4 each): drawn is above segments, unquantized and with INT4 and TIS.
rests (12 each): drawn is above every step, unquantized, with INT4, and with INT4 and TIS; drawn is above segments with
INT4; with INT4 and drawn steps TIS is above no corrector; with INT4 and every step TIS is above no corrector.

Known before the runs: a pilot of draws with another rule (two of eight steps whatever the doubt), seed 0, 60 steps from
the soft start, greedy / temperature 1: unquantized, every step 0.770 / 0.606, segments 0.823 / 0.653, drawn 0.743 /
0.613; INT4, segments without a corrector 0.783 / 0.648, with TIS 0.728 / 0.645, drawn with TIS 0.653 / 0.525. From a
certain policy seed 20 was run with an earlier rule of the draw (without RECORD_ERROR, so with more noise): unquantized,
segments 0.830 / 0.776, drawn 0.778 / 0.651; its rollouts took four fifths of the time of a step.

    python -m recipes.studies.likelihoods.drawn_trained [--parts "certain, 8"]   run what is missing, the JSON, tables
    python -m recipes.studies.likelihoods.drawn_trained --report                 run nothing
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from dllm_rl import TIS, Callback, Int4WeightOnly, NoCorrection, RandomOrder, Trajectory
from dllm_rl.files import read_json, write_json
from recipes.studies.late.late_rollouts import QUIET
from recipes.studies.paired import (
    Results,
    Study,
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
    warm_up,
)
from recipes.sudoku_unique import recipe

STORED = Path(__file__).with_suffix(".json")  # every run that has ended
SEEDS, RATE, CERTAIN_AFTER, GROWTH = range(21, 31), 1e-3, 60, 0.1
SEGMENTS = {8: 2, 16: 4}  # by the number of denoising steps
SECONDS = {8: 60.0, 16: 90.0}
ROLLOUTS: dict[str, dict[str, Any]] = {
    "unquantized": {"rollout_quantization": None, "corrector": NoCorrection()},
    "int4": {"rollout_quantization": Int4WeightOnly(), "corrector": NoCorrection()},
    "int4, tis": {"rollout_quantization": Int4WeightOnly(), "corrector": TIS()},
}
DECIDES = tuple(product(("unquantized", "int4, tis"), ("segments", "drawn")))
REST = (("unquantized", "every"), ("int4", "segments"), ("int4", "drawn"), ("int4", "every"), ("int4, tis", "every"))
STARTS = (("certain", 8), ("soft", 8), ("certain", 16), ("soft", 16))
BOTH = {"greedy": "after", "temperature 1": "sampled"}  # how the learner is evaluated
Claims = Mapping[str, Sequence[float]]


def likelihood(way: str, steps: int) -> Trajectory:
    ways = {"segments": {"num_segments": SEGMENTS[steps]}, "drawn": {"variance_growth": GROWTH}, "every": {}}
    return Trajectory(**ways[way])


def arms_of(start: str, steps: int, chosen: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    return {
        f"{start}, {steps}: {rollouts}: {way}": ROLLOUTS[rollouts] | {"likelihood": likelihood(way, steps)}
        for rollouts, way in chosen
    }


PARTS: dict[str, dict[str, dict[str, Any]]] = {f"{s}, {n}": arms_of(s, n, DECIDES) for s, n in STARTS}
PARTS |= {f"{s}, {n}, rest": arms_of(s, n, REST) for s, n in STARTS}


def study_of(steps: int) -> Study:
    """The arms with so many denoising steps."""
    arms = {name: each for arms in PARTS.values() for name, each in arms.items() if f", {steps}:" in name}
    base = recipe.replace(
        **QUIET,
        sampler=recipe.sampler.replace(diffusion_steps=steps, rank=RandomOrder()),
        eval_sampler=recipe.eval_sampler.replace(diffusion_steps=steps),
        learning_rate=RATE,
    )
    metrics = {
        "ess": "rollout_corr/ess",
        "row-forwards": "drawn_steps/row_forwards",
        "gradient norm": "grad_norm",
        "reward": "reward",
    }
    return Study(
        name=f"drawn-trained-{steps}",
        base=base,
        arms={name: each | {"evaluation": {"steps": 10}} for name, each in arms.items()},
        against={},
        metrics=metrics,
        seeds=len(SEEDS),
        num_steps=10_000,  # the budget ends a run
    )


class Budget(Callback):
    """Ends a run after so many processor seconds of steps, of which there were `steps`. `points` has (step, seconds,
    share solved) of each evaluation."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_start(self, run: Any) -> None:
        self.last, self.used, self.steps = time.process_time(), 0.0, 0
        self.points: list[tuple[int, float, float]] = []

    def on_step(self, run: Any, metrics: Mapping[str, float]) -> None:
        now = time.process_time()
        self.used, self.last, self.steps = self.used + now - self.last, now, run.step
        if self.used >= self.seconds:
            run.stop(f"{self.seconds:g} processor seconds are spent")

    def on_evaluate(self, run: Any, metrics: Mapping[str, float]) -> None:
        self.points.append((run.step, round(self.used, 2), round(metrics["eval/solve_rate"], 4)))
        self.last = time.process_time()


def certain_start(study: Study, root: Path, steps: int, seed: int) -> Path:
    """The seed's model after `CERTAIN_AFTER` steps of RL; made on first use."""
    from dllm_rl.checkpoints.checkpoint import list_checkpoints
    from dllm_rl.training.trainer import train

    folder = root / "certain" / str(seed)
    if not (folder / "summary.json").exists():
        settings = arms_of("certain", steps, DECIDES)[f"certain, {steps}: unquantized: segments"]
        settings |= {"model": str(warm_up(study.base, seed, root / "warm" / str(seed))), "warmup": {"steps": 0}}
        settings |= {
            "num_steps": CERTAIN_AFTER,
            "evaluation": {"steps": 0},
            "log": {"report_to": None},
            "seed": seed + 1000,
        }
        train(study.base.replace(**settings, output_dir=str(folder), overwrite_output_dir=True))
    return list_checkpoints(folder / "checkpoints")[-1][1]


def run_budgeted(steps: int, study: Study, root: Path, num_steps: int, name: str, seed: int) -> None:
    """Train one arm of a seed until its time is spent, and evaluate it; leaves `root`/results/....json."""
    budget = Budget(SECONDS[steps])
    changes: dict[str, Any] = {"callbacks": (budget,)}
    if name.startswith("certain"):
        changes["model"] = str(certain_start(study, root, steps, seed))
    study = replace(study, arms=study.arms | {name: study.arms[name] | changes})
    kept, policy = train_one(study, root, num_steps, name, seed)
    seeded = replace(study.base, seed=seed)
    kept["sampled"] = 0.0 if policy is None else sampled_solve_rate(policy, seeded, study.base.sampler)
    keep(root, kept | {"course": budget.points, "steps": budget.steps})


def in_turn(names: Sequence[str], seed: int) -> list[str]:
    """The arms in the order in which this seed runs them. It turns from seed to seed, as the machine is not idle."""
    first = seed % len(names)
    return [*names[first:], *names[:first]]


def families(results: Results) -> dict[str, Claims]:
    """By part its claims, as `claimed_rows` takes them."""
    found: dict[str, dict[str, list[float]]] = {}

    def claim(part: str, start: str, arm: str, other: str, text: str) -> None:
        for how, column in BOTH.items():
            values = paired(results, f"{start}: {arm}", f"{start}: {other}", column)
            found.setdefault(part, {})[f"{text}, {how}"] = values

    for start, steps in STARTS:
        name = f"{start}, {steps}"
        for rollouts in ("unquantized", "int4, tis"):
            text = f"{rollouts}: drawn is above segments"
            claim(name, name, f"{rollouts}: drawn", f"{rollouts}: segments", text)
        rest = f"{name}, rest"
        for rollouts in ROLLOUTS:
            claim(rest, name, f"{rollouts}: drawn", f"{rollouts}: every", f"{rollouts}: drawn is above every step")
        claim(rest, name, "int4: drawn", "int4: segments", "int4: drawn is above segments")
        for way in ("drawn", "every"):
            text = f"int4, {way}: TIS is above no corrector"
            claim(rest, name, f"int4, tis: {way}", f"int4: {way}", text)
    return {part: found[part] for part in PARTS}


def whole_seeds(results: Results, part: str) -> list[int]:
    """The seeds that have all arms of a part."""
    return [seed for seed in SEEDS if all((name, seed) in results for name in PARTS[part])]


WORDS = {
    "unquantized": "own rollouts",
    "int4, tis": "INT4, TIS",
    "int4": "INT4",
    "drawn": "drawn steps",
    "every step": "all steps",
}


def said(text: str) -> str:
    return in_words(text, WORDS)


def solved_at(run: Mapping[str, Any], seconds: float) -> float:
    """The share of validation puzzles that a run solved at its last evaluation within so many processor seconds."""
    return [solved for _, used, solved in run["course"] if used <= seconds][-1]


def arms_of_part(results: Results, part: str) -> str:
    """What each arm of a part solves, over the seeds that have all of its arms."""
    whole, rows = set(whole_seeds(results, part)), []
    budget = SECONDS[int(part.split(", ")[1])]
    for name in PARTS[part]:
        runs = [run for run in runs_of(results, name) if run["seed"] in whole]
        if not runs:
            continue
        row = {"rollouts": said(name.split(": ")[1]), "scored": said(name.split(": ")[2]).replace("every", "all steps")}
        row |= {"seeds": str(len(runs)), "training steps": f"{mean(run['steps'] for run in runs):.0f}"}
        forwards = [run["row-forwards"] for run in runs if "row-forwards" in run]
        row["row-forwards to score a completion"] = f"{mean(forwards):.2f}" if forwards else "-"
        row["before, greedy"] = interval([run["before"] for run in runs])
        row[f"validation after {budget / 2:.0f} s"] = interval([solved_at(run, budget / 2) for run in runs])
        rows.append(row | {how: interval([run[column] for run in runs]) for how, column in BOTH.items()})
    return markdown(rows)


def report(results: Results) -> str:
    """How much is there; what the arms of each part solve; the claims of parts that have all seeds, and else what is
    known of them."""
    lines = [f"{part}: {len(whole_seeds(results, part))} of {len(SEEDS)} seeds" for part in PARTS]
    for part, claims in families(results).items():
        if whole_seeds(results, part):
            lines.append(f"\n{part}\n\n{arms_of_part(results, part)}")
            known = {text: values for text, values in claims.items() if values}
            lines.append(markdown(verdict_rows(known, said)))
    return "\n".join(lines)


def whole_families(results: Results) -> list[Claims]:
    """The claims of the parts that have all of their seeds: no other claim is read."""
    return [claims for part, claims in families(results).items() if len(whole_seeds(results, part)) == len(SEEDS)]


def page_tables() -> dict[str, str]:
    """Of each part that has runs its arms; its claims if all seeds are there."""
    results = by_arm(read_json(STORED))
    tables = {part: arms_of_part(results, part) for part in PARTS if whole_seeds(results, part)}
    for part, claims in families(results).items():
        if len(whole_seeds(results, part)) == len(SEEDS):
            tables[f"claims, {part}"] = markdown(verdict_rows(claims, said))
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/drawn-trained"))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="none: store what is there")
    parser.add_argument("--report", action="store_true", help=f"run nothing: the tables of {STORED.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root, kept = options.output_dir, read_json(STORED) if STORED.exists() else []
    if not options.report:
        for steps in SECONDS:
            restore_runs((run for run in kept if f", {steps}:" in run["arm"]), root / str(steps))

        def everything() -> list[dict[str, Any]]:
            return [run for steps in SECONDS for run in load(root / str(steps)).values()]

        for part, seed in product(options.parts, SEEDS):
            steps = int(part.split(", ")[1])
            study, runs = study_of(steps), [(name, seed) for name in in_turn(list(PARTS[part]), seed)]
            run, num_steps = partial(run_budgeted, steps), study.num_steps
            run_missing(study, root / str(steps), runs, num_steps=lambda _, n=num_steps: n, workers=1, run=run)
            write_json(STORED, everything())
        kept = everything()
        write_json(STORED, kept)
    print(report(by_arm(kept)))


if __name__ == "__main__":
    main()
