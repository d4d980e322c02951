"""Whole runs of sudoku_tiny.py, synchronous and with late rollouts, as a user starts them: seconds and solve rates,
seed by seed. Run it on two idle cores.

one thread    recipes/sudoku_tiny.py with one thread: rollout and learning in turn
two threads   the same with both cores for every product
late          recipes/async_sudoku.py: one thread, and a Ray worker with another that samples one step ahead

The arms of a seed follow each other. `steps` are the seconds of the RL steps, `run` those of the whole run: supervised
warm-up, evaluations and steps, from the launcher's start to its end. `bound` is max(rollout, rest) / (rollout + rest)
of the steps of "one thread": what no overlap of two cores with one thread each can beat.

python -m benchmarks.late_runs [--seeds 0 1 2] [--json FILE] [-- further options of both recipes, such as --num_steps 5]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.measure import machine, table, trained, write_json
from dllm_rl.monitoring.plots import read_metrics

ARMS = {
    "one thread": ("sudoku_tiny", 1),
    "two threads": ("sudoku_tiny", 2),
    "late": ("async_sudoku", 1),
}
ROOT = Path(__file__).parents[1]


def run(arm: str, seed: int, further: list[str]) -> dict[str, Any]:
    recipe, threads = ARMS[arm]
    with tempfile.TemporaryDirectory() as folder:
        command = [Path(sys.executable).parent / "accelerate", "launch"]
        command += ["--config_file", ROOT / "recipes" / "accelerate" / "cpu.yaml"]
        command += ["--num_cpu_threads_per_process", str(threads), ROOT / "recipes" / f"{recipe}.py"]
        command += ["--seed", str(seed), "--output_dir", f"{folder}/run", *further]
        began = time.perf_counter()
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        whole = time.perf_counter() - began
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        steps = read_metrics(Path(folder, "run"))
    completions = summary["recipe"]["train_batch_size"] * summary["recipe"]["num_generations"]
    trained(steps, completions)
    rollout = sum(step.get("time/rollout", 0) + step.get("time/reward", 0) for step in steps)
    spent = sum(step["step_time"] for step in steps)
    row = {"arm": arm, "seed": seed, "run": whole, "steps": spent, "rollout": rollout}
    row["bound"] = max(rollout, spent - rollout) / spent
    row |= {when: summary[f"eval_{when}"]["solve_rate"] for when in ("before", "after")}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}


def summed_up(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By arm: means over the seeds, and its seconds as a share of those of one thread."""
    rows = []
    for arm in ARMS:
        mine = [each for each in runs if each["arm"] == arm]
        alone = [each for each in runs if each["arm"] == "one thread"]
        row: dict[str, Any] = {"arm": arm, "after": round(mean(each["after"] for each in mine), 3)}
        for part in ("steps", "run"):
            seconds = sum(each[part] for each in mine)
            row |= {part: round(seconds / len(mine), 1)}
            row |= {f"{part} / one thread": round(seconds / sum(each[part] for each in alone), 3)}
        row["bound"] = round(mean(each["bound"] for each in mine), 3) if arm == "one thread" else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", metavar="FILE")
    given, further = parser.parse_known_args()
    runs = []
    for seed in given.seeds:
        for arm in ARMS:
            runs.append(run(arm, seed, [word for word in further if word != "--"]))
            print(runs[-1], flush=True)
    rows = summed_up(runs)
    print(table(rows))
    write_json(given.json, {"benchmark": "late_runs", **machine("cpu"), "arms": rows, "runs": runs})


if __name__ == "__main__":
    main()
