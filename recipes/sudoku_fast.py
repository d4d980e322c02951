"""A small masked-diffusion model, made here, learns by GRPO with FP8 rollouts to solve 4x4 Sudokus in few forwards.

The puzzles are those of sudoku_tiny.py with more clues, mostly with several right answers. Cells that are written in
the same step do not see each other, so that a model which is unsure must write them apart to be right. The reward pays
a right answer more the fewer forwards it took, and a wrong one nothing more.

Rollouts write by `SoftThreshold`: which cells a step writes is drawn by chances made of the model's confidence. These
chances are a part of the likelihood, so that the gradient sees how many forwards an answer takes (docs/sampler.md).
"""

from dataclasses import dataclass, replace
from functools import partial

from dllm_rl import MaxProb, Problem, Threshold, Trajectory, Unmask, main
from dllm_rl.samplers.rules import SoftThreshold
from dllm_rl.tasks import Reward, Task
from recipes.sudoku_tiny import NO_DIGITS, few_clues, taught
from recipes.sudoku_tiny import recipe as base

CELLS = 16  # and so the most forwards that a grid can take
some_clues = partial(few_clues, clues=(6, 8))
fill = Unmask(max_new_tokens=0, rank=MaxProb(), suppress=NO_DIGITS)


@dataclass(frozen=True)
class Fast:
    """The rewards of a task, and more for a solved grid that took few forwards. A grid that is not solved gets what it
    gets anyway, however fast it was written.

    task   the puzzles, and how they are graded
    bonus  what a solved grid gets for the share of forwards that it saved, of one for each cell
    """

    task: Task
    bonus: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.task.name}-fast"

    @property
    def version(self) -> str:
        return self.task.version

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> Problem:
        return self.task[index]

    def reward(self, problem: Problem, completion: str, forwards: int) -> Reward:
        graded = self.task.reward(problem, completion)
        saved = 1 - forwards / CELLS
        value = graded.value + self.bonus * saved * graded.breakdown["solve_rate"]
        return replace(graded, value=value, breakdown={**graded.breakdown, "forwards": float(forwards)})


recipe = replace(
    base,
    name="sudoku-fast",
    model=partial(taught, steps=400),
    task=Fast(some_clues(split="train")),
    validation_task=Fast(some_clues(split="validation", size=200)),
    eval_task=Fast(some_clues(split="test", size=400)),
    sampler=fill.replace(commit=SoftThreshold(tau=0.8), temperature=1.0),
    eval_sampler=fill.replace(commit=Threshold(tau=0.8), temperature=0.0),
    likelihood=Trajectory(),
    entropy_coeff=0.0,  # an entropy bonus makes cells unsure, and so answers slow
    train_batch_size=32,
    num_steps=120,
    eval_steps=30,
)

if __name__ == "__main__":
    main(recipe)
