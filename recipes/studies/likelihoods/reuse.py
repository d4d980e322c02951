"""The tasks, the budget and the measure of the study of training orders (training_order.py).

Every run has the same budget: `BUDGET` row-forwards, where a forward of a row costs 1 and one with its backward costs
3. They are counted on the model's first block, rollouts and scoring included. The stored runs are trials of learning
rates of GRPO under `MaxProb`, of a study of replay (docs/results-and-limits.md, archived studies).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from dllm_rl import Callback, Policy, Recipe, Trajectory
from dllm_rl.algorithms.correctors import NoCorrection
from dllm_rl.algorithms.optimizers import LinearDecay
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.files import read_json
from dllm_rl.models.forward.blocks import blocks_of
from dllm_rl.step.context import StepContext
from dllm_rl.tasks import Problem, Reward, Sudoku
from dllm_rl.tasks.rows import load_rows
from recipes.countdown_tiny import recipe as countdown
from recipes.latin_sudoku import recipe as latin
from recipes.latin_sudoku import taught_latin
from recipes.studies.paired import TUNED_ON, warm_up

STORED = Path(__file__).with_suffix(".json")
BUDGET = 80_000  # row-forwards: about 100 steps of GRPO, whose groups without an advantage are not scored
BACKWARD = 2  # of a backward, in forwards
TEMPERATURES = (1.5, 1.0, 0.7, 0.5, 0.3)
SEEDS = range(10, 20)
Results = Mapping[tuple[str, str, int], dict[str, Any]]  # (task, arm or trial, seed) -> what its run left
Job = tuple[str, Callable[[], object]]
GRPO = "GRPO"


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


GRIDS = {GRPO: (2.5e-4, 5e-4, 1e-3)}
# Past the ends of the grid where the best rate was an end.
BEYOND = {("noisy", GRPO): (1.25e-4, 6.25e-5), ("countdown", GRPO): (2e-3, 4e-3, 8e-3)}


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
    from dllm_rl.training.trainer import train

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


@dataclass(frozen=True)
class Claim:
    """`arm` less `against` on a task: `of` a column, or "equal diversity" in all steps ("full") or few ("few")."""

    text: str
    task: str
    arm: str
    against: str
    of: str = "full"

    def differences(self, results: Results, of_seeds: Sequence[int] = SEEDS) -> list[float]:
        seeds = [s for s in of_seeds if all((self.task, arm, s) in results for arm in (self.arm, self.against))]
        pairs = [(results[self.task, self.arm, s], results[self.task, self.against, s]) for s in seeds]
        if self.of in ("full", "few"):
            return [at_equal_diversity(*pair, self.of) for pair in pairs]
        return [mine[self.of] - other[self.of] for mine, other in pairs]


def best_rates(results: Results, name: str) -> dict[str, float]:
    """Of each tuned arm the rate with the highest mean score over the tuning seeds, of equal ones the lower."""
    rates = {GRPO: 5e-4}
    for arm, grid in GRIDS.items():
        scores = scores_of(results, name, arm, grid)
        rates[arm] = max(scores, key=scores.__getitem__) if scores else rates[arm]
    return rates


def scores_of(results: Results, name: str, arm: str, grid: Sequence[float]) -> dict[float, float]:
    """The mean scores over the tuning seeds of those rates that have all of them."""
    runs = {rate: [results.get((name, trial(arm, rate), seed)) for seed in TUNED_ON] for rate in grid}
    return {rate: mean(score(run) for run in found if run) for rate, found in runs.items() if all(found)}


def better_beyond(results: Results, name: str) -> dict[str, float]:
    """Of each arm of BEYOND the rate past the grid's end whose score is above that of all rates of the grid."""
    better = {}
    for (task, arm), grid in BEYOND.items():
        scores = scores_of(results, name, arm, GRIDS[arm] + grid)
        best = max(scores, key=scores.__getitem__) if scores else None
        if task == name and best in grid:
            better[arm] = best
    return better


def trial(arm: str, rate: float) -> str:
    return f"{arm} at {rate:g}"


def start_of(task: TaskOf, seed: int, root: Path) -> Path:
    """The checkpoint that all arms of a seed start from."""
    first = 100 if task.one_start else seed
    return warm_up(task.base, first, root / "warm" / str(first))


def load(root: Path, stored: Path = STORED) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The stored runs, and those below `root`, by task, arm (or trial) and seed."""
    runs = read_json(stored) if stored.exists() else []
    return by_key([*runs, *map(read_json, sorted(root.glob("*/results/*.json")))])


def by_key(runs: Iterable[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Runs by task, arm (or trial) and seed; of equal ones the last."""
    return {(run["task"], run["key"], run["seed"]): run for run in runs}
