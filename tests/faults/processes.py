"""Processes of which one raises, dies, is stuck or is stopped in a step: prints {case: [exit status of the first,
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

from dllm_rl.checkpoints import checkpoint  # noqa: E402
from dllm_rl.models.base import Policy  # noqa: E402
from dllm_rl.samplers.rules import Confidence  # noqa: E402
from dllm_rl.samplers.unmask import Unmask  # noqa: E402
from dllm_rl.tasks.sudoku import Sudoku  # noqa: E402
from dllm_rl.types.rollouts import Prompts, Rollout  # noqa: E402

# Each process grades one completion beforehand, two of the first evaluation (the first process), then four a step.
GRADED_IN_STEP_2 = 1 + 4 + 2
SHARED = {"shard_size": 0, "train_batch_size": 6, "sft_warmup_batch_size": 6, "beta": 0.0}
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {  # how many processes, which one has the fault, settings
    "raises": (2, 1, {}),
    "dies": (2, 1, {}),
    "is stuck": (2, 1, {"collective_timeout": 20.0}),
    "waits for an engine": (2, 1, {}),
    "is stopped": (2, 1, {}),
    "is stopped, the first": (2, 0, {}),
    "is stopped, weights shared out": (3, 2, SHARED),
}


class Waiting(Unmask):
    """A sampler that waits once, in one process, for more seconds than `peer_timeout`."""

    def __call__(self, policy: Policy, prompts: Prompts, generator: torch.Generator, **options: Any) -> Rollout:
        if os.environ["RANK"] == "1" and Faulty.waited < len(prompts.tokens):
            Faulty.waited = len(prompts.tokens)
            time.sleep(9.0)
        return super().__call__(policy, prompts, generator, **options)


class Faulty:
    """Sudoku; one process's grader has a fault on a completion of step 2."""

    name, version = "faulty", "1"
    waited = 0  # rows of the largest batch for which this process has waited

    def __init__(self, fault: str, rank: int = 1) -> None:
        self.fault, self.rank, self.graded, self.task = fault, str(rank), 0, Sudoku(split="train", size=32)

    def __repr__(self) -> str:
        return "Faulty"

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> Any:
        return self.task[index]

    def reward(self, problem: Any, completion: str) -> Any:
        self.graded += 1
        if os.environ["RANK"] == self.rank and self.graded == GRADED_IN_STEP_2:
            if self.fault == "raises":
                raise ZeroDivisionError("by zero")
            if self.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "is stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            while self.fault == "is stuck":
                time.sleep(1.0)
        return self.task.reward(problem, completion)


def main(root: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    torch.set_num_threads(1)
    every = {"save_steps": 50, "stop_seconds": 5.0, "peer_timeout": 4.0}
    run(small_recipe(root / "whole", "two processes", **every, task=Faulty("none")), processes=2)
    for case, (processes, rank, changes) in CASES.items():
        directory, settings = root / case, every | changes
        task = Faulty(case.partition(",")[0], rank)
        if case == "waits for an engine":
            settings["sampler"] = Waiting(max_new_tokens=16, diffusion_steps=3, temperature=1.0, rank=Confidence())
        code, out = run(small_recipe(directory, "two processes", **settings, task=task), processes=processes)
        saved = [step for step, _ in checkpoint.list_checkpoints(directory / "checkpoints")]
        same, more = None, ""
        if processes == 2:
            again = {"task": Faulty("none"), "allow_changed": "task", "resume_from_checkpoint": "latest"}
            resumed, more = run(small_recipe(directory, "two processes", **settings | again), processes=2)
            same = resumed == 0 and outcome(directory) == outcome(root / "whole")
        found[case] = [code, out, saved, same or more]
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
