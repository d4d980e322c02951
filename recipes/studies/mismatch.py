"""Where the mismatch of a quantised rollout hurts, and which corrections help: one table and one figure.

Every arm trains the same warmed-up model (one per seed and family) on 4x4 Sudoku for 60 steps of two inner updates,
its rollouts drawn from a copy whose block linears hold 7 levels (int3) or 5, inputs rounded to e4m3. Every arm is
evaluated twice, at the learner's precision and through the quantised copy. Finished runs are kept as one JSON each
below `--output_dir`; started again, the script runs only what is missing. One thread a run, one run a core; a run takes
about 40 s of one core, the whole plan about an hour of one. What the numbers say: mismatch_reading.md.

    python -m recipes.studies.mismatch                     run what is missing, then write mismatch.md and mismatch.png
    python -m recipes.studies.mismatch --plan              say what would be run
    python -m recipes.studies.mismatch --report            write table and figure from what is there
    python -m recipes.studies.mismatch --families diffusion --levels int4 ramp --arms none tis ais-alarm ais-gated
"""

import argparse
import json
import os
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from dllm_rl.algorithms import correctors as c
from dllm_rl.algorithms.surrogates import ppo_clip
from dllm_rl.quantization.schemes import five_level_emulated, int3_emulated, int4_emulated
from dllm_rl.recipe import Recipe
from recipes.studies import mismatch_report
from recipes.sudoku_tiny import in_float32 as diffusion
from recipes.sudoku_tiny_ar import recipe as autoregressive

FAMILIES = {"diffusion": diffusion, "autoregressive": autoregressive}
# A ramp: the level changes at a third and at two thirds of the run, each part with a fresh optimiser.
LEVELS = {
    "int4": (int4_emulated,),
    "int3": (int3_emulated,),
    "five_level": (five_level_emulated,),
    "ramp": (int4_emulated, int3_emulated, five_level_emulated),
}
BAND = {"eps_high": 0.05, "neg_low": 0.05, "neg_high": 0.05}  # TBPO's own constants are for thousands of tokens, not 16
# A dual clip: without it an update beyond the first has an unbounded gradient where A < 0 and r > 1 + epsilon.
DUAL = partial(ppo_clip, epsilon=0.2, delta=1.2)
ARMS = {
    "unquantised": c.none(),  # the rollout is the learner: mismatch is exactly 0
    "none": c.none(),
    "tis": c.tis(),
    "tis-sequence": c.tis(level="sequence"),
    "icepop": c.icepop(),
    "ais-alarm": c.ais(),
    "ais-gated": c.ais(combine="gated"),
    "tbpo": c.tbpo(**BAND),
    "aligned": c.aligned(),
    "qarl": c.qarl(**BAND),
    "none-dual": replace(c.none(), surrogate=DUAL),
    "tis-dual": replace(c.tis(), surrogate=DUAL),
    "tis-reject": c.compose(c.tis(), c.reject(statistic="k3", bound=0.1)),  # 0.001 would reject every low-bit sequence
}
TELLING = ("unquantised", "none", "tis", "ais-alarm", "aligned", "tbpo", "qarl")
FEWER = ("unquantised", "none", "tis", "ais-alarm", "aligned")
KEPT = {
    "solve rate": "rewards/solve_rate/mean",
    "ess": "rollout_corr/ess",
    "lambda": "ais/lambda",
    "gradient norm": "grad_norm/iteration_1",
    "max |log ratio|": "rollout_corr/abs_log_ratio_max",
    "mean |log ratio|": "rollout_corr/abs_log_ratio_mean",
}
Run = tuple[str, str, str, int]  # family, level, arm, seed


def plan(seeds: int, families: list[str], levels: list[str], arms: list[str] | None) -> list[Run]:
    """The runs, the most telling first, so that an interrupted study can be read."""
    tiers = [("diffusion", TELLING), ("autoregressive", FEWER), ("diffusion", tuple(ARMS))]
    tiers = [tier for tier in tiers if tier[0] in families]
    if arms is not None:
        tiers = [(family, tuple(arms)) for family in families]
    runs: dict[Run, None] = {}
    for family, names in tiers:
        for seed in range(seeds):
            for level in levels:
                for arm in names:
                    runs[family, "-" if arm == "unquantised" else level, arm, seed] = None
    return list(runs)


def recipe_of(run: Run, folder: Path, *, warm: Path, num_steps: int) -> Recipe:
    family, _, arm, seed = run
    return replace(
        FAMILIES[family],
        name=f"mismatch-{family}-{arm}",
        model=str(warm),
        warmup_steps=0,
        corrector=ARMS[arm],
        rollout_quantization=None,
        seed=seed,
        train_batch_size=16,
        num_iterations=2,
        num_steps=num_steps,
        save_steps=50,
        save_total_limit=1,
        logging_steps=20,
        output_dir=str(folder),
        resume_from_checkpoint="latest",
    )


def warm_up(base: Recipe, seed: int, folder: Path) -> Path:
    """The checkpoint that all arms of this recipe and seed start from; made on first use."""
    from dllm_rl.training.checkpoint import found
    from dllm_rl.training.loop import train

    if not (folder / "summary.json").exists():
        model = partial(base.model.func, **{**base.model.keywords, "seed": seed})
        base = replace(base, model=model, seed=seed, num_steps=0, rollout_quantization=None)
        train(replace(base, output_dir=str(folder), overwrite_output_dir=True))
    return found(folder / "checkpoints")[-1][1]


def run_one(run: Run, root: Path, num_steps: int) -> None:
    """Train and evaluate one arm; leaves `root`/results/....json. A gradient that is not finite ends it as diverged."""
    from dllm_rl.training.loop import train
    from dllm_rl.training.plots import read_metrics

    family, level, arm, seed = run
    warm = warm_up(FAMILIES[family], seed, root / "warm" / f"{family}-{seed}")
    stages = LEVELS.get(level, (None,))
    bounds = [num_steps * i // len(stages) for i in range(len(stages) + 1)]
    curves, summary, before, diverged = {name: [] for name in KEPT}, {}, None, False
    for i, quantization in enumerate(stages):
        folder = root / "runs" / "-".join(map(str, (*run, i)))
        recipe = recipe_of(run, folder, warm=warm, num_steps=bounds[i + 1] - bounds[i])
        try:
            summary = train(replace(recipe, rollout_quantization=quantization))
        except FloatingPointError as error:
            print(f"diverged: {error}")
            diverged = True
        for row in read_metrics(folder):
            for name, metric in KEPT.items():
                curves[name].append(row.get(metric))
        if diverged:
            break
        before, warm = before or summary["eval_before"]["solve_rate"], Path(summary["checkpoint"])
    result = {
        "family": family,
        "level": level,
        "arm": arm,
        "seed": seed,
        "num_steps": num_steps,
        "diverged": diverged,
        "before": before,
        "learner": 0.0 if diverged else summary["eval_after"]["solve_rate"],
        "quantised": 0.0 if diverged else summary["eval_after_quantized"]["solve_rate"],
        "seconds": summary.get("seconds"),
        "machine": summary.get("machine"),
        "curves": curves,
    }
    path = result_path(run, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(result))
    aside.replace(path)


def result_path(run: Run, root: Path) -> Path:
    return root / "results" / ("_".join(map(str, run)) + ".json")


def work(job: Callable[[], object], log: Path) -> str | None:
    """Run the job with its output in a file; returns what went wrong, if anything did."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out, redirect_stdout(out):
        try:
            job()
        except Exception as error:  # one run's failure is reported, and does not end the others
            traceback.print_exc(file=out)
            return f"{type(error).__name__}: {error}; see {log}"
    return None


def single_thread() -> None:
    import torch

    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/mismatch"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_steps", type=int, default=60)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=["int3", "five_level"])
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    root = options.output_dir
    runs = plan(options.seeds, options.families, options.levels, options.arms)
    missing = [run for run in runs if not result_path(run, root).exists()]
    if options.plan:
        print(f"{len(runs)} runs, {len(missing)} of them missing:")
        print(*(" ".join(map(str, run)) for run in missing), sep="\n")
        return
    if not options.report:
        starts = dict.fromkeys((family, seed) for family, _, _, seed in missing)
        warm = {f"warm-{f}-{s}": partial(warm_up, FAMILIES[f], s, root / "warm" / f"{f}-{s}") for f, s in starts}
        arms = {"_".join(map(str, run)): partial(run_one, run, root, options.num_steps) for run in missing}
        with ProcessPoolExecutor(options.workers, get_context("spawn"), single_thread) as pool:
            for jobs in (warm, arms):
                waiting = [pool.submit(work, job, root / "logs" / f"{name}.txt") for name, job in jobs.items()]
                for failure in filter(None, (job.result() for job in waiting)):
                    print("failed:", failure)
    mismatch_report.write(root / "results", Path(__file__).parent, order=list(ARMS))


if __name__ == "__main__":
    main()
