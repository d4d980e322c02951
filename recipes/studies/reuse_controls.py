"""What does replay (reuse.py) buy on latin: the rule, memory, or computation? Claims before the runs.

Ten seeds (10 to 19), each from one start, at the rates and the budget that reuse.py tuned; all arms run again here, on
one commit:

GRPO, RAFT with replay, GRPO with replay    as there
RAFT, 96 grids never stored     a third of the 288 grids, drawn anew for each seed, is graded 5 in place of 6: their
                                answers are right, and never enter the store
RAFT, arbitrary squares         "right" are 288 of the 576 Latin squares, drawn at random for each seed, in place of the
                                Sudokus: there is no rule to learn, and what is gained is memory
RAFT, newest 64                 a store of the newest 64 right answers
GRPO with replay, newest 64     the same
GRPO, three budgets             GRPO with three times the row-forwards

`hidden` is the share of 800 answers (400 test puzzles, two each, temperature 1, one cell a step) that are one of the
seed's 96 grids with its puzzle's clues; `chosen` the share that are one of its 288 arbitrary squares with the clues; of
the start, too. `full` is the share that obey all rules.

The claims (Holm's correction over the eight, two-sided, by flipping the signs of ten seeds):

1. after RAFT that never stored the 96 grids, they are written more often than at the start (it learns the boxes)
2. and less often than after RAFT that stored them (it also prefers what it stored)
3. RAFT on arbitrary squares writes more of them than the start does (memory exists)
4. and gains fewer of them than RAFT gains Sudokus (`full`): the rule is worth more than memory
5. RAFT is above RAFT with the newest 64, at equal diversity (the gain is of using answers many times, for long)
6. GRPO with replay is above the same with the newest 64, at equal diversity
7. RAFT is above GRPO with three budgets, at equal diversity
8. GRPO with replay is above GRPO with three budgets, at equal diversity

Known before: reuse.json (RAFT is above GRPO), and first looks at one or two other seeds: the 96 grids rose from 101 to
121, and from 115 to 147 of 800 answers; arbitrary squares from 0.426 to 0.603, and 0.406 to 0.570 (Sudokus from 0.47
and 0.426 to 0.907); a store of 64 0.562, all answers 0.917, GRPO 0.738; GRPO at three budgets 0.725.

    python -m recipes.studies.reuse_controls [--seeds 10 11]   run what is missing, reuse_controls.json, the tables
    python -m recipes.studies.reuse_controls --report          run nothing
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from shutil import rmtree
from typing import Any

from dllm_rl import Policy, Recipe, Replay, Reward, Sudoku, load_policy
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.files import read_json, write_json
from dllm_rl.tasks import Problem
from dllm_rl.tasks.sudoku.graders import first_cells
from dllm_rl.versions import versions
from recipes.studies import paired
from recipes.studies.latin_limit import LATIN, SUDOKU
from recipes.studies.paired import by_arm, capability, claimed_rows, interval, markdown, result_path, runs_of
from recipes.studies.reuse import (
    BOTH,
    BUDGET,
    COLUMNS,
    FEW_CLUES,
    GRPO,
    RAFT,
    SEEDS,
    TASKS,
    arms_of,
    at_equal_diversity,
    best_rates,
    by_key,
    measure,
    start_of,
    train_phases,
)
from recipes.studies.reuse import STORED as TUNED

STORED = Path(__file__).with_suffix(".json")
HIDDEN, ARBITRARY = "RAFT, 96 grids never stored", "RAFT, arbitrary squares"
RAFT_64, BOTH_64, LONG = "RAFT, newest 64", "GRPO with replay, newest 64", "GRPO, three budgets"
ARMS = (GRPO, RAFT, BOTH, HIDDEN, ARBITRARY, RAFT_64, BOTH_64, LONG)
SHARES = {"solve_rate": "right", "hidden": "hidden", "chosen": "chosen"}  # as stored: as in the table
Results = Mapping[tuple[str, int], dict[str, Any]]


@cache
def squares_of(seed: int) -> dict[str, frozenset[str]]:
    """Of a seed the 96 grids that are not stored, and the 288 Latin squares that are right in place of the Sudokus."""
    rng = Random(f"reuse controls/{seed}")
    return {"hidden": frozenset(rng.sample(sorted(SUDOKU), 96)), "chosen": frozenset(rng.sample(sorted(LATIN), 288))}


@dataclass(frozen=True)
class Squares(Sudoku):
    """The reward by the rules, and whether the answer is one of the seed's squares with the puzzle's clues.

    right: "hidden": such an answer is worth 5, less than a right one; "chosen": 6, and a Sudoku that is none 5.
    """

    seed_of_squares: int = 0
    right: str = "rules"

    def reward(self, problem: Problem, completion: str) -> Reward:
        found = super().reward(problem, completion)
        puzzle = problem.fields["puzzle"]
        cells = first_cells(completion, 16).ljust(16, ".")
        keeps = all(clue in ("0", cell) for clue, cell in zip(puzzle, cells, strict=True))
        among = {name: float(keeps and cells in each) for name, each in squares_of(self.seed_of_squares).items()}
        value = found.value
        if self.right == "hidden" and among["hidden"]:
            value = 5.0
        if self.right == "chosen":
            value = 6.0 if among["chosen"] else min(value, 5.0)
        return replace(found, value=value, breakdown=found.breakdown | among)


def recipe_of(arm: str, seed: int) -> tuple[Recipe, dict[str, Any], float]:
    """Of an arm the recipe, its changes to it, and its budget."""
    task = TASKS["latin"]
    arms = arms_of(task, best_rates(by_key(read_json(TUNED)), "latin"))
    newest = {RAFT_64: RAFT, BOTH_64: BOTH}
    (changes,) = arms[{HIDDEN: RAFT, ARBITRARY: RAFT, LONG: GRPO, **newest}.get(arm, arm)]
    right = {HIDDEN: "hidden", ARBITRARY: "chosen"}.get(arm, "rules")
    base = replace(task.base, task=Squares(**FEW_CLUES, seed_of_squares=seed, right=right))
    if arm in newest:
        replay: Replay = changes["replay"]
        changes = changes | {"replay": replay.replace(capacity=64)}
    return base, changes, BUDGET * (3 if arm == LONG else 1)


def among(policy: Policy, seed: int) -> dict[str, float]:
    """The shares of 800 answers at temperature 1 that are a seed's hidden grids, its chosen squares, and right."""
    base = TASKS["latin"].base
    asked = {**FEW_CLUES, "split": "test", "size": 400, "seed_of_squares": seed}
    sampler = base.eval_sampler.replace(diffusion_steps=16, temperature=1.0)
    policy.module.eval()
    means = evaluate(policy, Squares(**asked), sampler, batch_size=512, samples=2).means
    return {name: means[name] for name in SHARES}


def run_one(root: Path, arm: str, seed: int) -> None:
    """Train an arm of a seed, and measure it; leaves `root`/results/`arm`_`seed`.json."""
    task, path = TASKS["latin"], result_path(root, arm, seed)
    policy = load_policy(str(start_of(task, seed, root)))
    kept: dict[str, Any] = {"arm": arm, "seed": seed, "before": among(policy, seed)}
    base, changes, budget = recipe_of(arm, seed)
    began = time.process_time()
    policy, used = train_phases(base, policy, [changes], seed, root / "runs" / path.stem, budget)
    kept |= used | {"seconds": time.process_time() - began, "cpu": capability()}
    kept |= {"versions": versions(), "after": among(policy, seed)}
    kept |= measure(task, policy, "test", root / "runs" / path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, kept)
    rmtree(root / "runs" / path.stem)


def claims(results: Results) -> dict[str, list[float]]:
    """By claim the differences of the seeds that have both sides."""

    def seeds(*arms: str) -> list[int]:
        return [seed for seed in SEEDS if all((arm, seed) in results for arm in arms)]

    def share(arm: str, seed: int, name: str, when: str = "after") -> float:
        return float(results[arm, seed][when][name])

    def gain(arm: str, seed: int, name: str) -> float:
        return share(arm, seed, name) - share(arm, seed, name, "before")

    def equal(arm: str, other: str) -> list[float]:
        return [at_equal_diversity(results[arm, seed], results[other, seed]) for seed in seeds(arm, other)]

    both = seeds(ARBITRARY, RAFT)
    return {
        "the 96 grids that were never stored rise": [gain(HIDDEN, seed, "hidden") for seed in seeds(HIDDEN)],
        "they end below the same grids when stored": [
            share(RAFT, seed, "hidden") - share(HIDDEN, seed, "hidden") for seed in seeds(HIDDEN, RAFT)
        ],
        "arbitrary squares rise": [gain(ARBITRARY, seed, "chosen") for seed in seeds(ARBITRARY)],
        "they rise less than Sudokus do": [
            gain(RAFT, seed, "solve_rate") - gain(ARBITRARY, seed, "chosen") for seed in both
        ],
        "RAFT is above RAFT with the newest 64": equal(RAFT, RAFT_64),
        "GRPO with replay is above the same with the newest 64": equal(BOTH, BOTH_64),
        "RAFT is above GRPO with three budgets": equal(RAFT, LONG),
        "GRPO with replay is above GRPO with three budgets": equal(BOTH, LONG),
    }


def arm_rows(results: Results) -> list[dict[str, str]]:
    rows = []
    for arm in ARMS:
        if runs := runs_of(results, arm):
            row = {"arm": arm, "seeds": str(len(runs))}
            row |= {column: interval([run[column] for run in runs]) for column in COLUMNS}
            row["range of full@1"] = " to ".join(f"{f([run['full@1'] for run in runs]):.3f}" for f in (min, max))
            for name, column in SHARES.items():
                for when in ("before", "after"):
                    row[f"{column}, {when}"] = interval([run[when][name] for run in runs])
            rows.append(row)
    return rows


def page_tables() -> dict[str, str]:
    """The tables of reuse.md."""
    results = by_arm(read_json(STORED))
    return {"arms": markdown(arm_rows(results)), "claims": markdown(claimed_rows(claims(results)))}


def load(root: Path) -> list[dict[str, Any]]:
    """The stored runs, and those below `root`."""
    found = by_arm(read_json(STORED) if STORED.exists() else [])
    found |= by_arm([read_json(path) for path in sorted(root.glob("results/*.json"))])
    return [found[key] for key in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reuse-controls"))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    root = options.output_dir
    for seed in () if options.report else options.seeds:
        done = by_arm(load(root))
        jobs = [(f"{arm} {seed}", partial(run_one, root, arm, seed)) for arm in ARMS if (arm, seed) not in done]
        paired.run_all([(f"start {seed}", partial(start_of, TASKS["latin"], seed, root))] if jobs else [], root, 1)
        paired.run_all(jobs, root, 1)
        write_json(STORED, load(root))
    results = by_arm(load(root))
    print(markdown(arm_rows(results)))
    print(markdown(claimed_rows(claims(results))))


if __name__ == "__main__":
    main()
