"""SmolLM2-135M, made a masked-diffusion model, learns sums and then Countdown on one GPU: FP8 rollouts beside bf16.

    python -m benchmarks.gpu_run runs/gpu/run               on a GPU
    python -m benchmarks.gpu_run runs/rehearsal --rehearse  a few rows and two steps of each, on any machine

Supervised training converts the model once for each task; both arms go on from there with the same seed. Started again,
it goes on at the newest checkpoint. After each arm FOLDER/curves.json and curves.png have all that is there.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.measure import Varied, machine, table, trained
from dllm_rl import Float8Dynamic, Float8WeightOnly, MaxProb, Recipe, Unmask
from dllm_rl.files import read_json, replacing, write_json
from dllm_rl.monitoring.plots import draw_curve, read_metrics
from dllm_rl.samplers.rules import RandomOrder
from dllm_rl.supervised.sft import SFT
from dllm_rl.tasks import Countdown
from dllm_rl.training.fine_tune import fine_tune
from dllm_rl.training.trainer import train
from recipes import smollm2_diffusion, smollm2_diffusion_sft
from recipes.solved import solved

numbers = partial(Countdown, count=3, max_number=10, max_target=20, operators="+-", numbers_weight=0.5)
in_three = Unmask(max_new_tokens=10, diffusion_steps=3)
KEPT = ("step", "reward", "eval/accuracy", "grad_norm", "rollout_corr/ess", "time/rollout", "step_time")
Row = dict[str, Any]

SUMS = smollm2_diffusion_sft.recipe, smollm2_diffusion.recipe
COUNTDOWN = (
    replace(
        SUMS[0],
        name="smollm2-countdown-sft",
        dataset=solved(numbers(split="train", size=1200)),
        eval_dataset=solved(numbers(split="validation", size=64)),
        max_length=32,
        completion_length=10,
        num_steps=240,
    ),
    replace(
        SUMS[1],
        name="smollm2-countdown",
        task=numbers(split="train"),
        validation_task=numbers(split="validation", size=100),
        eval_task=numbers(split="test", size=400),
        sampler=in_three.replace(rank=RandomOrder(), temperature=1.0),
        eval_sampler=in_three.replace(rank=MaxProb(), temperature=0.0),
        max_retained_graphs=3,
    ),
)
TASKS = {"sums": SUMS, "countdown": COUNTDOWN}
ARMS = ("FP8", "bf16")
ON_A_GPU: Row = {"train_batch_size": 64, "num_generations": 16, "num_steps": 60, "evaluation": {"steps": 15}}
REHEARSED: Row = {"train_batch_size": 2, "num_generations": 2, "num_steps": 2, "evaluation": {"steps": 1}}
FEW: Row = {"train_batch_size": 2, "num_steps": 2, "evaluation": {"steps": 1}, "saves": {"steps": 1}}


def supervised(task: str, folder: Path, rehearse: bool) -> SFT:
    recipe = TASKS[task][0].replace(bf16=torch.cuda.is_available(), **where(folder / f"{task}-sft"))
    recipe = recipe.replace(saves={"steps": 60})
    if rehearse:
        recipe = recipe.replace(dataset=recipe.dataset[:8], eval_dataset=recipe.eval_dataset[:4], **FEW)
    return recipe


def rewarded(task: str, arm: str, model: str, folder: Path, rehearse: bool) -> Recipe:
    on_a_gpu = torch.cuda.is_available() and not rehearse
    fp8 = Float8Dynamic() if on_a_gpu else Float8WeightOnly()  # products in FP8 need one
    recipe = TASKS[task][1].replace(
        model=model,
        bf16=torch.cuda.is_available(),  # on a CPU slower than fp32
        rollout_quantization=fp8 if arm == "FP8" else None,
        torch_compile=on_a_gpu,
        **(REHEARSED if rehearse else ON_A_GPU),
        **where(folder / f"{task}-{arm}"),
    )
    # A stopped run saves its last step.
    recipe = recipe.replace(evaluation={"batch_size": 400}, saves={"steps": 1 if rehearse else 30})
    if rehearse:
        few = {name: replace(getattr(recipe, name), size=4) for name in ("validation_task", "eval_task")}
        recipe = recipe.replace(task=Varied(recipe.task), **few)
    return recipe


def where(folder: Path) -> Row:
    return {
        "output_dir": str(folder),
        "resume_from_checkpoint": "latest",
        "saves": {"total_limit": 1},
        "log": {"report_to": None},
    }


def done(folder: Path) -> Row | None:
    """The summary of a run that has ended."""
    path = folder / "summary.json"
    return read_json(path) if path.exists() else None


def run(folder: Path, rehearse: bool, task: str) -> Iterator[Row]:
    """A row for each arm of a task; what has ended is not run again."""
    first = supervised(task, folder, rehearse)
    start = done(Path(first.directory)) or fine_tune(first)
    for arm in ARMS:
        recipe = rewarded(task, arm, start["checkpoint"], folder, rehearse)
        summary = done(Path(recipe.directory)) or train(recipe)
        write_json(folder / "curves.json", curves(folder, rehearse))
        draw(folder)
        yield told(task, arm, recipe, summary)


def told(task: str, arm: str, recipe: Recipe, summary: Row) -> Row:
    """Held-out accuracy, and what the steps cost. Raises ValueError where no step had a gradient."""
    steps = read_metrics(Path(recipe.directory))
    unequal = [step for step in steps if step["frac_reward_zero_std"] < 1]
    gradients = trained(unequal, recipe.train_batch_size * recipe.num_generations)
    row: Row = {"what": f"{task}, rollouts in {arm}", "seed": summary["seed"]}
    for when, name in (("before", "eval_before"), ("after", "eval_after"), ("quantized", "eval_after_quantized")):
        row[when] = summary[name]["accuracy"]
    row |= {"problems": summary["eval_problems"], "steps": len(steps), "steps with a gradient": len(unequal)}
    row |= {"least grad_norm": min(gradients["grad_norm"]), "completions": sum(gradients["trained_rows"])}
    row |= {"ESS": mean(step["rollout_corr/ess"] for step in steps)}
    row |= {"rollout, s a step": mean(step["time/rollout"] for step in steps[1:])}  # the first compiles
    return row | {"step, s": mean(step["step_time"] for step in steps[1:]), "seconds": summary["seconds"]}


def curves(folder: Path, rehearse: bool) -> Row:
    """The metrics of every step of every arm so far."""
    found = {}
    for metrics in sorted(folder.glob("*/metrics.jsonl")):
        rows = read_metrics(metrics.parent)
        if rows and "reward" in rows[0]:
            found[metrics.parent.name] = [{name: row[name] for name in KEPT if name in row} for row in rows]
    return {"rehearsal": rehearse, "machine": machine("cuda" if torch.cuda.is_available() else "cpu"), "runs": found}


def draw(folder: Path) -> None:
    """Reward and held-out accuracy (dashed) by step, a panel for each task and a color for each arm."""
    from matplotlib.figure import Figure

    stored = read_json(folder / "curves.json")
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    mark = "REHEARSAL at toy size, no result. " if stored["rehearsal"] else ""
    figure.suptitle(f"{mark}SmolLM2-135M as a diffusion model, {stored['machine']['device']}")
    for axis, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for arm, color in zip(ARMS, ("#1f77b4", "#d0485a"), strict=True):
            rows = stored["runs"].get(f"{task}-{arm}", [])
            held_out = [row for row in rows if "eval/accuracy" in row]
            draw_curve(axis, rows, "reward", color=color, label=f"reward, rollouts in {arm}")
            draw_curve(axis, held_out, "eval/accuracy", color=color, linestyle="--", label="accuracy, held out")
        axis.set(title=task, xlabel="RL step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    with replacing(folder / "curves.png") as partial_file:
        figure.savefig(partial_file, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="a few rows and steps, on a CPU too")
    options = parser.parse_args()
    print(table([row for task in TASKS for row in run(options.folder, options.rehearse, task)]))


if __name__ == "__main__":
    main()
