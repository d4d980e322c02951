"""What two processes save of a step's work, and what each of them repeats.

    python -m benchmarks.two_processes --json benchmarks/results/two-processes-cpu.json

Processor milliseconds of a training step, one thread a process, of the slower process, the least of `--repeats` runs by
turns; steps from the third on. With shared work alone a step would take half of one process's.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine, table, write_json
from dllm_rl.step import collect, correct, update
from dllm_rl.training import trainer

PARTS = {  # a row of the table: the functions whose time it sums
    "step": [(trainer, "take_step")],
    "rollouts and rewards": [(collect, "draw_and_grade")],
    "scoring": [(update, "score_samples")],
    "gradients": [(update, "forward_backward")],
    "corrector and metrics of all rows": [(correct, "apply_corrector"), (correct, "measure_rows")],
}


def measure(name: str, steps: int, folder: Path) -> None:
    """Train in this process, one of those that were launched, and write its milliseconds."""
    torch.set_num_threads(1)
    spent: defaultdict[str, float] = defaultdict(float)
    begun: list[int] = []

    def timed(part: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if part == "step":
                begun.append(0)
            begin = time.process_time()
            found = function(*arguments, **options)
            if len(begun) > 2:
                spent[part] += time.process_time() - begin
            return found

        return call

    for part, places in PARTS.items():
        for module, function in places:
            setattr(module, function, timed(part, getattr(module, function)))
    recipe = importlib.import_module(f"recipes.{name}").recipe
    few = {
        "num_steps": steps,
        "warmup": {"steps": 0},
        "evaluation": {"steps": 10**6},
        "saves": {"steps": 10**6},
    }
    trainer.train(
        recipe.replace(**few, log={"report_to": None, "completions_steps": 0}, output_dir=str(folder / "run"))
    )
    milliseconds = {part: 1000 * seconds / (steps - 2) for part, seconds in spent.items()}
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(milliseconds))


def launched(name: str, steps: int, processes: int) -> dict[str, float]:
    """The milliseconds of each part, of the process that takes longest for it."""
    config = ["--cpu"] if processes == 1 else ["--config_file", "recipes/accelerate/cpu_2.yaml"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-m", "benchmarks.two_processes", "--recipe", name, "--steps", str(steps), "--folder", folder]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *config, *arguments]
        subprocess.run(launcher, check=True, stdout=subprocess.DEVNULL)
        found = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
    assert len(found) == processes
    return {part: max(each[part] for each in found) for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--recipe", default="sudoku_unique", help="name of a file in recipes/")
    parser.add_argument("--json", help="where to write the numbers")
    parser.add_argument("--folder", type=Path, help="of a process that this command launches: where its numbers go")
    options = parser.parse_args()
    if options.folder:
        measure(options.recipe, options.steps, options.folder)
        return
    runs = [[launched(options.recipe, options.steps, number) for number in (1, 2)] for _ in range(options.repeats)]
    rows = []
    for part in PARTS:
        one, two = (min(run[number][part] for run in runs) for number in (0, 1))
        numbers = {"one": one, "two": two, "ratio": one / two}
        rows.append({"part": part, **{key: round(value, 2) for key, value in numbers.items()}})
    print(table(rows))
    told = {"machine": machine("cpu"), "recipe": options.recipe, "steps": options.steps, "repeats": options.repeats}
    write_json(options.json, told | {"rows": rows})


if __name__ == "__main__":
    main()
