"""Does a reward for few forwards move the frontier of accuracy against forwards? recipes/sudoku_fast.py. Claims first.

A seed's model is taught once (supervised, 400 steps); both arms take equal steps of RL from it, with `SoftThreshold`
rollouts, unquantized. They differ in the reward alone:

    before       the taught model
    accuracy     the task's own reward, which sees no forwards: the control
    speed        the same, and up to 1 more for a solved grid, in proportion to the forwards saved

Each model is evaluated on 400 held-out puzzles with greedy tokens under the deterministic `Threshold` at ten taus: its
frontier. The number that is compared is the solve rate in 1.5 forwards per puzzle, on the straight line between the
frontier's points beside it. Seeds 10 to 12; the settings were looked for on seed 0.

Known before: of seed 0 the rollouts' forwards fell from 1.9 to 1.6 in 60 steps of the speed reward while their solve
rate rose from 0.71 to about 0.85, and at tau 0.9 the model had 0.95 in 1.91 forwards (before: 0.98 in 2.25). Claims:
those of `CLAIMS`. A reward without speed also makes a model surer, and so faster: the second claim may well fail. The
study was run a second time with the taus between 0.3 and 0.5, where the control's models pass 1.5 forwards: their rate
there had been read off one long line.

    python -m recipes.studies.fast               runs, fast.json, fast.png, the tables
    python -m recipes.studies.fast --report      run nothing
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from dllm_rl import Policy, Threshold, evaluate, load_policy
from dllm_rl.files import read_json, write_json
from recipes.studies.paired import (
    Contrast,
    Results,
    Study,
    by_arm,
    load,
    markdown,
    result_path,
    run_missing,
    tables,
    warm_up,
)
from recipes.sudoku_fast import fill, recipe

STORED = Path(__file__).with_suffix(".json")
SEEDS = range(10, 13)
STEPS = 120
TAUS = (0.3, 0.35, 0.4, 0.45, 0.48, 0.5, 0.6, 0.7, 0.8, 0.9)
PUZZLES = 400
BUDGET = 1.5  # forwards per puzzle
BEFORE, ACCURACY, SPEED = "before", "accuracy", "speed"
ARMS: dict[str, dict[str, Any]] = {BEFORE: {"num_steps": 0}, ACCURACY: {"task": recipe.task.task}, SPEED: {}}
CLAIMS = (
    Contrast("the speed reward raises what is solved in 1.5 forwards", SPEED, BEFORE),
    Contrast("by more than accuracy alone does", SPEED, ACCURACY),
)
study = Study(
    name="fast",
    base=replace(recipe, rollout_quantization=None),
    arms=ARMS,
    against={ACCURACY: BEFORE, SPEED: BEFORE},
    metrics={"rollouts' forwards": "completions/mean_forwards"},
    seeds=len(SEEDS),
    num_steps=STEPS,
    contrasts=CLAIMS,
)


def frontier(policy: Policy) -> list[dict[str, float]]:
    """Solve rate and forwards per puzzle of the model at each tau."""
    points = []
    for tau in TAUS:
        sampler = fill.replace(commit=Threshold(tau=tau), temperature=0.0)
        found = evaluate(policy, recipe.eval_task, sampler, limit=PUZZLES)
        forwards = found.summary["forwards_per_answer"]
        points.append({"tau": tau, "solved": found.means["solve_rate"], "forwards": forwards})
    return points


def within(points: Sequence[Mapping[str, float]], budget: float) -> float:
    """The solve rate at a budget of forwards, between the two points beside it; beyond the last points, theirs."""
    along = sorted((point["forwards"], point["solved"]) for point in points)
    return float(np.interp(budget, *zip(*along, strict=True)))


def run(study: Study, root: Path, num_steps: int, arm: str, seed: int) -> None:
    """Train and evaluate one arm, from the seed's model."""
    from dllm_rl.training.trainer import train

    start = warm_up(study.base, seed, root / "warm" / str(seed))
    policy, kept = load_policy(str(start)), {"arm": arm, "seed": seed, "num_steps": 0 if arm == BEFORE else num_steps}
    if arm != BEFORE:
        changes = {"model": str(start), "seed": seed, "num_steps": num_steps, "eval_steps": 0, "report_to": None}
        changes |= {"output_dir": str(root / "runs" / f"{arm}-{seed}"), "overwrite_output_dir": True}
        few = replace(recipe.eval_task, task=replace(recipe.eval_task.task, size=8))  # the frontier is what counts
        summary = train(replace(study.base, **changes, eval_task=few, **study.arms[arm]))
        policy = summary.policy
        kept["s"] = summary["seconds"]
    points = frontier(policy)
    path = result_path(root, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**kept, "after": within(points, BUDGET), "frontier": points})


def frontier_rows(results: Results) -> list[dict[str, str]]:
    """By tau, each arm's solve rate and forwards: means over the seeds."""
    rows = []
    for number, tau in enumerate(TAUS):
        row = {"tau": f"{tau:g}"}
        for arm in ARMS:
            points = [run["frontier"][number] for (name, _), run in sorted(results.items()) if name == arm]
            row[arm] = f"{mean(p['solved'] for p in points):.3f} in {mean(p['forwards'] for p in points):.2f}"
        rows.append(row)
    return rows


def plot(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for arm, color in zip(ARMS, ("grey", "tab:blue", "tab:red"), strict=True):
        for number, seed in enumerate(SEEDS):
            points = sorted((p["forwards"], p["solved"]) for p in results[arm, seed]["frontier"])
            label = arm if number == 0 else None
            axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, linewidth=1, label=label)
    axis.set(xlabel="forwards per puzzle", ylabel="solved", title="each line a seed, each point a threshold")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page_tables() -> dict[str, str]:
    results = by_arm(read_json(STORED))
    return {"frontier": markdown(frontier_rows(results)), "arms and claims": tables(study, results)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / study.name)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of fast.json")
    options = parser.parse_args()
    if options.report:
        results = by_arm(read_json(STORED))
    else:
        runs = list(product(ARMS, SEEDS))  # "before" first, which teaches
        for arm in ARMS:
            some = [key for key in runs if key[0] == arm]
            run_missing(study, options.output_dir, some, num_steps=lambda _: STEPS, workers=options.workers, run=run)
        results = load(options.output_dir)
        if len(results) == len(runs):
            write_json(STORED, list(results.values()))
            plot(results, STORED.with_suffix(".png"))
    print(markdown(frontier_rows(results)))
    print(tables(study, results))


if __name__ == "__main__":
    main()
