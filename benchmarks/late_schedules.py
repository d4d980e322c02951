"""Seconds of a step with slow graders, against what no schedule can beat: rollouts in turn with learning, late in order
(`rollout_schedule="in_order"`), and first ready ("first_ready"), with 1 and 2 workers, and 1 and 2 learner processes.

A prompt's four completions are graded in 0.05 s or 1 s, by the prompt, so that the two prompts of a batch take 0.1 to
2 s; a learner's step takes 0.4 s longer. Both sleep, so that two cores are no limit. max_staleness is 4. Times are
means over a whole run, from when a worker starts the first batch.

learning  seconds of a step without the wait for a batch (L)
batch     seconds that a worker takes for a batch (R)
bound     max(L, R / N) with N workers, of the same run

python -m benchmarks.late_schedules [--steps 30] [--smoke] [--json FILE]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.measure import machine, table, trained, write_json
from dllm_rl import Callback
from dllm_rl.algorithms.optimizers import ConstantRate
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.monitoring.plots import read_metrics
from dllm_rl.tasks.base import Problem, Reward, Task
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.trainer import train
from recipes.sudoku_unique import recipe

ROOT = Path(__file__).parents[1]
GENERATIONS, STALENESS, LEARNING = 4, 4, 0.4
ARMS = [("in turn", 0), ("in_order", 1), ("first_ready", 1), ("in_order", 2), ("first_ready", 2)]


class SlowGrader:
    """A task whose grader takes 0.05 s or 1 s for the completions of a prompt."""

    name, version = "slow grader", "1"

    def __init__(self, task: Task) -> None:
        self.task = task

    def __repr__(self) -> str:
        return "SlowGrader"

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> Problem:
        return self.task[index]

    def reward(self, problem: Problem, completion: str) -> Reward:
        is_slow = sum(map(ord, str(problem.prompt))) % 2
        time.sleep((1.0 if is_slow else 0.05) / GENERATIONS)
        return self.task.reward(problem, completion)


class LongStep(Callback):
    """Makes a step of the learner longer."""

    def on_step(self, control: Any, metrics: Any) -> None:
        time.sleep(LEARNING)


def train_all(root: Path, arms: list[tuple[str, int]], steps: int) -> None:
    """Train with each arm in turn, in this process and in the others of its launch."""
    small = {"train_batch_size": 2, "num_generations": GENERATIONS, "sft_warmup_steps": 0, "eval_steps": 0}
    small |= {"eval_task": Sudoku(split="test", size=2), "validation_task": Sudoku(split="validation", size=2)}
    small |= {"model": partial(tiny_masked_lm, characters="1234.=", hidden_size=32, num_layers=2)}
    quiet = {"report_to": None, "log_completions_steps": 0, "save_steps": steps}
    for schedule, workers in arms:
        late = {"rollout_workers": workers, "max_staleness": STALENESS if workers else 0}
        late |= {"rollout_schedule": "in_order" if schedule == "in turn" else schedule}
        settings: dict[str, Any] = {**late, **small, **quiet, "num_steps": steps, "lr_schedule": ConstantRate()}
        settings["output_dir"] = str(root / f"{schedule} {workers}")
        train(replace(recipe, task=SlowGrader(recipe.task), callbacks=(LongStep(),), **settings))


def launch(learners: int, root: Path, *more: str) -> None:
    """Start so many processes that call `train_all`."""
    config = ROOT / "recipes" / "accelerate" / ("cpu.yaml" if learners == 1 else "cpu_2.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_cpu_threads_per_process", "1", "--module", "benchmarks.late_schedules", "--one", str(root)]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def measured(root: Path, learners: int, schedule: str, workers: int) -> dict[str, Any]:
    """What the metrics of a run say."""
    rows = read_metrics(root / f"{schedule} {workers}")
    trained(rows, 2 * GENERATIONS)
    step = mean(row["step_time"] for row in rows) + LEARNING  # callbacks do not count in `step_time`
    found: dict[str, Any] = {"learners": learners, "workers": workers, "schedule": schedule, "step": step}
    if workers:
        first = rows[0]["time/rollout_worker"]
        step -= (rows[0]["time/waiting"] - first) / len(rows)  # the start of the workers
        learning = mean(row["step_time"] - row["time/waiting"] for row in rows) + LEARNING
        batch = mean(row["time/rollout_worker"] for row in rows)
        bound = max(learning, batch / workers)
        found |= {"step": step, "learning": learning, "batch": batch, "bound": bound, "step / bound": step / bound}
        found |= {"staleness": mean(row["staleness"] for row in rows)}
        assert max(row["staleness"] for row in rows) <= STALENESS, "no batch is too old"
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="two short runs, to see that it runs")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", metavar="FOLDER", type=Path, help="only train, in this process")
    given = parser.parse_args()
    arms = ARMS
    if given.smoke:
        given.steps, arms = 6, [ARMS[0], ARMS[-1]]
    if given.one:
        train_all(given.one, arms, given.steps)
        return
    rows = []
    for learners in (1,) if given.smoke else (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            launch(learners, Path(folder), "--steps", str(given.steps), *(["--smoke"] if given.smoke else []))
            rows += [measured(Path(folder), learners, *arm) for arm in arms]
        print(table([row for row in rows if row["workers"]]), flush=True)
        result = {"benchmark": "late_schedules", "steps": given.steps, **machine("cpu")}
        write_json(given.json, result | {"runs": rows})  # after each number of learners: a run takes minutes


if __name__ == "__main__":
    main()
