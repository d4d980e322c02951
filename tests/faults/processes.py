"""Two processes, the second of which raises, dies or is stuck in a step: prints {case: [exit status of the first,
output, steps saved, true or the resumed run's output]}."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "faults"), str(TESTS / "support"), str(TESTS.parent)]

from child import run  # noqa: E402
from scenarios import outcome, small_recipe  # noqa: E402

from dllm_rl.tasks.sudoku import Sudoku  # noqa: E402
from dllm_rl.training import checkpoint  # noqa: E402

# Each process grades one completion beforehand, then four a step.
GRADED_IN_STEP_2 = 1 + 4 + 2
CASES = ("raises", "dies", "is stuck")


class Faulty:
    """Sudoku; the second process's grader has a fault on a completion of step 2."""

    name, version = "faulty", "1"

    def __init__(self, fault: str) -> None:
        self.fault, self.graded, self.task = fault, 0, Sudoku(split="train", size=32)

    def __repr__(self) -> str:
        return "Faulty"

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> Any:
        return self.task[index]

    def reward(self, problem: Any, completion: str) -> Any:
        self.graded += 1
        if os.environ["RANK"] == "1" and self.graded == GRADED_IN_STEP_2:
            if self.fault == "raises":
                raise ZeroDivisionError("by zero")
            if self.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            while self.fault == "is stuck":
                time.sleep(1.0)
        return self.task.reward(problem, completion)


def main(root: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    torch.set_num_threads(1)
    settings = {"save_steps": 50, "collective_timeout": 4.0, "stop_seconds": 5.0}
    run(small_recipe(root / "whole", "two processes", **settings, task=Faulty("none")), processes=2)
    for case in CASES:
        directory = root / case
        code, out = run(small_recipe(directory, "two processes", **settings, task=Faulty(case)), processes=2)
        saved = [step for step, _ in checkpoint.found(directory / "checkpoints")]
        again = {"task": Faulty("none"), "resume_from_checkpoint": "latest"}
        resumed, more = run(small_recipe(directory, "two processes", **settings | again), processes=2)
        same = resumed == 0 and outcome(directory) == outcome(root / "whole")
        found[case] = [code, out, saved, same or more]
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
