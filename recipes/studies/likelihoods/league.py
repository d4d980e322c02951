"""Published methods for RL of diffusion language models, in equal time and tuned alike. Claims before the runs.

Every method trains its seed's one warmed-up model: 16 prompts of 8 completions, fp32, unquantized. Held-out problems
are decoded greedily in as many steps as the rollouts. A method's number of steps is the budget over the time of one of
its steps, measured first, by one thread, with nothing else running. The runs share the machine and take longer, not all
by the same share: "s in all" in the tables is what they took, with start and evaluation.

Tuning: a method takes one update a rollout, or as many as its authors, at the rates of GRID. Updates draw fresh masks.
All settings run on seed 100, the two best of them on 101 and 102 too, on problems of their own; the best mean is run on
the league's ten seeds. The claims: the default ends above each other row. Holm's correction counts those of one task.

For time all of LEAGUES but one have fewer rows. An earlier one of five seeds, without fresh masks, had those
that Countdown leaves out below the default there: league_countdown_first.json. The two longer ones were added when the
others had run, before their own runs: is the default behind `one step` there too, and with eight steps a completion?
Those of four steps came last. In 12 s with a further claim: a random part of the steps, whose gradient is unbiased,
ends above as many segments, whose gradient is not ("two sampled" and "two segments"; its exact p is counted by itself).
When it had failed, and all steps had ended behind two segments, those of 60 s were added: do all steps make up for it?

Then two more, stated before their runs. 16 steps in 60 s: the default there is four segments. The few-clues task
(few clues, many answers) in four steps and 60 s: a second task for two segments against all steps. If two segments end
significantly above all steps there as well, `grpo` merges four steps into two. (They did, and it does.) A third, the
few-clues recipe itself in two steps and 24 s, was stated with them and not run, for time.

A second task for 12 to 31 steps, stated before its runs: few clues in sixteen steps and 60 s, from 85 supervised steps
(after the recipe's 400 nothing is left to learn). If two segments end significantly above four there as well, `grpo`
takes two segments up to 31 steps; else it goes on with a segment for every four steps, and that is the advice.

Each row is another gradient. With one update those of TraceRL without its value model, GSPO and DAPO are one: "every
step" stands for TraceRL and GSPO, and DAPO's row differs by the groups that it draws again.
`Trajectory(num_segments=1)` is `OneStep(prompt_mask=0)`.

    python -m recipes.studies.likelihoods.league sudoku
        costs, tuning, runs, league_sudoku.json, the table and the figure
    python -m recipes.studies.likelihoods.league countdown        or another of LEAGUES
    python -m recipes.studies.likelihoods.league sudoku --report  the table of league_sudoku.json
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl import Recipe
from dllm_rl.algorithms.advantages import Advantages, GroupRelative, LeaveOneOut
from dllm_rl.algorithms.correctors import NoCorrection
from dllm_rl.algorithms.losses import GSPO, PPOClip, Reinforce, SequenceMean, TokenMean
from dllm_rl.files import read_json, write_json
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.records import Record
from dllm_rl.samplers.rules import RandomOrder
from dllm_rl.types.groups import group_sizes
from recipes import countdown_tiny, sudoku_tiny, sudoku_unique
from recipes.examples import bounds
from recipes.studies.likelihoods.surrogates import GDSD, StableDRL, UniformSteps
from recipes.studies.paired import (
    Contrast,
    Results,
    Study,
    by_arm,
    contrast_rows,
    interval,
    load,
    markdown,
    restore_runs,
    run_all,
    run_missing,
    warm_up,
)

TUNED_ON = (100, 101, 102)
SEEDS = 10
DEFAULT = "every step"
SPG_BOUNDS = bounds.Sandwich(beta=1.0, mix=0.5, base=lik.Coupled())  # beta: of SPG's Sudoku runs

centered = GroupRelative(scale_rewards="none")
dual_clip = PPOClip(delta=1.2)


class WD1(Advantages):
    """wd1's weights: softmax(A) - softmax(-A) over the group, A = R - mean, times G (arXiv 2507.08838, its authors'
    code [paper]; there the softmax is over a process's rows, which are one group)."""

    def __call__(self, rewards: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        apart = centered(rewards, group).split(group_sizes(group))
        return torch.cat([len(x) * (torch.softmax(x, 0) - torch.softmax(-x, 0)) for x in apart])


# Likelihood, objective, advantages and updates are the papers' or their code's; `sampler`: what differs in the rollout.
# Batch, optimizer and no KL term are the league's. ELBOs come from `Coupled`, each token under one of two masks. A
# sequence's ratio has a clip of 0.2, as in ESPO's scripts. The others
# get two updates as well, with a dual clip (DAPO: its own). Formulas and sources: the docstrings of what is named here.
METHODS: dict[str, dict[str, Any]] = {
    # All masked at once, 15 % of the prompt too, anew in each update; PPO's clip per token.
    "d1": {
        "likelihood": lik.OneStep(prompt_mask=0.15),
        "loss": PPOClip(epsilon=0.5),
        "advantages": centered,
        "loss_reduction": TokenMean(),
        "num_iterations": 8,
    },
    # One estimate of log p, no ratio, softmax weights of both signs.
    "wd1": {
        "likelihood": lik.OneStep(prompt_mask=0.15),
        "loss": Reinforce(),
        "advantages": WD1(),
        "loss_reduction": SequenceMean(),
        "num_iterations": 8,
    },
    # The ELBO's ratio per sequence, over its length, clipped; two Monte Carlo samples.
    "ESPO": {
        "likelihood": lik.Coupled(num_samples=2),
        "loss": GSPO(epsilon=0.2, epsilon_high=0.2),
        "advantages": LeaveOneOut(),
        "loss_reduction": SequenceMean(),
        "num_iterations": 8,
    },
    # A lower bound where A >= 0, an upper one mixed in where A < 0. Ours: PPO's clip per token; masks not by block.
    "SPG": {"likelihood": SPG_BOUNDS, "advantages": centered, "num_iterations": 4},
    # SPG's bounds; the ratio per sequence, clipped whatever the sign, normalized over the batch.
    "StableDRL": {
        "likelihood": SPG_BOUNDS,
        "loss": StableDRL(),
        "advantages": centered,
        "loss_reduction": SequenceMean(),
        "num_iterations": 2,
    },
    # A regression of the sequence's log-ratio on the advantage.
    "GDSD": {
        "likelihood": lik.Coupled(),
        "loss": GDSD(psi=1.0),
        "advantages": centered,
        "loss_reduction": SequenceMean(),
        "num_iterations": 8,
    },
    # Rollouts a token a step from left to right, each token's own conditional. Two positions a row are scored, ours:
    # with all 16 there is time for three steps.
    "JustGRPO": {
        "likelihood": UniformSteps(k=2),
        "sampler": {"diffusion_steps": None, "block_size": 1},
        "loss": dual_clip,
        "num_iterations": 2,
    },
    # The recorded trajectory, PPO's clip per token, without TraceRL's value model: the library's default too.
    DEFAULT: {"likelihood": lik.Trajectory(), "loss": dual_clip, "num_iterations": 2},
    # The trajectory; groups of one reward drawn again, a clip that is higher above than below.
    "DAPO": {
        "likelihood": lik.Trajectory(),
        "loss": PPOClip(epsilon=0.2, epsilon_high=0.28),
        "max_num_gen_batches": 4,
        "num_iterations": 2,
    },
    "random order": {
        "likelihood": lik.Trajectory(),
        "sampler": {"rank": RandomOrder()},
        "loss": dual_clip,
        "num_iterations": 2,
    },
    "one step": {"likelihood": lik.OneStep(prompt_mask=0.0), "loss": dual_clip, "num_iterations": 2},
    # The trajectory's steps in two segments: between the default and `one step`.
    "two segments": {"likelihood": lik.Trajectory(num_segments=2), "loss": dual_clip, "num_iterations": 2},
    "four segments": {"likelihood": lik.Trajectory(num_segments=4), "loss": dual_clip, "num_iterations": 2},
    # As many forwards as two segments have, without their bias: random steps of each row, weighted.
    "two sampled": {"likelihood": UniformSteps(k=2), "loss": dual_clip, "num_iterations": 2},
}

BETWEEN = ("two segments", "four segments", "two sampled")  # one step and all steps: for four and more
ALL = tuple(method for method in METHODS if method not in BETWEEN)


@dataclass(frozen=True)
class League:
    """What is compared: a task, `methods`, `seconds` of a run's steps by one thread, `diffusion_steps` of an answer.
    `default`: the method that the others are compared with, which is `grpo`'s default when the claims were stated."""

    recipe: Recipe
    metric: str
    diffusion_steps: int
    seconds: float = 12.0
    methods: tuple[str, ...] = ALL
    default: str = DEFAULT


SUDOKU = League(sudoku_unique.recipe, "solve_rate", diffusion_steps=2)
LEAGUES = {
    "sudoku": SUDOKU,
    "sudoku_60_s": replace(SUDOKU, seconds=60.0, methods=(DEFAULT, "one step")),
    "sudoku_8_steps": replace(
        SUDOKU, diffusion_steps=8, seconds=48.0, methods=(DEFAULT, "two segments", "one step", "wd1")
    ),
    "sudoku_4_steps": replace(SUDOKU, diffusion_steps=4, methods=(DEFAULT, "two segments", "two sampled", "one step")),
    "sudoku_4_steps_60_s": replace(
        SUDOKU, diffusion_steps=4, seconds=60.0, methods=(DEFAULT, "two segments", "one step")
    ),
    "sudoku_16_steps": replace(
        SUDOKU,
        diffusion_steps=16,
        seconds=60.0,
        methods=("four segments", "two segments", "one step"),
        default="four segments",
    ),
    "few_clues_4_steps": League(
        sudoku_tiny.recipe,
        "solve_rate",
        diffusion_steps=4,
        seconds=60.0,
        methods=(DEFAULT, "two segments", "one step"),
    ),
    "few_clues_16_steps": League(
        replace(sudoku_tiny.recipe, model=partial(sudoku_tiny.taught, steps=85)),
        "solve_rate",
        diffusion_steps=16,
        seconds=60.0,
        methods=("four segments", "two segments"),
        default="four segments",
    ),
    "countdown": League(
        countdown_tiny.recipe,
        "accuracy",
        diffusion_steps=3,
        methods=tuple(each for each in ALL if each not in ("ESPO", "SPG", "StableDRL", "JustGRPO")),
    ),
}
# Every run. Most records have no commit: it is the one that added them.
STORED = {name: Path(__file__).with_name(f"league_{name}.json") for name in LEAGUES}

GRID: dict[str, dict[str, Any]] = {
    f"one update, {rate}": {"learning_rate": float(rate), "num_iterations": 1} for rate in ("2e-4", "5e-4", "1e-3")
} | {f"all updates, {rate}": {"learning_rate": float(rate)} for rate in ("1e-4", "3e-4")}


def study_of(name: str) -> Study:
    """The league's methods in all settings, and the claims, which are of methods."""
    league = LEAGUES[name]
    steps = {
        each: getattr(league.recipe, each).replace(diffusion_steps=league.diffusion_steps)
        for each in ("sampler", "eval_sampler")
    }
    base = league.recipe.replace(
        train_batch_size=16,
        max_retained_graphs=16,
        corrector=NoCorrection(),
        rollout_quantization=None,
        **steps,
    )
    arms = {}
    for method, (setting, more) in product(league.methods, GRID.items()):
        changes = METHODS[method]
        sampler = base.sampler.replace(**changes.get("sampler", {}))
        arms[f"{method}, {setting}"] = changes | more | {"sampler": sampler}
    others = (each for each in league.methods if each != league.default)
    claims = tuple(Contrast(f"above {each}", league.default, each) for each in others)
    solved = {"rollouts solved": f"rewards/{league.metric}/mean"}
    return Study("league", base, arms, {}, solved, seeds=SEEDS, num_steps=0, contrasts=claims, metric=league.metric)


def method_of(arm: str) -> str:
    return arm.split(", ")[0]


def same_cost(arm: str) -> str:
    """The arm without its learning rate, which costs nothing."""
    return arm.rsplit(", ", 1)[0]


def measure(study: Study, root: Path) -> None:
    """Adds to `root`/costs.json the seconds of a step of each method and number of updates that it lacks, one thread,
    nothing else running: the median of six steps, the lesser of two rounds. Stored costs may be of another machine: one
    of them is measured again beside the missing ones, which are scaled by its stored cost over its new one."""
    from dllm_rl.monitoring.plots import read_metrics
    from dllm_rl.training.trainer import train

    path, folder = root / "costs.json", root / "runs" / "cost"
    found: dict[str, float] = read_json(path) if path.exists() else {}
    arms = {same_cost(arm): changes for arm, changes in study.arms.items()}
    missing = {name: changes for name, changes in arms.items() if name not in found}
    known = next((name for name in arms if name in found), None) if missing else None
    warm = warm_up(study.base, TUNED_ON[0], root / "tuning" / "warm" / str(TUNED_ON[0]))
    few = {
        "model": str(warm),
        "warmup": {"steps": 0},
        "num_steps": 8,
        "evaluation": {"steps": 0},
        "log": {"report_to": None},
    }
    here: dict[str, float] = {}
    for _ in range(2):
        for name, changes in (missing if known is None else {known: arms[known]} | missing).items():
            settings = changes | few | {"output_dir": str(folder), "overwrite_output_dir": True}
            train(study.base.replace(**settings))
            seconds = median(row["step_time"] for row in read_metrics(folder)[2:])
            here[name] = min(seconds, here.get(name, seconds))
    scale = 1.0 if known is None else found[known] / here[known]
    write_json(path, found | {name: here[name] * scale for name in missing})


def steps_of(costs: Mapping[str, float], arm: str, seconds: float) -> int:
    return max(1, round(seconds / costs[same_cost(arm)]))


def shortlist(tuning: Results) -> dict[str, list[str]]:
    """By method: the two arms with the best rates on the first of TUNED_ON."""
    first = TUNED_ON[0]
    arms = sorted((arm for arm, seed in tuning if seed == first), key=lambda arm: -tuning[arm, first]["after"])
    return {method: [arm for arm in arms if method_of(arm) == method][:2] for method in map(method_of, arms)}


def best(tuning: Results) -> dict[str, str]:
    """By method: the arm of its shortlist with the best mean over TUNED_ON."""

    def rate(arm: str) -> float:
        return mean(tuning[arm, seed]["after"] for seed in TUNED_ON)

    return {method: max(arms, key=rate) for method, arms in shortlist(tuning).items()}


def rows_of(name: str, results: Results) -> list[dict[str, str]]:
    """By method, the best mean first: its rate, the claim, the setting that its trials chose, steps and seconds."""
    runs = {(method_of(arm), seed): run | {"arm": arm} for (arm, seed), run in results.items()}
    claims = {row["less"]: row for row in contrast_rows(study_of(name), runs)}
    by_method: dict[str, list[dict[str, Any]]] = {}
    for (method, _), run in runs.items():
        by_method.setdefault(method, []).append(run)
    rows = []
    for method, its in sorted(by_method.items(), key=lambda each: -mean(run["after"] for run in each[1])):
        row = {"method": method, "held-out rate, 95 %": interval([run["after"] for run in its])}
        claim = claims.get(method, {"seeds": "-", "difference, 95 %": "-", "Holm's p": "-"})
        row |= {"default beats it by": claim["difference, 95 %"], "Holm's p": claim["Holm's p"]}
        row["seeds"] = claim["seeds"]
        seconds = [run["s"] for run in its if "s" in run]  # a run that diverged has none
        row |= {"setting": its[0]["arm"].split(", ", 1)[1], "steps": str(its[0]["num_steps"])}
        rows.append(row | {"s in all": f"{mean(seconds):.0f}" if seconds else "-"})
    return rows


def told(name: str, results: Results) -> str:
    """The table, as the document holds it."""
    columns = ("method", "held-out rate, 95 %", "default beats it by", "Holm's p", "steps", "s in all", "setting")
    return markdown(rows_of(name, results), columns)


def settings() -> str:
    """The table of what each method changes, from METHODS: what is left out is the league's."""

    def named(part: Any) -> str:
        """A record with the settings that differ from its defaults, as one writes it."""
        if not isinstance(part, Record):
            return repr(part)
        changed = [each for each in fields(part) if getattr(part, each.name) != each.default]
        return f"{type(part).__name__}({', '.join(f'{f.name}={named(getattr(part, f.name))}' for f in changed)})"

    base = study_of("sudoku").base
    usual = {
        "loss": base.resolved_loss,
        "advantages": base.advantages,
        "loss_reduction": TokenMean(),
    }
    rows = []
    for method, changes in METHODS.items():
        row = {"method": method, "likelihood": f"`{named(changes['likelihood'])}`"}
        row |= {part: f"`{named(changes.get(part, own))}`" for part, own in usual.items()}
        other = changes.get("sampler", {}) | {key: changes[key] for key in ("max_num_gen_batches",) if key in changes}
        row["rollouts"] = ", ".join(f"`{key}={named(value)}`" for key, value in other.items()) or "-"
        rows.append(row | {"all updates": str(changes["num_iterations"])})
    return markdown(rows)


def stored_rows(name: str) -> list[dict[str, str]]:
    """`rows_of` the runs that are committed."""
    return rows_of(name, by_arm(read_json(STORED[name])["runs"]))


def above_the_default() -> str:
    """A table of the page: by league, which rows are shown to be above the default of its time."""
    rows = []
    for name, league in LEAGUES.items():
        others = [row for row in stored_rows(name) if row["method"] != league.default]
        above = [row for row in others if row["default beats it by"].startswith("-") and float(row["Holm's p"]) < 0.05]
        cell = {"task, steps of a completion": f"{league.recipe.name}, {league.diffusion_steps}"}
        cell |= {"budget, s": f"{league.seconds:.0f}", "default then": league.default}
        cell |= {"rows beside it": str(len(others))}
        rows.append(cell | {"shown to be above it": ", ".join(row["method"] for row in above) or "none"})
    return markdown(rows)


def restore(name: str, root: Path) -> None:
    """Put the committed runs of a league into its folder, so that the command runs only methods that they lack."""
    parts = read_json(STORED[name])
    restore_runs(parts["tuning"], root / "tuning")
    restore_runs(parts["runs"], root)
    write_json(root / "costs.json", parts["costs"])


def page_tables() -> dict[str, str]:
    leagues = {name: told(name, by_arm(read_json(STORED[name])["runs"])) for name in LEAGUES}
    return {"settings": settings(), "above the default": above_the_default()} | leagues


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("league", choices=LEAGUES)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--restore", action="store_true", help="take the committed runs: only new methods run")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true", help="run nothing: the table of the committed runs")
    options = parser.parse_args()
    if options.report:
        print(markdown(stored_rows(options.league)))
        return
    root = options.output_dir or Path("runs") / f"league-{options.league}"
    study = study_of(options.league)
    trials = replace(study, base=replace(study.base, eval_task=study.base.validation_task))
    if options.restore:
        restore(options.league, root)

    run_all([("costs", partial(measure, study, root))], root, 1)
    costs, seconds = read_json(root / "costs.json"), LEAGUES[options.league].seconds
    run = partial(run_missing, num_steps=lambda arm: steps_of(costs, arm, seconds), workers=options.workers)
    run(trials, root / "tuning", product(study.arms, TUNED_ON[:1]))
    second = [arm for arms in shortlist(load(root / "tuning")).values() for arm in arms]
    run(trials, root / "tuning", product(second, TUNED_ON[1:]))
    tuning = load(root / "tuning")
    run(study, root, [(arm, seed) for seed, arm in product(range(SEEDS), best(tuning).values())])
    results = load(root)
    parts = {"costs": costs, "tuning": list(tuning.values()), "runs": list(results.values())}
    write_json(STORED[options.league], parts)
    print(markdown(rows_of(options.league, results)))


if __name__ == "__main__":
    main()
