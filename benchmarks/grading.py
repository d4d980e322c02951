"""What a time limit costs the grader: 256 Sudoku completions with a limit and without, by turns.

    python benchmarks/grading.py --output benchmarks/results/grading-cpu.json

Seconds are of one call: of the wall clock the median over the rounds, of the process's own work the mean over them all,
since a call is shorter than the tick of some systems' processor clocks. A round calls each arm 20 times.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, median

from dllm_rl.tasks import Sudoku
from dllm_rl.tasks.base import grade

CALLS = 20  # of each arm in a round
LIMIT = 600.0  # seconds, the default of reward_timeout
ARMS = {"no limit": None, "limit": LIMIT}


def measure(rounds: int, problems: int = 32, group: int = 8) -> dict[str, dict[str, float]]:
    """By arm, the seconds of one call of `grade`."""
    task = Sudoku(size=problems, seed=0)
    asked = [task[i] for i in range(problems) for _ in range(group)]
    completions = ["<answer>1234341221434321</answer>"] * (problems * group)
    walls: dict[str, list[float]] = {arm: [] for arm in ARMS}
    works: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm, limit in ARMS.items():
            wall = time.perf_counter()
            work = time.process_time()
            for _ in range(CALLS):
                grade(task, asked, completions, timeout=limit)
            works[arm].append((time.process_time() - work) / CALLS)
            walls[arm].append((time.perf_counter() - wall) / CALLS)
    return {arm: {"seconds": median(walls[arm]), "cpu_seconds": mean(works[arm])} for arm in ARMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    arms = measure(given.rounds)
    ratios = {unit: arms["limit"][unit] / arms["no limit"][unit] for unit in ("seconds", "cpu_seconds")}
    text = json.dumps({"rounds": given.rounds, "arms": arms, "limit over none": ratios}, indent=1)
    if given.output:
        given.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
