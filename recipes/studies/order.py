"""The order's part of confidence-ranked unmasking in training: the main job with it and without it.

Both arms train the same warmed-up model (one per seed) on 4x4 Sudoku, unquantised and on-policy, their rollouts ranked
as LLaDA ranks them (`confidence`); held-out puzzles are filled in greedily, as in the main job. Finished runs are kept
as one JSON each below `--output_dir`; started again, the script runs what is missing. What the numbers say: order.md.

    python -m recipes.studies.order                        run what is missing, then print the table
    python -m recipes.studies.order --num_steps 60 --seeds 2
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

from dllm_rl.algorithms.correctors import none
from dllm_rl.likelihoods.estimators import trajectory
from dllm_rl.samplers.rules import confidence
from recipes.studies.mismatch import single_thread, warm_up, work
from recipes.sudoku_tiny import recipe as base

ARMS = {"tokens and order": trajectory(), "tokens alone": trajectory(order="given")}
T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # Student's, 95 %, by the number of seeds


def result_path(arm: str, seed: int, root: Path) -> Path:
    return root / "results" / f"{arm.replace(' ', '-')}_{seed}.json"


def run_one(arm: str, seed: int, root: Path, num_steps: int) -> None:
    """Train and evaluate one arm; leaves `root`/results/....json."""
    from dllm_rl.training.loop import train

    folder = root / "runs" / result_path(arm, seed, root).stem
    recipe = replace(
        base,
        name=f"order-{folder.name}",
        model=str(warm_up("diffusion", seed, root / "warm" / f"diffusion-{seed}")),
        warmup_steps=0,
        sampler=partial(base.sampler, rank=confidence),
        likelihood=ARMS[arm],
        corrector=none(),
        rollout_quantization=None,
        seed=seed,
        num_steps=num_steps,
        eval_steps=0,
        report_to=None,
        output_dir=str(folder),
        resume_from_checkpoint="latest",
    )
    summary = train(recipe)
    solved = {when: summary[f"eval_{when}"]["solve_rate"] for when in ("before", "after")}
    path = result_path(arm, seed, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"arm": arm, "seed": seed, "num_steps": num_steps, **solved} | {"s": summary["seconds"]})
    )


def table(results: dict[tuple[str, int], dict], seeds: list[int]) -> str:
    """Solve rates by arm and seed, their mean, and the paired difference to the arm without the order's part."""
    lines = [
        f"| scored | {' | '.join(f'seed {s}' for s in seeds)} | mean | less tokens alone, 95 % |",
        f"| --- | {' | '.join('---' for _ in seeds)} | --- | --- |",
    ]
    for arm in ARMS:
        after = [results[arm, seed]["after"] for seed in seeds]
        apart = [a - results["tokens alone", seed]["after"] for a, seed in zip(after, seeds, strict=True)]
        said = "-"
        if any(apart) and len(seeds) in T:
            said = f"{mean(apart):+.3f} ± {T[len(seeds)] * stdev(apart) / len(seeds) ** 0.5:.3f}"
        lines.append(f"| {arm} | {' | '.join(f'{a:.3f}' for a in after)} | {mean(after):.3f} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/order"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--num_steps", type=int, default=120)
    options = parser.parse_args()
    root, seeds = options.output_dir, list(range(options.seeds))
    with ProcessPoolExecutor(options.workers, get_context("spawn"), single_thread) as pool:
        warm = {f"warm-{s}": partial(warm_up, "diffusion", s, root / "warm" / f"diffusion-{s}") for s in seeds}
        runs = {
            result_path(arm, seed, root).stem: partial(run_one, arm, seed, root, options.num_steps)
            for seed, arm in product(seeds, ARMS)
            if not result_path(arm, seed, root).exists()
        }
        for jobs in (warm, runs):
            waiting = [pool.submit(work, job, root / "logs" / f"{name}.txt") for name, job in jobs.items()]
            for failure in filter(None, (job.result() for job in waiting)):
                print("failed:", failure)
    stored = (json.loads(path.read_text()) for path in sorted((root / "results").glob("*.json")))
    print(table({(each["arm"], each["seed"]): each for each in stored}, seeds))


if __name__ == "__main__":
    main()
