"""Can a model that writes in two steps learn from itself in eight? 4x4 Sudoku, many right answers. Claims before runs.

The task is that of sudoku_tiny.py: puzzles of one to three clues with 34 right answers, two steps, FP8 rollouts. Every
arm starts from its seed's one supervised model (400 steps) and trains for the processor time that 100 steps of "RL
alone" take, on one thread. An arm's number of steps is that time over the time of one of its steps, measured first. The
teacher is the supervised model, frozen and unquantized.

    RL alone            sudoku_tiny.py: a reward by the rules
    teacher alone       `recipes/sudoku_distil.py`: the reverse KL to the teacher in eight steps, no reward
    teacher and reward  the same teacher with teacher_coeff 0.02, beside 0.98 of the reward by the rules
    sixteen steps       as "teacher alone", but the teacher writes one cell at a time
    two steps           a control, as "teacher alone": the teacher takes the student's own two steps, and what it knows
                        of cells that are written together cannot help

Known before the runs, from seed 100 alone and about 45 CPU seconds each: "RL alone" 0.36 at the rate 1e-3; "teacher
alone" 0.37 at 1e-3, 0.22 at 2e-3, 0.34 with a teacher of four steps, and after 30 steps at 5e-4 with one of sixteen
0.26; "teacher and reward" 0.35 with a coefficient of 0.06 and 0.41 with 0.02. The teacher arms take the rate 1e-3.
"RL alone" keeps sudoku_tiny.py's 5e-4, which solved 0.396±0.041 on these seeds in few_clues.md. The claims, on seeds 10
to 19, are those of `CLAIMS`; "answers" are the different right grids that eight samples of a puzzle hold, as in
few_clues.md.

    python -m recipes.studies.distillation               costs, runs, distillation.json, the tables
    python -m recipes.studies.distillation --report      run nothing
"""

import argparse
import os
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from dllm_rl import Recipe
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.files import read_json, write_json
from recipes.studies.few_clues import diversity, in_steps
from recipes.studies.paired import (
    Clock,
    Contrast,
    Results,
    Study,
    arm_rows,
    by_arm,
    capability,
    contrast_rows,
    load,
    markdown,
    result_path,
    run_all,
    run_missing,
)
from recipes.sudoku_distil import recipe as taught_by_itself
from recipes.sudoku_tiny import recipe as base
from recipes.sudoku_tiny import taught

STORED = Path(__file__).with_suffix(".json")  # costs and every run
SEEDS = range(10, 20)
STEPS = 100  # of "RL alone"
TIMED = 12  # steps, of which the first two are left out
LESSONS = 400
RL, ALONE, BOTH, SIXTEEN, TWO = "RL alone", "teacher alone", "teacher and reward", "sixteen steps", "two steps"
TEACHER = {
    name: getattr(taught_by_itself, name) for name in ("teacher", "teacher_substeps", "entropy_coeff", "learning_rate")
}
ARMS: dict[str, dict[str, Any]] = {
    RL: {},
    ALONE: TEACHER,
    BOTH: TEACHER | {"teacher_coeff": 0.02},
    SIXTEEN: TEACHER | {"teacher_substeps": 8},
    TWO: TEACHER | {"teacher_substeps": 1},
}
CLAIMS = (
    Contrast("a teacher of eight steps is above one of two", ALONE, TWO),
    Contrast("the teacher alone is above RL alone", ALONE, RL),
    Contrast("teacher and reward are above RL alone", BOTH, RL),
    Contrast("teacher and reward are above the teacher alone", BOTH, ALONE),
    Contrast("the teacher alone keeps more answers than RL alone", ALONE, RL, "answers"),
)
COLUMNS = ("before", "after", "in 16", "answers")
ARM_COLUMNS = ("arm", "steps", "seconds", *COLUMNS, "reverse KL", "difference, 95 %")
CLAIM_COLUMNS = ("stated before the runs", "difference, 95 %", "above 0", "Holm's p")
study = Study(
    name="distillation",
    base=replace(base, eval_steps=0, save_steps=10**6, log_completions_steps=0, report_to=None),
    arms=ARMS,
    against={arm: RL for arm in ARMS if arm != RL},
    metrics={"reverse KL": "teacher/reverse_kl"},
    seeds=len(SEEDS),
    num_steps=STEPS,
    contrasts=CLAIMS,
)


def lesson(root: Path, seed: int) -> None:
    """Save the supervised model that all arms of a seed start from."""
    taught(seed=seed, steps=LESSONS).save_pretrained(root / "taught" / str(seed))


def run_one(study: Study, root: Path, num_steps: int, arm: str, seed: int) -> None:
    """Train one arm and evaluate it in two and in 16 steps; leaves `root`/results/....json. `seconds`: processor time
    of the RL steps and of the evaluations before and after them."""
    from dllm_rl.monitoring.plots import read_metrics
    from dllm_rl.training.trainer import train

    path = result_path(root, arm, seed)
    folder = root / "runs" / path.stem
    given = {"model": str(root / "taught" / str(seed)), "seed": seed, "num_steps": num_steps}
    recipe: Recipe = replace(study.base, **study.arms[arm], **given, output_dir=str(folder), overwrite_output_dir=True)
    began = time.process_time()
    summary = train(recipe)
    kept = {
        "arm": arm,
        "seed": seed,
        "num_steps": num_steps,
        "seconds": time.process_time() - began,
        "cpu": capability(),
    }
    kept |= {when: summary[f"eval_{when}"][study.metric] for when in ("before", "after")}
    kept["in 16"] = evaluate(summary.policy, recipe.eval_task, in_steps(16)).means[study.metric]
    kept |= diversity(summary.policy, recipe)
    if found := [row[name] for row in read_metrics(folder)[-10:] for name in study.metrics.values() if name in row]:
        kept["reverse KL"] = mean(found)  # of the last ten steps
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, kept)


def cost(arm: str, root: Path) -> None:
    """Write the processor seconds of a step of the arm, from a model that knows nothing."""
    from dllm_rl.training.trainer import train

    clock = Clock()
    made = replace(study.base, **ARMS[arm])
    timed = {"model": partial(taught, steps=0), "num_steps": TIMED, "seed": 100, "overwrite_output_dir": True}
    timed |= {"eval_task": replace(base.eval_task, size=8), "output_dir": str(root / "timed" / arm.replace(" ", "-"))}
    train(replace(made, callbacks=[clock], **timed))
    root.joinpath("costs").mkdir(parents=True, exist_ok=True)
    write_json(root / "costs" / f"{arm}.json", {"arm": arm, "s": mean(clock.seconds[2:])})


def tables(results: Results) -> str:
    """The arms, then the claims, as the page has them."""
    arms = arm_rows(study, results, COLUMNS)
    for row in arms:
        mine = [run for (arm, _), run in sorted(results.items()) if arm == row["arm"]]
        row["steps"], row["seconds"] = (f"{mean(run[name] for run in mine):.0f}" for name in ("num_steps", "seconds"))
    claims = markdown(contrast_rows(study, results), CLAIM_COLUMNS)
    return f"{markdown(arms, ARM_COLUMNS)}\n{claims}"


def page_tables() -> dict[str, str]:
    stored = read_json(STORED)
    costs = [{"arm": arm, "seconds of a step": f"{each:.3f}"} for arm, each in stored["seconds of a step"].items()]
    return {"costs": markdown(costs), "arms and claims": tables(by_arm(stored["runs"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / study.name)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--steps", type=int, default=STEPS, help="of RL alone; the others take as long")
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of distillation.json")
    options = parser.parse_args()
    root = options.output_dir
    if options.report:
        stored = read_json(STORED)
        costs, results = stored["seconds of a step"], by_arm(stored["runs"])
    else:
        untimed = [arm for arm in ARMS if not (root / "costs" / f"{arm}.json").exists()]
        run_all(((f"cost-{arm}", partial(cost, arm, root)) for arm in untimed), root, workers=1)
        costs = {arm: read_json(root / "costs" / f"{arm}.json")["s"] for arm in ARMS}
        new = [seed for seed in options.seeds if not (root / "taught" / str(seed)).exists()]
        run_all(((f"lesson-{seed}", partial(lesson, root, seed)) for seed in new), root, options.workers)
        steps = {arm: round(options.steps * costs[RL] / costs[arm]) for arm in ARMS}
        runs = [(arm, seed) for seed, arm in product(options.seeds, options.arms)]
        run_missing(study, root, runs, num_steps=steps.__getitem__, workers=options.workers, run=run_one)
        results = load(root)
        if {(arm, seed) for seed, arm in product(SEEDS, ARMS)} <= results.keys():
            write_json(STORED, {"seconds of a step": costs, "runs": list(results.values())})
    print(markdown([{"arm": arm, "seconds of a step": f"{seconds:.3f}"} for arm, seconds in costs.items()]))
    print(tables(results) if results else "no run has ended")


if __name__ == "__main__":
    main()
