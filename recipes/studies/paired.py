"""Paired comparisons: every arm starts from its seed's one warmed-up model, and changes a few settings of a recipe.

Finished runs are kept as one JSON each below `--output_dir`; started again, a study runs what is missing, then prints
its table.
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dllm_rl import Recipe
from recipes.studies.mismatch import single_thread, warm_up, work

T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # Student's, 95 %, by the number of seeds


@dataclass(frozen=True)
class Study:
    """What is compared.

    base     the recipe, which also says how a seed's model is warmed up.
    arms     changes to it, by name.
    against  an arm -> the one that its seeds are compared with.
    metrics  of a run's steps, by column: their mean over the run is in the table too.
    """

    name: str
    base: Recipe
    arms: dict[str, dict[str, Any]]
    against: dict[str, str]
    metrics: dict[str, str]
    seeds: int
    num_steps: int


def result_path(root: Path, arm: str, seed: int) -> Path:
    return root / "results" / f"{arm.replace(' ', '-').replace(',', '')}_{seed}.json"


def run_one(study: Study, root: Path, num_steps: int, arm: str, seed: int) -> None:
    """Train and evaluate one arm; leaves `root`/results/....json."""
    from dllm_rl.training.loop import train
    from dllm_rl.training.plots import read_metrics

    path = result_path(root, arm, seed)
    folder = root / "runs" / path.stem
    settings: dict[str, Any] = {
        "name": f"{study.name}-{path.stem}",
        "model": str(warm_up(study.base, seed, root / "warm" / str(seed))),
        "warmup_steps": 0,
        "seed": seed,
        "num_steps": num_steps,
        "eval_steps": 0,
        "report_to": None,
        "output_dir": str(folder),
        "resume_from_checkpoint": "latest",
    }
    summary = train(replace(study.base, **(settings | study.arms[arm])))
    steps = read_metrics(folder)
    found = {column: mean(row[metric] for row in steps if metric in row) for column, metric in study.metrics.items()}
    solved = {when: summary[f"eval_{when}"]["solve_rate"] for when in ("before", "after")}
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"arm": arm, "seed": seed, "num_steps": num_steps, "s": summary["seconds"]}
    path.write_text(json.dumps(kept | solved | found))


def table(study: Study, results: dict[tuple[str, int], dict], seeds: Sequence[int]) -> str:
    """Held-out solve rates by arm and seed, their mean, the paired difference, and the metrics' means."""
    heads = ["arm", *(f"seed {s}" for s in seeds), "mean", "less", "difference, 95 %", *study.metrics]
    lines = [heads, ["---"] * len(heads)]
    for arm in study.arms:
        after = [results[arm, seed]["after"] for seed in seeds]
        other, said = study.against.get(arm), "-"
        if other is not None:
            apart = [a - results[other, seed]["after"] for a, seed in zip(after, seeds, strict=True)]
            said = f"{mean(apart):+.3f}"
            if len(seeds) in T:
                said += f" ± {T[len(seeds)] * stdev(apart) / len(seeds) ** 0.5:.3f}"
        means = [f"{mean(results[arm, seed][column] for seed in seeds):.3g}" for column in study.metrics]
        lines.append([arm, *(f"{a:.3f}" for a in after), f"{mean(after):.3f}", other or "-", said, *means])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(study: Study, about: str | None) -> None:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / study.name)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, default=study.seeds)
    parser.add_argument("--num_steps", type=int, default=study.num_steps)
    options = parser.parse_args()
    root, seeds = options.output_dir, range(options.seeds)
    with ProcessPoolExecutor(options.workers, get_context("spawn"), single_thread) as pool:
        warm = {f"warm-{s}": partial(warm_up, study.base, s, root / "warm" / str(s)) for s in seeds}
        runs = {
            result_path(root, arm, seed).stem: partial(run_one, study, root, options.num_steps, arm, seed)
            for seed, arm in product(seeds, study.arms)
            if not result_path(root, arm, seed).exists()
        }
        for jobs in (warm, runs):
            waiting = [pool.submit(work, job, root / "logs" / f"{name}.txt") for name, job in jobs.items()]
            for failure in filter(None, (job.result() for job in waiting)):
                print("failed:", failure)
    stored = (json.loads(path.read_text()) for path in sorted((root / "results").glob("*.json")))
    print(table(study, {(each["arm"], each["seed"]): each for each in stored}, seeds))
