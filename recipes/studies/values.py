"""Does a value model help? A value head against GRPO in equal time, on Latin squares. Results: values.md.

Every arm of a seed starts from the model of latin_sudoku.py (400 supervised steps) and goes on for about the same
processor time: a step with values costs 1.2 times as much, so that these arms take 82 steps, and GRPO 100.
Rollouts have four steps, scored as two segments.

Arms, besides GRPO with the group's mean:

value head    the advantage of each segment by GAE, from values that the head predicts
discount      the control: the same GAE with values of 0, which multiplies the advantage of the first segment by lambda.
              It has GRPO's 100 steps, although it runs the head's forward, too
lambda 1      a value head with lambda 1: it subtracts the predicted value, and credits no step with later values

Claims, written before the runs of the study's seeds (two-sided tests, Holm's correction over all of them):

1. The value head is above GRPO (solve rate of 400 test puzzles, one cell a step, temperature 1).
2. The value head is above the discount.
3. The value head is above GRPO in four parallel steps.

Lambda and the learning rate of `value head` and of `discount` are the best of lambda 0.5 and 0.95 with the rates 5e-4
and 1e-3, tried on seed 100, and the better two on seed 101 (400 validation puzzles). GRPO has 5e-4, the best of four
rates on the same seeds; lambda 1 has the rate of `value head`. Before these trials one
run each on seed 100, of 150 steps, had been seen: GRPO 0.718, lambda 1 0.723, 0.95 0.675, 0.5 0.792, 0 0.568.

    python -m recipes.studies.values tune            the trials
    python -m recipes.studies.values study           run what is missing, `--workers` at a time, then print the tables
    python -m recipes.studies.values --report        the tables of the stored runs
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from dllm_rl.algorithms.values import ValueModel
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.files import read_json, write_json
from recipes.studies import paired, reuse
from recipes.studies.few_clues import in_steps
from recipes.studies.paired import (
    TUNED_ON,
    Clock,
    Contrast,
    Results,
    Study,
    arm_rows,
    by_arm,
    contrast_rows,
    main,
    markdown,
    result_path,
    warm_up,
    which,
)

STORED = Path(__file__).with_suffix(".json")
TOY = Path(__file__).with_name("values_toy.json")  # of enumeration.value_table
GRPO, VALUE, DISCOUNT, BASELINE = "GRPO", "value head", "discount", "value head, lambda 1"
STEPS = {GRPO: 100, VALUE: 82, DISCOUNT: 100, BASELINE: 82}
NEVER = 1e-30  # a learning rate with which the head's values stay 0
COLUMNS = ("arm", "seeds", "after", "four", "greedy", "seconds", "difference, 95 %")


def arm(name: str, *, gae_lambda: float, rate: float) -> dict[str, Any]:
    """Settings of an arm with values; those of `discount` stay 0."""
    settings = {"learning_rate": NEVER} if name == DISCOUNT else {}
    model = ValueModel(gae_lambda=gae_lambda, **settings)
    return {"num_steps": STEPS[name], "learning_rate": rate, "value_model": model}


TRIALS = {
    name: {
        f"{name}, {gae_lambda:g} at {rate:g}": (gae_lambda, rate) for gae_lambda in (0.5, 0.95) for rate in (5e-4, 1e-3)
    }
    for name in (VALUE, DISCOUNT)
}
CHOSEN = {VALUE: (0.95, 1e-3), DISCOUNT: (0.95, 5e-4)}  # lambda and rate, by `tune`


def study(name: str, arms: Mapping[str, dict[str, Any]], **more: Any) -> Study:
    against = {other: GRPO for other in arms if other != GRPO}
    return Study(name, reuse.TASKS["latin"].base, dict(arms), against, {}, 10, 0, **more)


def run_one(study: Study, root: Path, num_steps: int, name: str, seed: int) -> None:
    """Train an arm of a seed, and evaluate it; leaves `root`/results/....json.

    seconds   of the processor, one thread, behind the common start
    after     solve rate, one cell a step, temperature 1; the others: greedy, and in four steps
    """
    from dllm_rl.training.trainer import train

    path, clock = result_path(root, name, seed), Clock()
    settings = {"name": f"values-{path.stem}", "model": str(warm_up(study.base, seed, root / "warm" / str(seed)))}
    settings |= {"seed": seed, "eval_task": replace(study.base.eval_task, size=8), "callbacks": [clock]}
    settings |= {"output_dir": str(root / "runs" / path.stem), "overwrite_output_dir": True} | study.arms[name]
    policy = train(replace(study.base, **settings)).policy
    policy.module.eval()
    problems = replace(study.base.eval_task, split="validation" if seed in TUNED_ON else "test", size=400)
    kept = {"arm": name, "seed": seed, "num_steps": len(clock.seconds), "seconds": sum(clock.seconds)}
    for metric, steps, temperature in (("after", 16, 1.0), ("four", 4, 1.0), ("greedy", 16, 0.0)):
        sampler = in_steps(steps, temperature=temperature)
        kept[metric] = evaluate(policy, problems, sampler, batch_size=512).means["solve_rate"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, kept)


TUNING = study(
    "values-tuning",
    {
        trial: arm(name, gae_lambda=gae_lambda, rate=rate)
        for name, trials in TRIALS.items()
        for trial, (gae_lambda, rate) in trials.items()
    },
)
STUDY = study(
    "values",
    {GRPO: {"num_steps": STEPS[GRPO], "learning_rate": 5e-4}}
    | {name: arm(name, gae_lambda=gae_lambda, rate=rate) for name, (gae_lambda, rate) in CHOSEN.items()}
    | {BASELINE: arm(BASELINE, gae_lambda=1.0, rate=CHOSEN[VALUE][1])},
    contrasts=(
        Contrast("the value head is above GRPO", VALUE, GRPO),
        Contrast("the value head is above the discount", VALUE, DISCOUNT),
        Contrast("the value head is above GRPO in four steps", VALUE, GRPO, "four"),
    ),
)


def tables(results: Results) -> tuple[list[dict[str, str]], ...]:
    """The arms' rates with 95 % intervals, the claims, and the trials."""
    rows = [
        {name: row[name] for name in COLUMNS}
        for row in arm_rows(STUDY, results, ("after", "four", "greedy", "seconds"))
    ]
    for row in rows:
        row["seconds"] = f"{float(row['seconds'].split('±')[0]):.0f}"
    columns = ("stated before the runs", "difference, 95 %", "above 0", "p", "Holm's p")
    claims = [{name: row[name] for name in columns} for row in contrast_rows(STUDY, results)]
    return rows, claims, paired.trial_rows(TUNING, results, "arm, lambda and rate")


def page_tables() -> dict[str, str]:
    toy = {(each["policy"], each["values"], each["gae_lambda"]): each for each in read_json(TOY)}
    rows = []
    for policy, kind in product(("early", "late"), ("none", "exact", "noisy")):
        cells = {f"{each:g}": toy[policy, kind, each] for each in (1, 0.95, 0.5, 0)}
        shown = {head: f"{at['bias']:.2f}/{at['rmse']:.2f}/{at['efficiency']:.2f}" for head, at in cells.items()}
        rows.append({"policy, values": f"{policy}, {kind}"} | shown)
    names, found = ("arms", "claims", "trials"), tables(by_arm(read_json(STORED)))
    return {"toy": markdown(rows)} | {name: markdown(table) for name, table in zip(names, found, strict=True)}


if __name__ == "__main__":
    stored = read_json(STORED) if STORED.exists() else []
    tuning, is_report = which(("study", "tune")) == "tune", "--report" in sys.argv
    fresh = (
        paired.tune_in_two_rounds(TUNING, Path("runs") / TUNING.name, TRIALS.values(), run_one)
        if tuning and not is_report
        else main(STUDY, __doc__, run=run_one)
    )
    results = by_arm(stored) | dict(fresh)
    print(*map(markdown, tables(results)), sep="\n")
    if not is_report:
        write_json(STORED, list(results.values()))
