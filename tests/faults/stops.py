"""Runs that are stopped in a known place, each in a process of its own: prints {case: [exit status, output, ...]}."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "faults"), str(TESTS / "support"), str(TESTS.parent)]

from child import run  # noqa: E402
from scenarios import PROCESSES, SCENARIOS, outcome, small_recipe  # noqa: E402

from dllm_rl.checkpoints import checkpoint  # noqa: E402
from dllm_rl.tasks.sudoku import Sudoku  # noqa: E402


class Signalling:
    """Sudoku; whoever takes problem number `at`, or grades completion number `graded_at`, gets `signals`, and where
    `wait`, nothing more happens but signals."""

    name, version = "signalling", "1"

    def __init__(self, at: int, signals: tuple[int, ...] = (), *, wait: bool = False, graded_at: int = 0) -> None:
        self.at, self.signals, self.wait, self.graded_at = at, signals, wait, graded_at
        self.taken = self.graded = 0
        self.task = Sudoku(split="train", size=32)

    def __repr__(self) -> str:
        return "Signalling"

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> Any:
        self.taken += 1
        if self.taken == self.at:
            self.signal()
        return self.task[index]

    def signal(self) -> None:
        for number in self.signals:
            os.kill(os.getpid(), number)
        while self.wait:
            signal.pause()

    def reward(self, problem: Any, completion: str) -> Any:
        self.graded += 1
        if self.graded == self.graded_at:
            self.signal()
        return self.task.reward(problem, completion)


# One completion is graded beforehand, two in the first evaluation, then eight a step.
GRADED_IN_STEP_2 = 1 + 2 + 8 + 3
# All 32 problems are looked at, and one is taken, before the first step, and the 7 different ones of a warm-up's two
# steps; then four a step (of the warm-up too), in two processes two each.
IN_WARM_UP, IN_STEP_2, IN_STEP_2_OF_TWO = 35 + 7, 39, 36
CASES: dict[str, tuple[str, Signalling, dict[str, Any]]] = {
    "warm-up": ("plain", Signalling(IN_WARM_UP, (signal.SIGHUP,)), {"sft_warmup_steps": 2}),
    "warm-up, two processes": ("two processes", Signalling(IN_WARM_UP, (signal.SIGTERM,)), {"sft_warmup_steps": 2}),
    "SIGUSR1": ("plain", Signalling(IN_STEP_2, (signal.SIGUSR1,)), {}),
    "Ctrl-C": ("plain", Signalling(IN_STEP_2, (signal.SIGINT,)), {}),
    "overdue": ("plain", Signalling(IN_STEP_2, (signal.SIGTERM,), wait=True), {"stop_seconds": 0.0}),
    "overdue, LoRA": ("LoRA", Signalling(IN_STEP_2 + 7 + 8, (signal.SIGHUP,), wait=True), {"stop_seconds": 0.0}),
    "overdue, grading": (
        "plain",
        Signalling(0, (signal.SIGTERM,), wait=True, graded_at=GRADED_IN_STEP_2),
        {"stop_seconds": 0.0},
    ),
    "Ctrl-C, grading": ("plain", Signalling(0, (signal.SIGINT,), graded_at=GRADED_IN_STEP_2), {}),
    "second Ctrl-C": ("plain", Signalling(IN_STEP_2, (signal.SIGINT, signal.SIGINT), wait=True), {}),
    "two processes": ("two processes", Signalling(IN_STEP_2_OF_TWO, (signal.SIGTERM,)), {}),
    "two processes, overdue": (
        "two processes",
        Signalling(IN_STEP_2_OF_TWO, (signal.SIGTERM,), wait=True),
        {"stop_seconds": 0.0},
    ),
}


def main(root: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    torch.set_num_threads(1)
    for case, (scenario, task, changes) in CASES.items():
        processes, settings = PROCESSES.get(scenario, 1), {"save_steps": 50, **changes}
        whole, directory = root / f"whole {case}", root / case
        run(small_recipe(whole, scenario, **settings | {"task": Signalling(0)}), processes=processes)
        code, out = run(small_recipe(directory, scenario, **settings | {"task": task}), processes=processes)
        saved = [step for step, _ in checkpoint.list_checkpoints(directory / "checkpoints")]
        again = small_recipe(
            directory,
            scenario,
            **settings,
            task=Signalling(0),
            resume_from_checkpoint="latest",
            allow_changed="task",  # when it signals counts as its code
        )
        resumed, more = run(again, processes=processes)
        same = resumed == 0 and outcome(directory) == outcome(whole)
        found[case] = [code, out, saved, same or more]
    return found


if __name__ == "__main__":
    assert set(SCENARIOS) >= {scenario for scenario, *_ in CASES.values()}
    print(json.dumps(main(Path(sys.argv[1]))))
