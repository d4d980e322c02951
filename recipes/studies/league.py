"""Published methods for RL of diffusion language models on one task, in equal time, tuned by the same budget.

Every method trains its seed's one warmed-up model on 4x4 Sudoku, 16 prompts of 8 completions, rollouts of two parallel
steps, fp32; held-out puzzles are filled in greedily in two steps (Countdown: expressions, three steps in both). A
method's number of steps is the budget over the time of one of its steps, which is measured first, with one thread and
nothing else running. Each is tried in the settings of GRID, on a seed and on puzzles of their own; the best of them is
run on the league's seeds. What a method is here, and what it leaves out of its paper: METHODS. Finished runs are kept
as one JSON each below `--output_dir`; league_TASK.json has each seed and the tuning. What the numbers say: league.md.

    python -m recipes.studies.league                   costs, tuning, runs, table and figure
    python -m recipes.studies.league --task countdown
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_rl.algorithms.advantages import group_relative, leave_one_out
from dllm_rl.algorithms.correctors import ais, none
from dllm_rl.algorithms.losses import gspo, ppo_clip, reinforce, sequence, token
from dllm_rl.files import read_json, write_json
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.quantization.schemes import float8_weight_only
from dllm_rl.samplers.rules import random
from recipes import countdown_tiny, sudoku_tiny
from recipes.studies.paired import Study, interval, load, markdown, run_all, run_missing, warm_up, write_rows
from recipes.studies.surrogates import gdsd, stable_drl

TUNED_ON = 100  # a seed that the league does not have
DEFAULT = "TraceRL (the default)"


def wd1(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """wd1's weights: softmax(A) - softmax(-A) over the group, A = R - mean, times G (arXiv 2507.08838, its authors'
    code [paper]; there the softmax is over a process's rows, which are one group)."""
    centred = group_relative(rewards, scale_rewards="none")
    return rewards.shape[-1] * (torch.softmax(centred, -1) - torch.softmax(-centred, -1))


# Likelihood, objective and, as `sampler`, what the rollout's differs in are the papers'; batch, optimiser, no KL term
# are the league's. ELBO-based ones share one estimator, `coupled`, so that what differs is the objective;
# length-normalised ratios have a clip of 0.2. Formulas, sources and tags: the docstrings of what is named here.
METHODS: dict[str, dict[str, Any]] = {
    # diffu-GRPO: all masked at once, 15 % of the prompt too; A = R - mean; PPO's clip per token.
    "d1": {
        "likelihood": lik.one_step(prompt_mask=0.15),
        "advantages": partial(group_relative, scale_rewards="none"),
        "aggregate": sequence,
    },
    # The ELBO's ratio per sequence, over its length, clipped; leave-one-out advantages.
    "ESPO": {
        "likelihood": lik.coupled(num_samples=1),
        "loss": partial(gspo, epsilon=0.2, epsilon_high=0.2),
        "advantages": leave_one_out,
        "aggregate": sequence,
    },
    # A lower bound where A >= 0, an upper one mixed in where A < 0.
    "SPG": {"likelihood": lik.sandwich(base=lik.coupled(num_samples=1))},
    # One estimate of log p, no ratio, softmax weights of both signs.
    "wd1": {
        "likelihood": lik.one_step(prompt_mask=0.15),
        "loss": reinforce,
        "advantages": wd1,
        "aggregate": sequence,
    },
    # A regression of the sequence's log-ratio on the advantage.
    "GDSD": {
        "likelihood": lik.coupled(num_samples=1),
        "loss": gdsd,
        "aggregate": sequence,
    },
    # The ELBO's ratio per sequence, clipped whatever the sign, normalised over the batch.
    "StableDRL": {
        "likelihood": lik.coupled(num_samples=1),
        "loss": stable_drl,
        "aggregate": sequence,
    },
    # Rollouts a token a step from left to right, each token's own conditional; two positions a row are scored, ours.
    "JustGRPO": {"likelihood": lik.trajectory(num_sampled=2), "sampler": {"num_steps": None, "block_size": 1}},
    # The recorded trajectory, PPO's clip per token (without its value model): the library's default too.
    DEFAULT: {"likelihood": lik.trajectory()},
    # The trajectory, its clip higher above than below, a mean over tokens, groups of one reward drawn again.
    "DAPO": {
        "likelihood": lik.trajectory(),
        "loss": partial(ppo_clip, epsilon=0.2, epsilon_high=0.28),
        "aggregate": token,
        "max_num_gen_batches": 4,
    },
    # The trajectory's ratio per sequence, over its length, clipped.
    "GSPO": {
        "likelihood": lik.trajectory(),
        "loss": partial(gspo, epsilon=0.2, epsilon_high=0.2),
        "aggregate": sequence,
    },
    # The default's, in random order.
    "random order": {"likelihood": lik.trajectory(), "sampler": {"rank": random}},
    "random order with FP8 and AIS": {
        "likelihood": lik.trajectory(),
        "corrector": ais(),
        "rollout_quantization": partial(float8_weight_only, dequantised=True),
        "sampler": {"rank": random},
    },
}
GRID: dict[str, dict[str, Any]] = {
    "lr 1e-4": {"learning_rate": 1e-4},
    "lr 2e-4": {"learning_rate": 2e-4},
    "lr 5e-4": {},
    "lr 1e-3": {"learning_rate": 1e-3},
    "lr 5e-4, two updates": {"num_iterations": 2},
}
TASKS = {"sudoku": (sudoku_tiny.recipe, "solve_rate"), "countdown": (countdown_tiny.recipe, "accuracy")}


def study_of(task: str, seeds: int) -> Study:
    """All methods in all settings; which of them are run is `main`'s to say."""
    recipe, metric = TASKS[task]
    base = replace(
        recipe, train_batch_size=16, kept_graphs=4, corrector=none(), rollout_quantization=None, learning_rate=5e-4
    )
    arms = {}
    for method, changes in METHODS.items():
        sampler = partial(base.sampler, **changes.get("sampler", {}))
        for setting, more in GRID.items():
            arms[f"{method}, {setting}"] = changes | more | {"sampler": sampler}
    metrics = {"area": f"rewards/{metric}/mean"}
    return Study("league", base, arms, {}, metrics, seeds=seeds, num_steps=0, metric=metric)


def costs(study: Study, root: Path) -> None:
    """Adds to `root`/costs.json the seconds of a step of every arm that it lacks, one thread, nothing else running: the
    median of six steps, the lesser of two rounds of all arms. A learning rate costs nothing."""
    from dllm_rl.monitoring.plots import read_metrics
    from dllm_rl.training.loop import train

    path, folder = root / "costs.json", root / "runs" / "cost"
    found: dict[str, float] = read_json(path) if path.exists() else {}
    missing = [arm for arm in study.arms if "lr 5e-4" in arm and arm not in found]
    warm = warm_up(study.base, TUNED_ON, root / "tuning" / "warm" / str(TUNED_ON))
    few = {"model": str(warm), "warmup_steps": 0, "num_steps": 8, "eval_steps": 0, "report_to": None}
    for _ in range(2):
        for arm in missing:
            changes = study.arms[arm] | few | {"output_dir": str(folder), "overwrite_output_dir": True}
            train(replace(study.base, **changes))
            seconds = median(row["step_time"] for row in read_metrics(folder)[2:])
            found[arm] = min(seconds, found.get(arm, seconds))
    alike = {arm: arm if "two updates" in arm else f"{arm.split(', ')[0]}, lr 5e-4" for arm in study.arms}
    write_json(path, {arm: found[other] for arm, other in alike.items()})


def steps_of(root: Path, arm: str, seconds: float) -> int:
    return max(1, round(seconds / read_json(root / "costs.json")[arm]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--task", choices=TASKS, default="sudoku")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=24.0, help="of a run's steps, at their cost")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    root = options.output_dir or Path("runs") / f"league-{options.task}"
    study = study_of(options.task, options.seeds)
    tuning = replace(study, base=replace(study.base, eval_task=study.base.validation_task))

    run = partial(run_missing, num_steps=lambda arm: steps_of(root, arm, options.seconds), workers=options.workers)
    if not options.report:
        run_all([("costs", partial(costs, study, root))], root, 1)
        run(tuning, root / "tuning", [(arm, TUNED_ON) for arm in study.arms])
    tuned, best = load(root / "tuning"), {}
    for method in METHODS:
        settings = [f"{method}, {setting}" for setting in GRID]
        best[method] = max(settings, key=lambda arm: tuned[arm, TUNED_ON]["after"])
    if not options.report:
        run(study, root, [(arm, seed) for seed in range(options.seeds) for arm in best.values()])
    found = load(root)
    rates = {arm: f"{tuned[arm, TUNED_ON]['after']:.3f}" for arm in study.arms}
    tuning_rows = [{"method": method} | {s: rates[f"{method}, {s}"] for s in GRID} for method in METHODS]
    runs = {arm: {s: found[arm, s] for a, s in sorted(found) if a == arm} for arm in best.values()}
    report(study, options.task, runs, tuning_rows)


def average(runs: list[dict[str, Any]], column: str, form: str) -> str:
    """Of the runs that have it: one that diverged has no seconds, and may have no area."""
    values = [run[column] for run in runs if column in run]
    return f"{mean(values):{form}}" if values else "-"


def report(
    study: Study,
    task: str,
    found: dict[str, dict[int, dict[str, Any]]],
    tuning: Sequence[dict[str, str]] = (),
) -> None:
    """Print the table, best mean first; write league_TASK.json and draw league_TASK.png beside this file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from recipes.studies.mismatch_report import line

    order = sorted(found, key=lambda arm: -sum(run["after"] for run in found[arm].values()))
    default = next(runs for arm, runs in found.items() if arm.startswith(DEFAULT))
    rows = []
    for arm in order:
        runs = list(found[arm].values())
        rates = [run["after"] for run in runs]
        apart = [default[seed]["after"] - run["after"] for seed, run in found[arm].items()]
        row = {"method, its setting": arm, "seeds": str(len(runs)), "held-out rate, 95 %": interval(rates)}
        row["each seed"] = ", ".join(f"{rate:.3f}" for rate in rates)
        row |= {
            "default less it": "-" if found[arm] is default else interval(apart),
            "area": average(runs, "area", ".3f"),
        }
        rows.append(row | {"steps": str(runs[0]["num_steps"]), "s in all": average(runs, "s", ".0f")})
    print(markdown(rows))
    folder = Path(__file__).parent
    write_rows(folder / f"league_{task}.json", results=rows, tuning=tuning)
    began = {s: run["before"] for runs in found.values() for s, run in runs.items() if "before" in run}
    before = list(began.values())
    print(f"before RL: {interval(before)}")
    figure, axis = plt.subplots(figsize=(7, 1 + 0.35 * len(order)), layout="constrained")
    for place, arm in enumerate(order):
        line(axis, -place, [run["after"] for run in found[arm].values()], "#1f77b4")
    axis.axvline(mean(before), color="grey", linewidth=0.8, linestyle=":")
    axis.set_yticks([-place for place in range(len(order))], [arm.split(", ")[0] for arm in order])
    axis.set_xlabel(f"held-out {study.metric.replace('_', ' ')} in equal time (dotted: where RL began)")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(folder / f"league_{task}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
