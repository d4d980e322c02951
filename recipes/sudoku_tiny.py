"""A small masked-diffusion model, made here, learns by GRPO with FP8 rollouts to write many cells of a 4x4 Sudoku at
once. Results: recipes/results.md.

Puzzles have one to three clues, and 34 right answers on average. Supervised training learns how likely each digit is in
each cell. Cells that are written in the same step do not see each other, so that likely digits of different answers
come together and contradict each other. A reward chooses one answer, and the cells learn to agree on it. Labels that
choose do as well (docs/results-and-limits.md); latin_sudoku.py asks what no label says.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Generator

from dllm_rl import Float8WeightOnly, MaxProb, Policy, Recipe, Trajectory, Unmask, main
from dllm_rl.groups import Evaluation
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.monitoring.plots import plot
from dllm_rl.rng import generator_for
from dllm_rl.tasks import Problem, Sudoku
from dllm_rl.tasks.sudoku.solver import SPLITS
from dllm_rl.training.summary import Summary
from recipes.perfect import ceiling

few_clues = partial(Sudoku, clues=(1, 3), unique=False, infill=True, reward_rule="rules")
NO_DIGITS = (0, 2)  # <pad> and <eos>
unmask_in_two = Unmask(max_new_tokens=0, diffusion_steps=2, rank=MaxProb(), suppress=NO_DIGITS)


def taught(*, seed: int = 0, steps: int = 400, dry_run: bool = False) -> Policy:
    """A model after some seconds of supervised training: it completes solved grids, any cells of which are hidden.

    seed     of the weights, grids and masks
    steps    of AdamW, on 64 grids each
    dry_run  no step: `--dry_run` asks for the size of the model alone
    """
    policy = tiny_masked_lm(characters="1234", seed=seed)
    if not dry_run:
        learn(policy, steps, seed, any_grids)
    return policy


def any_grids(generator: Generator) -> tuple[list[str], list[str]]:
    """64 solved grids of the train split, and no givens: every cell may be hidden."""
    grids = SPLITS["train"]
    picked = torch.randint(len(grids), (64,), generator=generator).tolist()
    return ["0" * 16] * 64, [grids[i] for i in picked]


def learn(policy: Policy, steps: int, seed: int, draw: Callable[[Generator], tuple[list[str], list[str]]]) -> None:
    """Supervised steps of AdamW. `draw` makes 64 puzzles, whose givens are never hidden, and a solved grid of each.
    Prints a line every 50 steps."""
    from dllm_rl.distributed.collectives import OneProcess  # here: --help would wait for it
    from dllm_rl.supervised.examples import solution_examples
    from dllm_rl.supervised.trainer import SupervisedTrainer

    first = os.environ.get("RANK", "0") == "0"
    optimizer = torch.optim.AdamW(policy.module.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    trainer = SupervisedTrainer(policy=policy, processes=OneProcess(), like_rollouts=True)
    for step in range(steps):
        generator = generator_for(seed, "lesson", step)
        puzzles, grids = draw(generator)
        examples = solution_examples(policy, [Problem("", solution=grid) for grid in grids], max_new_tokens=16)
        for example, puzzle in zip(examples, puzzles, strict=True):
            example.learned[:] = torch.tensor([digit == "0" for digit in puzzle])
        rate = 2e-3 * min(1.0, (step + 1) / 30)
        loss = trainer.step(optimizer, examples, generator, learning_rate=rate, place=f"step {step}")["loss"]
        if first and step % 50 == 0:
            print(f"supervised step {step} of {steps}: loss {loss:.3f}", flush=True)


recipe = Recipe(
    name="sudoku-tiny",
    model=partial(taught, steps=400),
    task=few_clues(split="train"),
    validation_task=few_clues(split="validation", size=200),
    eval_task=few_clues(split="test", size=400),
    sampler=unmask_in_two.replace(temperature=1.0),
    eval_sampler=unmask_in_two.replace(temperature=0.0),
    likelihood=Trajectory(),
    rollout_quantization=Float8WeightOnly(),
    entropy_coeff=0.05,  # answers of a group stay apart for longer: equal ones teach nothing
    train_batch_size=64,
    max_retained_graphs=2,
    num_steps=100,
    evaluation=Evaluation(steps=20),
)


def draw(summary: Summary, recipe: Recipe, name: str, level: Callable[[list[str]], float]) -> None:
    """The picture of a run that has ended. A line shows the `level` of the recipe's puzzles, unless the run was
    evaluated on others, or by another sampler."""
    if os.environ.get("RANK", "0") == "0" and summary.get("checkpoint"):
        settings = recipe.settings()
        puzzles = [recipe.eval_task[i].fields["puzzle"] for i in range(len(recipe.eval_task))]
        same = all(summary["recipe"][field] == settings[field] for field in ("eval_task", "eval_sampler"))
        plot(Path(summary["checkpoint"]).parents[1], levels={name: level(puzzles)} if same else None)


if __name__ == "__main__":
    draw(main(recipe), recipe, "exact probabilities, random ties", partial(ceiling, diffusion_steps=2))
