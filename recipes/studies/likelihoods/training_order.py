"""In which order should training sample, if evaluation keeps `MaxProb`? Claims before the runs; see README.md.

GRPO without quantization and without a corrector, on the five tasks of reuse.py, from their starts, with their budget
of row-forwards (equal computation). Four arms, which differ in the order of the training rollouts:

MaxProb          the library's default
random           `RandomOrder`
left to right    `LeftToRight`: each of the four (Countdown: three) steps writes the leftmost masked positions
PlackettLuce     `PlackettLuce(temperature=1.0)`, the temperature that order.py tuned, with the order's log-probs

`MaxProb`, random and left to right have the task's likelihood (two segments; Countdown: every step). `PlackettLuce`
scores every step on all tasks, because merged segments have no log-probs of the order: it makes fewer steps.

Rates, for each task and order: the best of reuse.py's GRPO and twice it are tried on seeds 100 and 101, on validation
problems; while the best one lacks a neighbor (half of it, twice it), that is tried, too. The score is reuse.py's: the
mean over all temperatures and both numbers of steps. Of `MaxProb`, the trials of reuse.json count.

Ten fresh seeds (30 to 39), paired. All arms are decoded in `MaxProb` order. The claims, fifteen: on each task each of
the three orders differs from `MaxProb`, two-sided, by flipping signs, Holm's correction over all of them. What is
compared is what reuse.py compared on the task: at equal diversity one token a step (latin, rare, countdown), at
temperature 1 (noisy), greedily (never). We expect random order above `MaxProb` on latin, rare and countdown.

The rule, before the runs: an order becomes the default of `grpo` if it is shown above `MaxProb` on at least three of
the five tasks, and shown below it on none.

Known before: orders_trained.json (random order 0.123±0.043 above `MaxProb` on 4x4 Sudoku, greedily); order_sudoku.json
and order_countdown.json (120 steps at one rate for all orders); a pilot on latin with seeds 0 and 1 (random order
0.547, 0.465; `MaxProb` 0.492, 0.450).

    python -m recipes.studies.likelihoods.training_order [--seeds 30 31]
        tune, run what is missing, training_order.json, tables
    python -m recipes.studies.likelihoods.training_order --report         run nothing
"""

import argparse
import time
from functools import partial
from pathlib import Path
from shutil import rmtree
from statistics import mean
from typing import Any

from dllm_rl import LeftToRight, MaxProb, PlackettLuce, RandomOrder, Rank, Trajectory, load_policy
from dllm_rl.files import read_json, write_json
from dllm_rl.versions import versions
from recipes.studies import paired
from recipes.studies.likelihoods.reuse import (
    BEYOND,
    GRIDS,
    GRPO,
    TASKS,
    Claim,
    Job,
    Results,
    best_rates,
    better_beyond,
    by_key,
    load,
    measure,
    score,
    start_of,
    train_phases,
    trial,
)
from recipes.studies.likelihoods.reuse import STORED as TUNED
from recipes.studies.paired import (
    TUNED_ON,
    capability,
    claimed_rows,
    counted,
    interval,
    markdown,
    result_path,
    shown_side,
)

STORED = Path(__file__).with_suffix(".json")
SEEDS = range(30, 40)
MAX_PROB = "MaxProb"
ORDERS: dict[str, Rank] = {
    MAX_PROB: MaxProb(),
    "random": RandomOrder(),
    "left to right": LeftToRight(),
    "PlackettLuce": PlackettLuce(temperature=1.0),
}
IN_TABLES = {order: f"`{order}`" if order in (MAX_PROB, "PlackettLuce") else order for order in ORDERS}
COMPARED = {"full": "equal diversity", "full@0": "greedy", "full@1": "temperature 1"}  # all one token a step
OF = {"latin": "full", "rare": "full", "never": "full@0", "noisy": "full@1", "countdown": "full"}


def run_one(root: Path, name: str, order: str, rate: float, seed: int, key: str) -> None:
    """Train one order of a seed, and measure it; leaves `root`/results/`key`_`seed`.json."""
    task, path = TASKS[name], result_path(root, key, seed)
    changes: dict[str, Any] = {"learning_rate": rate, "sampler": task.base.sampler.replace(rank=ORDERS[order])}
    if ORDERS[order].adds_gumbel:
        changes["likelihood"] = Trajectory()
    policy = load_policy(str(start_of(task, seed, root)))
    began = time.process_time()
    policy, used = train_phases(task.base, policy, [changes], seed, root / "runs" / path.stem)
    kept: dict[str, Any] = {"task": name, "key": key, "order": order, "rate": rate, "seed": seed, **used}
    kept |= {"seconds": time.process_time() - began, "cpu": capability(), "versions": versions()}
    kept |= measure(task, policy, "validation" if seed in TUNED_ON else "test", root / "runs" / path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, kept)
    rmtree(root / "runs" / path.stem)


def first_rate(name: str) -> float:
    """The best rate of reuse.py's GRPO on a task."""
    tuned = by_key(read_json(TUNED))
    return (best_rates(tuned, name) | better_beyond(tuned, name))[GRPO]


def scores(results: Results, name: str, order: str) -> dict[float, float]:
    """The mean scores over the tuning seeds of the rates that have both."""
    found = [(run["rate"], run["seed"]) for (task, key, seed), run in results.items()
             if task == name and seed in TUNED_ON and run["order"] == order]  # fmt: skip
    whole = {rate for rate, _ in found if all((rate, seed) in found for seed in TUNED_ON)}
    tried = {rate: mean(score(results[name, trial(order, rate), seed]) for seed in TUNED_ON) for rate in whole}
    if order == MAX_PROB:
        tuned = by_key(read_json(TUNED))
        for rate in GRIDS[GRPO] + BEYOND.get((name, GRPO), ()):
            tried[rate] = mean(score(tuned[name, trial(GRPO, rate), seed]) for seed in TUNED_ON)
    return tried


def best_rate(results: Results, name: str, order: str) -> float:
    """The rate with the best score, of equal ones the lower."""
    tried = scores(results, name, order)
    return max(sorted(tried), key=tried.__getitem__)


def missing_rates(results: Results, name: str, order: str) -> list[float]:
    """The rates to try next: none if the best one has both its neighbors."""
    tried = scores(results, name, order)
    if not tried:
        return [first_rate(name), 2 * first_rate(name)]
    best = best_rate(results, name, order)
    return [rate for rate in (best / 2, 2 * best) if rate not in tried]


def trials(root: Path, names: list[str], results: Results) -> list[Job]:
    """The next runs of the search for rates: none when all orders of all tasks have theirs."""
    return [
        (f"{name} {trial(order, rate)} {seed}",
         partial(run_one, root / name, name, order, rate, seed, trial(order, rate)))
        for name in names for order in ORDERS for rate in missing_rates(results, name, order) for seed in TUNED_ON
        if (name, trial(order, rate), seed) not in results
    ]  # fmt: skip


def runs_of_seed(root: Path, names: list[str], results: Results, seed: int) -> list[Job]:
    """The runs of a seed that are missing, each at its order's best rate."""
    return [
        (f"{name} {order} {seed}",
         partial(run_one, root / name, name, order, best_rate(results, name, order), seed, order))
        for name in names for order in ORDERS if (name, order, seed) not in results
    ]  # fmt: skip


def differences(results: Results, name: str, order: str, of: str) -> list[float]:
    """By seed an order less `MaxProb`: of a column, or at equal diversity ("full", "few")."""
    return Claim("", name, order, MAX_PROB, of).differences(results, SEEDS)


def claims(results: Results) -> dict[str, list[float]]:
    """By claim the differences of the seeds that have both sides."""
    return {
        f"{name}: {order} differs from MaxProb": differences(results, name, order, of)
        for order in ORDERS
        if order != MAX_PROB
        for name, of in OF.items()
    }


def arm_rows(results: Results, of: str) -> list[dict[str, str]]:
    """By task and order: what is solved one token a step ("full") or in few steps ("few"), and the difference from
    `MaxProb` at equal diversity."""
    rows = []
    for name in TASKS:
        for order in ORDERS:
            if runs := [results[name, order, seed] for seed in SEEDS if (name, order, seed) in results]:
                row = {"task": name, "trained in": IN_TABLES[order]}
                row["RL steps"] = f"{mean(run['steps, 0'] for run in runs):.0f}"
                for head, temperature in (("temperature 1", 1), ("greedy", 0)):
                    row[head] = interval([run[f"{of}@{temperature}"] for run in runs])
                more = differences(results, name, order, of)
                row["minus `MaxProb`, at equal diversity"] = interval(more) if more and order != MAX_PROB else "-"
                rows.append(row)
    return rows


def claim_rows(results: Results) -> list[dict[str, str]]:
    """By claim the difference, how many seeds are above 0, and the p of Holm's correction over all claims."""
    rows = []
    for row in claimed_rows(claims(results)):
        name, _, claim = row["stated before the runs"].partition(": ")
        order = claim.removesuffix(" differs from MaxProb")
        rows.append({"task": name, "trained in": IN_TABLES[order], "compared": COMPARED[OF[name]]})
        rows[-1] |= {"minus `MaxProb`": row["found, 95 %"], "seeds above 0": row["above 0"], "p": row["Holm's p"]}
        rows[-1]["verdict"] = {1: "shown: better", -1: "shown: worse", 0: "not shown"}[shown_side(row)]
    return rows


def rate_rows(results: Results) -> list[dict[str, str]]:
    """By task and order the best rate, and between which it was found."""
    rows = []
    for name in TASKS:
        row = {"task": name}
        for order, head in IN_TABLES.items():
            tried = scores(results, name, order)
            row[head] = f"{best_rate(results, name, order):.3g} ({min(tried):.3g} to {max(tried):.3g})"
        rows.append(row)
    return rows


def decoding_rows(results: Results) -> list[dict[str, str]]:
    """By task random order less `MaxProb`, greedily, in few steps and one token a step."""
    rows = []
    for name in TASKS:
        rows.append({"task": name})
        for head, of in (("in few steps", "few@0"), ("one token per step", "full@0")):
            rows[-1][head] = counted(differences(results, name, "random", of))
    return rows


def page_tables() -> dict[str, str]:
    """The tables of README.md and appendix.md."""
    results = by_key(read_json(STORED))
    tables = {"claims": claim_rows(results), "rates": rate_rows(results)}
    tables |= {"one token a step": arm_rows(results, "full"), "few steps": arm_rows(results, "few")}
    tables["random order, greedy"] = decoding_rows(results)
    return {name: markdown(rows) for name, rows in tables.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/training-order"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    root, names = options.output_dir, options.tasks

    def start(seeds: tuple[int, ...]) -> None:
        jobs = [(f"{name} start {seed}", partial(start_of, TASKS[name], seed, root / name))
                for name in names for seed in (seeds[:1] if TASKS[name].one_start else seeds)]  # fmt: skip
        paired.run_all(jobs, root, options.workers)

    if not options.report:
        if trials(root, names, load(root, STORED)):
            start(TUNED_ON)
        while jobs := trials(root, names, load(root, STORED)):
            paired.run_all(jobs, root, options.workers)
            write_json(STORED, list(load(root, STORED).values()))
    for seed in () if options.report else options.seeds:
        if jobs := runs_of_seed(root, names, load(root, STORED), seed):
            start((seed,))
            paired.run_all(jobs, root, options.workers)
            write_json(STORED, list(load(root, STORED).values()))
    results = load(root, STORED)
    for rows in (arm_rows(results, "full"), arm_rows(results, "few"), claim_rows(results)):
        print(markdown(rows))


if __name__ == "__main__":
    main()
