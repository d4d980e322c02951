"""In which order should training sample, if evaluation keeps `MaxProb`? Claims before the runs; see README.md.

GRPO without quantization and without a corrector, on five tasks. Every run has the same budget: `BUDGET` row-forwards,
where a forward of a row costs 1 and one with its backward costs 3. They are counted on the model's first block,
rollouts and scoring included. Four arms, which differ in the order of the training rollouts:

MaxProb          the library's default
random           `RandomOrder`
left to right    `LeftToRight`: each of the four (Countdown: three) steps writes the leftmost masked positions
PlackettLuce     `PlackettLuce(temperature=1.0)`, the temperature that order.py tuned, with the order's log-probs

`MaxProb`, random and left to right have the task's likelihood (two segments; Countdown: every step). `PlackettLuce`
scores every step on all tasks, because merged segments have no log-probs of the order: it makes fewer steps.

Rates, for each task and order: the best of `MaxProb` and twice it are tried on seeds 100 and 101, on validation
problems; while the best one lacks a neighbor (half of it, twice it), that is tried, too. The score is the mean over all
temperatures and both numbers of steps. Of `MaxProb`, the trials of a study of replay (docs/results-and-limits.md,
archived studies) count, which tried 2.5e-4, 5e-4 and 1e-3, and went on where the best rate was an end.

Ten fresh seeds (30 to 39), paired. All arms are decoded in `MaxProb` order. The claims, fifteen: on each task each of
the three orders differs from `MaxProb`, two-sided, by flipping signs, Holm's correction over all of them. What is
compared is what the study of replay compared on the task: at equal diversity one token a step (latin, rare,
countdown), at temperature 1 (noisy), greedily (never). We expect random order above `MaxProb` on latin, rare and
countdown.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from statistics import mean
from typing import Any

import numpy as np
import torch

from dllm_rl import (
    Callback,
    LeftToRight,
    MaxProb,
    NoCorrection,
    PlackettLuce,
    Policy,
    RandomOrder,
    Rank,
    Recipe,
    Trajectory,
    evaluate,
    load_policy,
    train,
)
from dllm_rl.algorithms.optimizers import LinearDecay
from dllm_rl.files import read_json, write_json
from dllm_rl.models.forward.blocks import blocks_of
from dllm_rl.step.context import StepContext
from dllm_rl.tasks import Problem, Reward, Sudoku
from dllm_rl.tasks.rows import load_rows
from dllm_rl.versions import versions
from recipes.countdown_tiny import recipe as countdown
from recipes.latin_sudoku import recipe as latin
from recipes.latin_sudoku import taught_latin
from recipes.studies import paired
from recipes.studies.paired import (
    TUNED_ON,
    capability,
    claimed_rows,
    counted,
    interval,
    markdown,
    result_path,
    shown_side,
    warm_up,
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
BUDGET = 80_000  # row-forwards: about 100 steps, where groups without an advantage are not scored
BACKWARD = 2  # of a backward, in forwards
TEMPERATURES = (1.5, 1.0, 0.7, 0.5, 0.3)
Results = Mapping[tuple[str, str, int], dict[str, Any]]  # (task, order or trial, seed) -> what its run left
Job = tuple[str, Callable[[], object]]


class Noisy(Sudoku):
    """The reward by the rules, of a grader that calls 30 % of the wrong answers right: always the same ones."""

    def reward(self, problem: Problem, completion: str) -> Reward:
        found = super().reward(problem, completion)
        digest = sha256(f"{problem.fields['puzzle']} {completion}".encode()).digest()
        is_mistaken = digest[0] < 0.3 * 256
        return replace(found, value=6.0) if is_mistaken else found


FEW_CLUES = {"split": "train", "clues": (1, 3), "unique": False, "infill": True, "reward_rule": "rules"}


@dataclass(frozen=True)
class TaskOf:
    """A task of the study: its recipe, the reward of a right answer, and the steps in which answers are evaluated."""

    base: Recipe
    right: float
    metric: str
    steps: tuple[int, int]  # one token a step, and the steps of the rollouts
    one_start: bool = False  # all seeds start from the model of seed 100, whose warm-up takes minutes


def latin_of(steps: int, **more: Any) -> TaskOf:
    """The model of latin_sudoku.py, after so many supervised steps."""
    settings = {"likelihood": Trajectory(num_segments=2), "replay": None} | more  # what `grpo` takes for four steps
    recipe = base_of(replace(latin, name=f"latin-{steps}", model=partial(taught_latin, steps=steps), **settings))
    return TaskOf(recipe, 6.0, "solve_rate", (16, 4))


def base_of(recipe: Recipe) -> Recipe:
    settings: dict[str, Any] = {"rollout_quantization": None, "corrector": NoCorrection()}
    settings |= {
        "evaluation": {"steps": 0},
        "saves": {"steps": 10**6},
        "log": {"report_to": None, "completions_steps": 0},
        "learning_rate": 5e-4,
    }
    return recipe.replace(**settings)


TASKS = {
    "latin": latin_of(400),
    "rare": latin_of(150),
    "never": latin_of(105),
    "noisy": latin_of(400, task=Noisy(**FEW_CLUES)),
    "countdown": TaskOf(base_of(countdown), 1.5, "accuracy", (10, 3), one_start=True),
}


class Budget(Callback):
    """Counts the row-forwards of a run's steps, ends it when they reach the budget, and is its schedule."""

    def __init__(self, budget: float) -> None:
        self.budget, self.used, self.steps = budget, 0, 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the forwards of steps inside of the block, and not those of evaluations."""
        arithmetic = StepContext.arithmetic

        @contextmanager
        def counted(context: StepContext, **which: bool) -> Iterator[None]:
            modules = {id(policy.module): policy.module for policy in (context.policy, context.rollout_policy)}
            handles = [blocks_of(module)[0].register_forward_pre_hook(self.count) for module in modules.values()]
            try:
                with arithmetic(context, **which):
                    yield
            finally:
                for handle in handles:
                    handle.remove()

        StepContext.arithmetic = counted  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            StepContext.arithmetic = arithmetic  # type: ignore[method-assign]

    def count(self, block: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self.used += len(inputs[0]) * (1 + BACKWARD * torch.is_grad_enabled())

    def on_step(self, run: Any, metrics: Mapping[str, float]) -> None:
        self.steps += 1
        if self.used >= self.budget:
            run.stop("the budget is used up")

    def schedule(self, step: int, num_steps: int) -> float:
        return LinearDecay()(max(5, round(100 * min(1, self.used / self.budget))), 100)


def measure(task: TaskOf, policy: Policy, split: str, folder: Path) -> dict[str, float]:
    """Solve rates by the number of steps and the temperature: greedy of 400 problems, else of four answers of each of
    100 problems. Of these, with one token a step:

    answers   the share of a problem's right answers that differ from each other, of problems with several
    distinct  the number of right answers that differ from each other, over all answers
    texts     the number of different texts among the right answers of all problems (of Sudoku: grids, of 288)
    """
    problems = replace(task.base.eval_task, split=split, size=400)
    path = folder / "answers.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    policy.module.eval()
    found = {}
    for name, steps in zip(("full", "few"), task.steps, strict=True):
        write = task.base.eval_sampler.replace(diffusion_steps=steps)
        greedy = write.replace(temperature=0.0)
        found[f"{name}@0"] = evaluate(policy, problems, greedy, batch_size=512).means[task.metric]
        for temperature in TEMPERATURES:
            path.unlink(missing_ok=True)
            sampler = write.replace(temperature=temperature)
            answers = evaluate(policy, problems, sampler, batch_size=512, samples=4, limit=100, completions=path)
            found[f"{name}@{temperature:g}"] = answers.means[task.metric]
            right: dict[int, list[str]] = {}
            for _, row in load_rows(path):
                index = row["evaluation"]["problem"]
                if problems.reward(problems[index], row["completion"]).breakdown[task.metric] == 1:
                    right.setdefault(index, []).append(row["completion"])
            if name == "full":
                shares = [len(set(texts)) / len(texts) for texts in right.values() if len(texts) > 1]
                found[f"answers@{temperature:g}"] = mean(shares) if shares else 0.0
                found[f"distinct@{temperature:g}"] = sum(len(set(texts)) for texts in right.values()) / 400
                found[f"texts@{temperature:g}"] = len(set().union(*right.values()))
    return found


def train_phases(
    base: Recipe, policy: Policy, phases: Sequence[Mapping[str, Any]], seed: int, folder: Path, budget: float = BUDGET
) -> tuple[Policy, dict[str, float]]:
    """Train a model in phases, which share the budget equally. Returns it, and what each phase used."""
    few = replace(base.eval_task, size=8)  # the trainer evaluates before and after: not used here
    kept: dict[str, float] = {}
    for phase, changes in enumerate(phases):
        clock = Budget(budget / len(phases))
        settings = {
            "name": folder.name,
            "model": policy,
            "seed": seed + 1000 * phase,
            "eval_task": few,
            "callbacks": [clock],
            "lr_schedule": clock.schedule,
            "num_steps": 10**4,
            "warmup": {"steps": 0},
            "output_dir": str(folder / str(phase)),
            "overwrite_output_dir": True,
        }
        with clock.counting():
            policy = train(base.replace(**(settings | dict(changes)))).policy
        kept |= {f"used, {phase}": clock.used, f"steps, {phase}": clock.steps}
    return policy, kept


def score(run: Mapping[str, float]) -> float:
    """What rates are tuned by: the mean over all temperatures and both numbers of steps."""
    return mean(value for name, value in run.items() if name.startswith(("full@", "few@")))


def at_equal_diversity(run: Mapping[str, float], other: Mapping[str, float], name: str = "full") -> float:
    """The run's rate less the other's, both interpolated linearly between temperatures, as a mean over five levels of
    `answers` evenly from the larger of the two smallest to the smaller of the two largest. Where one curve lies above
    the other, that is one level between them, at which each has the rate of its end.
    """
    curves = []
    for each in (run, other):
        points = sorted((each[f"answers@{t:g}"], each[f"{name}@{t:g}"]) for t in TEMPERATURES)
        curves.append(tuple(zip(*points, strict=True)))
    low = max(diversity[0] for diversity, _ in curves)
    high = min(diversity[-1] for diversity, _ in curves)
    levels = np.linspace(low, high, 5) if low < high else [(low + high) / 2]
    mine, others = (np.interp(levels, *curve) for curve in curves)
    return float(np.mean(mine - others))


def start_of(task: TaskOf, seed: int, root: Path) -> Path:
    """The checkpoint that all arms of a seed start from."""
    first = 100 if task.one_start else seed
    return warm_up(task.base, first, root / "warm" / str(first))


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


def scores(results: Results, name: str, order: str) -> dict[float, float]:
    """The mean scores over the tuning seeds of the rates that have both."""
    found = [(run["rate"], run["seed"]) for (task, key, seed), run in results.items()
             if task == name and seed in TUNED_ON and run["order"] == order]  # fmt: skip
    whole = {rate for rate, _ in found if all((rate, seed) in found for seed in TUNED_ON)}
    return {rate: mean(score(results[name, trial(order, rate), seed]) for seed in TUNED_ON) for rate in whole}


def best_rate(results: Results, name: str, order: str) -> float:
    """The rate with the best score, of equal ones the lower."""
    tried = scores(results, name, order)
    return max(sorted(tried), key=tried.__getitem__)


def missing_rates(results: Results, name: str, order: str) -> list[float]:
    """The rates to try next: none if the best one has both its neighbors."""
    tried = scores(results, name, order)
    if not tried:
        first = best_rate(results, name, MAX_PROB) if order != MAX_PROB else 5e-4
        return [first, 2 * first]
    best = best_rate(results, name, order)
    return [rate for rate in (best / 2, 2 * best) if rate not in tried]


def trial(order: str, rate: float) -> str:
    return f"{order} at {rate:g}"


def load(root: Path) -> Results:
    """The stored runs, and those below `root`, by task, order (or trial) and seed."""
    runs = read_json(STORED) if STORED.exists() else []
    return by_key([*runs, *map(read_json, sorted(root.glob("*/results/*.json")))])


def by_key(runs: Iterable[dict[str, Any]]) -> Results:
    """Runs by task, order (or trial) and seed; of equal ones the last."""
    return {(run["task"], run["key"], run["seed"]): run for run in runs}


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
    seeds = [seed for seed in SEEDS if (name, order, seed) in results and (name, MAX_PROB, seed) in results]
    pairs = [(results[name, order, seed], results[name, MAX_PROB, seed]) for seed in seeds]
    if of in ("full", "few"):
        return [at_equal_diversity(*pair, of) for pair in pairs]
    return [mine[of] - other[of] for mine, other in pairs]


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
        if trials(root, names, load(root)):
            start(TUNED_ON)
        while jobs := trials(root, names, load(root)):
            paired.run_all(jobs, root, options.workers)
            write_json(STORED, list(load(root).values()))
    for seed in () if options.report else options.seeds:
        if jobs := runs_of_seed(root, names, load(root), seed):
            start((seed,))
            paired.run_all(jobs, root, options.workers)
            write_json(STORED, list(load(root).values()))
    results = load(root)
    for rows in (arm_rows(results, "full"), arm_rows(results, "few"), claim_rows(results)):
        print(markdown(rows))


if __name__ == "__main__":
    main()
