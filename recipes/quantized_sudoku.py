"""GRPO with four-bit rollouts, with and without their correction, beside full precision. Results: README.md.

A small masked-diffusion model, made here, is warmed up on 4x4 Sudoku (sudoku_unique.py). From this one start, three
arms train side by side, each in a process of its own:

unquantized   the learner samples
uncorrected   a copy with NVFP4 weights samples, and its samples count as the learner's own
corrected     the same copy samples, and TIS multiplies each token's gradient by p(learner) / p(copy), cut at 2

Cells are written in random order, which does not depend on the weights, so that TIS can correct what the copy changes.
Options are those of every recipe: `--seed 1`, `--rollout_quantization Int4WeightOnly`, `--corrector AIS`. The arms'
table and picture are of the same 400 test puzzles and the unquantized learner.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from statistics import mean
from typing import IO, Any

from dllm_rl import NVFP4, TIS, Callback, NoCorrection, Policy, RandomOrder, Recipe, Sampler
from dllm_rl.callbacks import RunControl
from dllm_rl.cli.run_recipe import as_program
from dllm_rl.config import from_command_line
from dllm_rl.files import read_json, replacing, write_json
from dllm_rl.monitoring.plots import default_style, draw_curve, read_metrics
from recipes.studies.paired import markdown
from recipes.sudoku_unique import recipe as sudoku

recipe = replace(
    sudoku,
    name="quantized-sudoku",
    sampler=sudoku.sampler.replace(diffusion_steps=4, rank=RandomOrder()),
    eval_sampler=sudoku.eval_sampler.replace(diffusion_steps=4),  # greedy, the most confident cells first
    rollout_quantization=NVFP4(),
    corrector=TIS(),
    learning_rate=1e-3,
    num_steps=60,
    eval_steps=10,
)

ARMS = multiprocessing.get_context("forkserver")  # an arm is forked from a process that has imported this:
ARMS.set_forkserver_preload(
    [
        "dllm_rl.training.trainer",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm",
    ]
)
MISMATCH, ESS = "rollout_corr/abs_log_ratio_mean", "rollout_corr/ess"
STYLES = {  # of the picture
    "unquantized": {"color": "#2f9e6e", "linestyle": ":", "marker": "^"},
    "uncorrected": {"color": "#d9772b", "linestyle": "--", "marker": "s"},
    "corrected": {"color": "#3b7dd8", "linestyle": "-", "marker": "o"},
}


def arms_of(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe of each arm by its name, which is also its folder's.

    Raises:
        ValueError: The recipe quantizes or corrects nothing, or resumes from one checkpoint.
    """
    if recipe.rollout_quantization is None:
        raise ValueError("rollout_quantization=None leaves nothing to compare: choose a scheme, such as NVFP4")
    if recipe.corrector == NoCorrection():
        raise ValueError("corrector=NoCorrection leaves nothing to compare: choose another one, such as TIS")
    if recipe.resume_from_checkpoint not in (None, "latest"):
        raise ValueError(
            f"resume_from_checkpoint={recipe.resume_from_checkpoint!r} is of one run, and this job has several: give "
            "latest, and the job's output_dir"
        )
    none = NoCorrection()
    return {
        "unquantized": replace(recipe, rollout_quantization=None, corrector=none),
        "uncorrected": replace(recipe, corrector=none),
        "corrected": recipe,
    }


def label(arm: Recipe) -> str:
    """What is special about an arm, in words."""
    if arm.rollout_quantization is None:
        return "unquantized"
    correction = "no correction" if arm.corrector == NoCorrection() else type(arm.corrector).__name__
    return f"{type(arm.rollout_quantization).__name__}, {correction}"


def sampled_solve_rate(policy: Policy, recipe: Recipe, sampler: Sampler) -> float:
    """The share of two completions per test puzzle that solve it, at the sampler's temperature."""
    from dllm_rl.evaluation.evaluate import evaluate

    policy.module.eval()
    options = {"seed": recipe.seed, "samples": 2, "batch_size": 400}
    return evaluate(policy, recipe.eval_task, sampler, **options).means["solve_rate"]


class OnScreen(Callback):
    """Prints an arm's evaluations on the screen of the job."""

    def __init__(self, label: str, screen: IO[str]) -> None:
        self.label, self.screen = label, screen

    def on_evaluate(self, run: RunControl, metrics: Mapping[str, float]) -> None:
        solved = f"{metrics['eval/solve_rate']:.3f} solved"
        print(f"{self.label}: {run.step} of {run.num_steps} steps, {solved}", file=self.screen, flush=True)

    def state(self) -> dict[str, Any]:
        return {}


def train_arm(recipe: Recipe) -> None:
    """Train and evaluate an arm in this process, which prints into a file, and leave its result there, too."""
    import torch

    from dllm_rl.training.trainer import train

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    folder = Path(recipe.directory)
    folder.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.dup(1), "w") as screen, (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        with as_program():
            summary = train(replace(recipe, callbacks=(*recipe.callbacks, OnScreen(label(recipe), screen))))
            result = {"greedy": summary["eval_after"]["solve_rate"], "seconds": summary["seconds"]}
            result["at temperature 1"] = sampled_solve_rate(summary.policy, recipe, recipe.sampler)
            write_json(folder / "result.json", result)


def end_with_parent() -> None:
    """When the process that started this one has ended, stop this one's run, which saves a checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def train_side_by_side(arms: Mapping[str, Recipe]) -> None:
    """Train the arms at the same time, and wait for them. If one fails, or on Ctrl-C, the others save and end, too."""
    processes = {name: ARMS.Process(target=train_arm, args=(arm,), daemon=True) for name, arm in arms.items()}
    try:
        for process in processes.values():
            process.start()
        while running := [process.sentinel for process in processes.values() if process.is_alive()]:
            wait(running)
            if failed := [name for name, process in processes.items() if process.exitcode]:
                log = Path(arms[failed[0]].directory) / "log.txt"
                lines = log.read_text().splitlines() if log.exists() else []
                ended = f"the arm {failed[0]} ended with status {processes[failed[0]].exitcode}"
                raise ChildProcessError(f"{ended}: {''.join(lines[-1:])} ({log})")
    finally:
        for process in processes.values():
            if process.is_alive():
                process.terminate()  # by a signal, on which its run stops after the step, and saves
        for process in processes.values():
            if process.pid is not None:
                process.join()


def numbers_of(arm: Recipe) -> dict[str, float | None]:
    """What an arm reached, and the mean of its steps' metrics."""
    folder = Path(arm.directory)
    steps = read_metrics(folder)
    numbers = read_json(folder / "result.json")
    for name, metric in {"mismatch": MISMATCH, "ess": ESS}.items():
        found = [row[metric] for row in steps if metric in row]
        numbers[name] = mean(found) if found else None
    return numbers


def table(arms: Mapping[str, Mapping[str, float | None]]) -> str:
    """The arms side by side, by label."""
    heads = {"greedy": "solved greedily", "at temperature 1": "at temperature 1"}
    heads |= {"mismatch": "mismatch, nats a token", "ess": "effective sample size", "seconds": "seconds"}

    def shown(name: str, value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}" if name == "seconds" else f"{value:.3f}"

    return markdown(
        [
            {"rollouts": name} | {head: shown(key, numbers.get(key)) for key, head in heads.items()}
            for name, numbers in arms.items()
        ]
    )


def draw(arms: Mapping[str, Recipe], path: Path) -> None:
    """The arms' solve rates, mismatch and effective sample size over the steps."""
    with replacing(path) as partial, default_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11.25, 4.2), layout="constrained")
        solved, mismatch, ess = figure.subplots(1, 3)
        for name, arm in arms.items():
            folder, style = Path(arm.directory), STYLES[name]
            rows, summary = read_metrics(folder), read_json(folder / "summary.json")
            rate = {row["step"] + 1: row["eval/solve_rate"] for row in rows if "eval/solve_rate" in row}
            rate |= {0: summary["eval_before"]["solve_rate"], len(rows): summary["eval_after"]["solve_rate"]}
            steps = sorted(rate)
            title = f"{label(arm)}: {rate[len(rows)]:.3f} solved"
            solved.plot(steps, [rate[step] for step in steps], **style, markersize=5, linewidth=1.6, label=title)
            for axis, metric in ((mismatch, MISMATCH), (ess, ESS)):
                curve = {key: style[key] for key in ("color", "linestyle")}
                draw_curve(axis, [row for row in rows if metric in row], metric, linewidth=1.6, **curve)
        solved.set(title="Held-out puzzles solved", ylabel="share", ylim=(0, None))
        mismatch.set(title="Mismatch", ylabel="mean |log ratio|, nats a token", ylim=(0, None))
        ess.set(title="Effective sample size", ylabel="share of the tokens")
        for axis in (solved, mismatch, ess):
            axis.set_xlabel("RL step")
            axis.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=len(arms))
        figure.savefig(partial, dpi=110, format="png")


def compare(recipe: Recipe) -> None:
    """Warm up, train the arms, and print the table and where the picture is.

    Raises:
        ValueError: The recipe cannot run, or was launched as several processes.
        OSError: A file cannot be written, or an arm failed.
    """
    arms = arms_of(recipe)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("each arm has a process of its own: launch one, with recipes/accelerate/cpu.yaml")
    import torch  # from here on: --help and wrong options need not wait for it

    from dllm_rl.checkpoints.run_folder import default_folder
    from dllm_rl.distributed.stop import how_to_continue
    from dllm_rl.training.trainer import train

    if recipe.dry_run:
        train(recipe)
        return
    torch.set_num_threads(1)  # the arms share the cores, and other numbers of threads round differently
    folder = Path(recipe.output_dir or default_folder(recipe)).absolute()
    names = "; ".join(map(label, arms.values()))
    print(f"{recipe.name}, seed {recipe.seed}: a warm-up, then {recipe.num_steps} steps of {names}, into {folder}")
    forkserver.ensure_running()  # it imports during the warm-up
    start = replace(arms["unquantized"], num_steps=0, eval_steps=0, output_dir=str(folder))
    warm = train(start)
    before = {"greedy": warm["eval_after"]["solve_rate"]}
    before["at temperature 1"] = sampled_solve_rate(warm.policy, recipe, recipe.sampler)
    shared = {"model": warm["checkpoint"], "sft_warmup_steps": 0, "validation_task": recipe.eval_task}
    arms = {
        name: replace(arm, **shared, name=f"{recipe.name}-{name}", output_dir=str(folder / name))
        for name, arm in arms.items()
    }
    print(f"The arms train side by side; what they print is in {folder}/{{{','.join(arms)}}}/log.txt.", flush=True)
    try:
        train_side_by_side(arms)
    except KeyboardInterrupt:
        print(f"stopped: {how_to_continue(str(folder))}")
        raise
    numbers = {"none: before RL": before} | {label(arm): numbers_of(arm) for arm in arms.values()}
    write_json(folder / "arms.json", numbers)
    draw(arms, folder / "arms.png")
    print(f"\n{table(numbers)}\nNumbers: {folder / 'arms.json'}\nPicture: {folder / 'arms.png'}")
    print(f"Doctor:  dllm-rl doctor {folder / 'corrected'}")


def main(recipe: Recipe) -> None:
    """The job as a program, with the options of a recipe."""
    with as_program():
        recipe = from_command_line(recipe)
        from dllm_rl.distributed.stop import started_by_command

        with started_by_command():
            compare(recipe)


if __name__ == "__main__":
    main(recipe)
