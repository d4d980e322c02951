"""Are right answers worth more than one use, and does GRPO add to them? Claims, rules and results: reuse.md.

Every arm of a seed starts from the same model and has the same budget: `BUDGET` row-forwards, where a forward of a row
costs 1 and one with its backward costs 3. They are counted on the model's first block, rollouts and scoring included.

    python -m recipes.studies.reuse tune             the rates of the arms that are tuned
    python -m recipes.studies.reuse study            run what is missing, seed by seed, then print the tables
    python -m recipes.studies.reuse grids            arms of latin again, whose grids are counted, two without the bonus
    python -m recipes.studies.reuse --report         the tables of the stored runs
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
    TIS,
    Callback,
    FakeQuantize,
    Policy,
    Recipe,
    Replay,
    Reward,
    StepFeature,
    Sudoku,
    Trajectory,
    load_policy,
)
from dllm_rl.algorithms.correctors import NoCorrection
from dllm_rl.algorithms.optimizers import LinearDecay
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.files import read_json, write_json
from dllm_rl.models.forward.blocks import blocks_of
from dllm_rl.step.context import StepContext
from dllm_rl.tasks import Problem
from dllm_rl.tasks.rows import load_rows
from dllm_rl.tasks.sudoku.graders import first_cells, units
from dllm_rl.versions import versions
from recipes.countdown_tiny import recipe as countdown
from recipes.latin_sudoku import recipe as latin
from recipes.latin_sudoku import taught_latin
from recipes.studies import paired
from recipes.studies.paired import TUNED_ON, capability, holm, interval, markdown, result_path, sign_flip, warm_up

STORED = Path(__file__).with_suffix(".json")
BUDGET = 80_000  # row-forwards: about 100 steps of GRPO, whose groups without an advantage are not scored
BACKWARD = 2  # of a backward, in forwards
TEMPERATURES = (1.5, 1.0, 0.7, 0.5, 0.3)
SEEDS = range(10, 20)
COLUMNS = ("full@1", "full@0", "few@1", "few@0", "answers@1", "distinct@1")
Results = Mapping[tuple[str, str, int], dict[str, Any]]  # (task, arm or trial, seed) -> what its run left
Job = tuple[str, Callable[[], object]]
GRPO, MANY, RAFT, NO_CAP = "GRPO", "GRPO, four updates", "RAFT with replay", "RAFT with replay, no cap"
ROUNDS, THEN, BOTH = "rounds of filtered answers", "GRPO after filtered answers", "GRPO with replay"
NO_BOXES, RAFT_NO_BOXES = "GRPO, no boxes in the reward", "RAFT with replay, no boxes in the reward"
EXACT = "GRPO, exact likelihood"  # without segments: what TIS needs, and the control of five levels
FIVE, FIVE_TIS = "five levels, GRPO", "five levels, GRPO with TIS"
FIVE_BOTH, FIVE_BOTH_TIS = "five levels, GRPO with replay", "five levels, GRPO with replay and TIS"
PLAIN, BOTH_PLAIN = "GRPO, no entropy bonus", "GRPO with replay, no entropy bonus"  # asked after the claims
COUNTED = (GRPO, RAFT, BOTH, PLAIN, BOTH_PLAIN)  # of latin, again, with their grids counted
COMPARED = (GRPO, MANY, RAFT, NO_CAP, ROUNDS, THEN, BOTH)
UNCAPPED = 10**6


class RowsAndColumns(Sudoku):
    """The reward by the rules, without the boxes: a Latin square with the givens is right."""

    def reward(self, problem: Problem, completion: str) -> Reward:
        puzzle = problem.fields["puzzle"]
        cells = first_cells(completion, 16).ljust(16, ".")
        filled = [cell if given == "0" else given for given, cell in zip(puzzle, cells, strict=True)]
        digits = [len(set("1234").intersection(filled[cell] for cell in unit)) for unit in units(4)[:8]]
        kept = [cell == given for cell, given in zip(cells, puzzle, strict=True) if given != "0"]
        solved = float(all(kept) and digits.count(4) == 8)
        value = solved + 2 * mean(kept) + digits.count(4) / 8 + 2 * sum(digits) / 32
        return Reward(value, True, {"solve_rate": solved})


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
    controls: bool = False  # also with rollouts of five levels, and with rewards that know no boxes


def latin_of(steps: int, controls: bool = False, **more: Any) -> TaskOf:
    """The model of latin_sudoku.py, after so many supervised steps."""
    settings = {"likelihood": Trajectory(num_segments=2), "replay": None} | more  # what `grpo` takes for four steps
    recipe = base_of(replace(latin, name=f"latin-{steps}", model=partial(taught_latin, steps=steps), **settings))
    return TaskOf(recipe, 6.0, "solve_rate", (16, 4), controls=controls)


def base_of(recipe: Recipe) -> Recipe:
    settings: dict[str, Any] = {"rollout_quantization": None, "corrector": NoCorrection(), "report_to": None}
    settings |= {"eval_steps": 0, "save_steps": 10**6, "log_completions_steps": 0, "learning_rate": 5e-4}
    return replace(recipe, **settings)


TASKS = {
    "latin": latin_of(400, controls=True),
    "rare": latin_of(150),
    "never": latin_of(105),
    "noisy": latin_of(400, task=Noisy(**FEW_CLUES)),
    "countdown": TaskOf(base_of(countdown), 1.5, "accuracy", (10, 3), one_start=True, controls=True),
}


def arms_of(task: TaskOf, rates: Mapping[str, float]) -> dict[str, list[dict[str, Any]]]:
    """The arms: of each its phases, which share the budget equally. `rates` has those of the arms that are tuned."""
    grpo = {"learning_rate": rates[GRPO]}
    alone = {"num_iterations": 0, "entropy_coeff": 0.0}
    replay = Replay(min_reward=task.right)
    in_rounds = replay.replace(max_replays=UNCAPPED, num_updates=round(1.08 * (BUDGET / 4 - 256 * task.steps[1]) / 192))
    rounds = alone | {"replay": in_rounds, "train_batch_size": 32, "learning_rate": rates[ROUNDS]}
    both = grpo | {"replay": replay.replace(learning_rate=rates[BOTH])}
    half = in_rounds.replace(num_updates=in_rounds.num_updates // 2)
    arms = {
        GRPO: [grpo],
        MANY: [{"learning_rate": rates[MANY], "num_iterations": 4}],
        RAFT: [alone | {"replay": replay, "learning_rate": rates[RAFT]}],
        NO_CAP: [alone | {"replay": replay.replace(max_replays=UNCAPPED), "learning_rate": rates[RAFT]}],
        ROUNDS: [rounds],
        THEN: [rounds | {"replay": half}, grpo],
        BOTH: [both],
    }
    if task.controls and task.metric == "solve_rate":
        boxless = {"task": RowsAndColumns(**FEW_CLUES)}
        arms |= {NO_BOXES: [grpo | boxless], RAFT_NO_BOXES: [arms[RAFT][0] | boxless]}
        plain = {"entropy_coeff": 0.0}
        arms |= {PLAIN: [grpo | plain], BOTH_PLAIN: [both | plain]}
    if task.controls:
        five = {"rollout_quantization": FakeQuantize(weight="five_level")}
        exact, tis = {"likelihood": Trajectory()}, {"corrector": TIS()}
        if not task.base.likelihood.exact_for_sampler:
            arms[EXACT] = [grpo | exact]
        arms |= {FIVE: [grpo | exact | five], FIVE_TIS: [grpo | exact | five | tis]}
        arms |= {FIVE_BOTH: [both | exact | five], FIVE_BOTH_TIS: [both | exact | five | tis]}
    return arms


GRIDS = {
    GRPO: (2.5e-4, 5e-4, 1e-3),
    MANY: (2.5e-4, 5e-4, 1e-3),
    RAFT: (5e-4, 1e-3, 2e-3, 4e-3),
    ROUNDS: (5e-4, 1e-3, 2e-3, 4e-3),
    BOTH: (5e-4, 1e-3, 2e-3, 4e-3),
}
# Past the ends of grids where the best rate was an end, of what the first page cites: tried after the claims were read.
# They do not change the tuned rates. Of an arm whose mean score they raise, the better rate's ten seeds are run, too.
BEYOND = {
    ("noisy", GRPO): (1.25e-4, 6.25e-5),
    ("noisy", RAFT): (2.5e-4, 1.25e-4, 6.25e-5),
    ("noisy", BOTH): (2.5e-4, 1.25e-4, 6.25e-5),
    ("countdown", GRPO): (2e-3, 4e-3, 8e-3),
}
FIRST = {GRPO: 5e-4, MANY: 5e-4, RAFT: 2e-3, ROUNDS: 2e-3, BOTH: 2e-3}


class Budget(StepFeature, Callback):
    """Counts the row-forwards of a run's steps, ends it when they reach the budget, and is its schedule."""

    def __init__(self, budget: float) -> None:
        self.budget, self.used, self.steps = budget, 0, 0

    @contextmanager
    def around_forward(self, context: StepContext) -> Iterator[None]:
        modules = {id(policy.module): policy.module for policy in (context.policy, context.rollout_policy)}
        handles = [blocks_of(module)[0].register_forward_pre_hook(self.count) for module in modules.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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
            "sft_warmup_steps": 0,
            "output_dir": str(folder / str(phase)),
            "overwrite_output_dir": True,
        }
        policy = train(replace(base, **(settings | dict(changes))), features=(clock,)).policy
        kept |= {f"used, {phase}": clock.used, f"steps, {phase}": clock.steps}
    return policy, kept


def run_one(name: str, root: Path, arm: str, rates: Mapping[str, float], seed: int, key: str) -> None:
    """Train an arm of a seed in its phases, and measure it; leaves `root`/results/`key`_`seed`.json."""
    task = TASKS[name]
    folder = root / "runs" / f"{key}_{seed}"
    policy = load_policy(str(start_of(task, seed, root)))
    kept: dict[str, Any] = {"task": name, "arm": arm, "seed": seed, "rates": dict(rates), "key": key}
    began = time.process_time()
    policy, used = train_phases(task.base, policy, arms_of(task, rates)[arm], seed, folder)
    kept |= used
    kept |= {"seconds": time.process_time() - began, "cpu": capability(), "versions": versions()}
    kept |= measure(task, policy, "validation" if seed in TUNED_ON else "test", folder)
    result_path(root, key, seed).parent.mkdir(parents=True, exist_ok=True)
    write_json(result_path(root, key, seed), kept)
    rmtree(folder)


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


CLAIMS = (
    *(Claim("GRPO with replay is above GRPO", task, BOTH, GRPO) for task in ("latin", "rare", "countdown")),
    *(Claim("RAFT with replay is above GRPO", task, RAFT, GRPO) for task in ("latin", "rare", "countdown")),
    Claim("GRPO is above RAFT with replay where the grader calls wrong answers right", "noisy", GRPO, RAFT, "full@1"),
    Claim("GRPO with replay and GRPO differ there", "noisy", BOTH, GRPO, "full@1"),
    Claim("GRPO and RAFT with replay differ where no answer is right at the start", "never", GRPO, RAFT, "full@0"),
    Claim("GRPO with replay and GRPO differ there", "never", BOTH, GRPO, "full@0"),
    Claim("four replays at most are above no cap, greedy", "rare", RAFT, NO_CAP, "full@0"),
    *(Claim("GRPO with replay and RAFT with replay differ", task, BOTH, RAFT) for task in ("latin", "rare")),
    Claim("GRPO with replay is above GRPO with four updates", "latin", BOTH, MANY),
    Claim("RAFT with replay is above the same with a reward without boxes", "latin", RAFT, RAFT_NO_BOXES),
    Claim("RAFT with replay and rounds of filtered answers differ", "latin", RAFT, ROUNDS),
    Claim("GRPO is above GRPO with rollouts of five levels", "latin", EXACT, FIVE),
    Claim("GRPO is above GRPO with rollouts of five levels", "countdown", GRPO, FIVE),
    *(Claim("of these, TIS is above no correction", task, FIVE_TIS, FIVE) for task in ("latin", "countdown")),
    *(Claim("with replay, TIS adds to it", task, FIVE_BOTH_TIS, FIVE_BOTH) for task in ("latin", "countdown")),
)


def claim_rows(results: Results) -> list[dict[str, str]]:
    found = [(claim, values) for claim in CLAIMS if (values := claim.differences(results))]
    p_values = [sign_flip(values) for _, values in found]
    rows = []
    for (claim, values), adjusted in zip(found, holm(p_values), strict=True):
        row = {"stated before the runs": claim.text, "task": claim.task, "of": claim.of}
        row |= {"difference, 95 %": interval(values), "above 0": f"{sum(v > 0 for v in values)} of {len(values)}"}
        rows.append(row | {"Holm's p": f"{adjusted:.3f}" if len(values) == len(SEEDS) else "-"})
    return rows


def arm_rows(results: Results, name: str) -> list[dict[str, str]]:
    """The arms of a task: their rates, and what they solve more than GRPO at equal diversity."""
    rows = []
    for arm in arms_of(TASKS[name], FIRST):
        runs = runs_of(results, name, arm)
        if runs:
            row = {"arm": arm, "seeds": str(len(runs))}
            for column in COLUMNS:
                row[column] = interval([run[column] for run in runs])
            for of in ("full", "few"):
                more = Claim("", name, arm, GRPO, of).differences(results)
                row[f"{of}, over GRPO"] = interval(more) if more and arm != GRPO else "-"
            rows.append(row)
    return rows


def runs_of(results: Results, name: str, arm: str) -> list[dict[str, Any]]:
    return [results[key] for key in sorted(results) if key[:2] == (name, arm) and key[2] in SEEDS]


def winner_rows(results: Results) -> list[dict[str, str]]:
    """Of each task the arm with the highest mean difference from GRPO at equal diversity, one token a step, and its
    margins. Arms with other rewards or rollouts do not count."""
    rows = []
    studied = {task for task, _, seed in results if seed in SEEDS}  # none after `tune` alone
    for name in (each for each in TASKS if each in studied):
        means = {arm: mean(Claim("", name, arm, GRPO).differences(results)) for arm in COMPARED}
        winner, second = sorted(means, key=means.__getitem__, reverse=True)[:2]
        row = {"task": name, "winner": winner}
        for text, against, of in (("over GRPO", GRPO, "full"), ("over GRPO, few steps", GRPO, "few")):
            row[text] = interval(Claim("", name, winner, against, of).differences(results)) if winner != GRPO else "-"
        margin = interval(Claim("", name, winner, second).differences(results))
        rows.append(row | {"second": second, "over the second": margin})
    return rows


def rate_rows(results: Results) -> list[dict[str, str]]:
    """The rates that won, by tuned arm and task."""
    best = {name: best_rates(results, name) for name in TASKS}
    return [{"tuned": arm} | {name: f"{rates[arm]:g}" for name, rates in best.items()} for arm in GRIDS]


def picture(results: Results, path: Path) -> None:
    """Solve rate against diversity, one token a step: of each task a panel, of each arm its means by temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in TASKS if name != "never"]  # there all arms solve almost nothing
    figure, axes = plt.subplots(1, len(names), figsize=(13, 3.6), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for place, arm in enumerate(COMPARED):
            means = [
                [mean(run[f"{of}@{t:g}"] for run in runs_of(results, name, arm)) for of in ("answers", "full")]
                for t in TEMPERATURES
            ]
            shown = [point for point in means if point[1] > 0.02]  # with fewer, `answers` is of a few problems
            axis.plot(*zip(*shown, strict=True), ".-", color=f"C{place}", label=arm)
        axis.set(title=name, xlabel="answers: different right ones", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("solved")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def best_rates(results: Results, name: str) -> dict[str, float]:
    """Of each tuned arm the rate with the highest mean score over the tuning seeds, of equal ones the lower."""
    rates = dict(FIRST)
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


def beyond_rows(results: Results) -> list[dict[str, str]]:
    """The arms whose best rate lies past their grid's end: what they solve there, and over their claimed selves."""
    rows = []
    for name in TASKS:
        tuned = best_rates(results, name)
        for arm, rate in better_beyond(results, name).items():
            runs = runs_of(results, name, trial(arm, rate))
            row = {"task": name, "arm": arm, "rate": f"{rate:g} ({tuned[arm]:g})", "seeds": str(len(runs))}
            row |= {column: interval([run[column] for run in runs]) for column in COLUMNS[:4] if runs}
            more = Claim("", name, trial(arm, rate), arm).differences(results)
            rows.append(row | {"full, over the claimed rate": interval(more) if more else "-"})
    return rows


def grid_rows(results: Results) -> list[dict[str, str]]:
    """Of latin's arms whose grids were counted: right answers at temperature 1, and the different grids among them."""
    rows = []
    for arm in COUNTED:
        if runs := runs_of(results, "latin", f"{arm}, grids counted"):
            counts = {name: interval([run[f"{name}@1"] for run in runs]) for name in ("full", "answers", "texts")}
            rows.append({"arm": arm, "seeds": str(len(runs)), **counts})
    return rows


def trial(arm: str, rate: float) -> str:
    return f"{arm} at {rate:g}"


def jobs_of(which: str, name: str, root: Path, seeds: Sequence[int], results: Results) -> Iterator[Job]:
    """What is missing of a task: its trials, or its arms at the best rates."""
    rates = best_rates(results, name)
    for seed in seeds:
        if which == "tune":  # the other arms' rates do not matter to an arm but GRPO's to GRPO with replay
            grids = {arm: grid + BEYOND.get((name, arm), ()) for arm, grid in GRIDS.items()}
            wanted = [(trial(arm, rate), arm, rates | {arm: rate}) for arm, grid in grids.items() for rate in grid]
        elif which == "grids":
            wanted = [(f"{arm}, grids counted", arm, rates) for arm in COUNTED if name == "latin"]
        else:
            wanted = [(arm, arm, rates) for arm in arms_of(TASKS[name], rates) if arm not in (PLAIN, BOTH_PLAIN)]
            better = better_beyond(results, name)
            wanted += [(trial(arm, rate), arm, rates | {arm: rate}) for arm, rate in better.items()]
        for key, arm, used in wanted:
            if (name, key, seed) not in results:
                yield f"{name} {key} {seed}", partial(run_one, name, root / name, arm, used, seed, key)


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


def page_tables() -> dict[str, str]:
    runs = by_key(read_json(STORED))
    rows = {"rates": rate_rows, "claims": claim_rows, "winners": winner_rows, "past the ends": beyond_rows}
    rows |= {"grids": grid_rows} | {f"arms of {name}": partial(arm_rows, name=name) for name in TASKS}
    return {name: markdown(of(runs)) for name, of in rows.items()}


def main() -> None:
    which = paired.which(("study", "tune", "grids"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reuse"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=None)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    root = options.output_dir
    if not options.report:
        seeds = options.seeds or (TUNED_ON if which == "tune" else SEEDS)
        tuned = load(root)
        untuned = [n for n in options.tasks if not all(scores_of(tuned, n, arm, grid) for arm, grid in GRIDS.items())]
        if which != "tune" and untuned:
            raise SystemExit(f"no rates of {', '.join(untuned)}: run `python -m recipes.studies.reuse tune` first")
        for seed in seeds:  # seed by seed, so that every finished seed has all arms of all tasks
            results = load(root)
            jobs = {name: list(jobs_of(which, name, root, [seed], results)) for name in options.tasks}
            starts = [(f"{name} start {seed}", partial(start_of, TASKS[name], seed, root / name)) for name in jobs]
            paired.run_all([start for start in starts if jobs[start[0].split()[0]]], root, options.workers)
            paired.run_all([job for each in jobs.values() for job in each], root, options.workers)
            write_json(STORED, list(load(root).values()))
    results = load(root)
    print(markdown(rate_rows(results)))
    print(markdown(winner_rows(results)))
    for name in options.tasks:
        print(f"{name}\n\n{markdown(arm_rows(results, name))}")
    print(markdown(claim_rows(results)))
    print(markdown(beyond_rows(results)))
    print(markdown(grid_rows(results)))
    if not options.report:
        picture(results, STORED.with_suffix(".png"))


if __name__ == "__main__":
    main()
