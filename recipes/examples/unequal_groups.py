"""Groups of unequal size: more completions for prompts whose rewards differed the last time.

A group with equal rewards has no advantage, and a larger group finds a rare right answer more often. The number of
completions of a step stays the same. A large group would count more than a small one in a mean over tokens:
`EqualPrompts` gives every prompt the same weight.

python -m recipes.examples.unequal_groups
"""

from dataclasses import dataclass, replace

import torch

from dllm_rl import LeaveOneOut, StepFeature, main
from dllm_rl.algorithms.prompt_sources import UniformPrompts
from dllm_rl.records import option
from dllm_rl.tasks import Sudoku
from dllm_rl.types.groups import group_numbers
from recipes.sudoku_unique import recipe as base


class MoreWhereMixed(UniformPrompts):
    """Draw uniform prompts, and give those whose last group had equal rewards `least` completions.

    The other prompts, also those that were never drawn, share the rest.
    """

    least: int = option(default=2, at_least=1)
    uses_history = True

    def group_sizes(self, history, prompts, num_generations, generator):
        latest = history.latest()
        had_equal = torch.isin(prompts, latest.prompt[~latest.mixed])
        if had_equal.all():
            return torch.full_like(prompts, num_generations)
        sizes = torch.where(had_equal, min(self.least, num_generations), 0)
        rest, others = len(prompts) * num_generations - int(sizes.sum()), (~had_equal).nonzero()[:, 0]
        sizes[others] = rest // len(others)
        sizes[others[: rest % len(others)]] += 1
        return sizes


class EqualPrompts(StepFeature):
    """Weight each row by (mean group size) / (size of its group)."""

    def after_rollout(self, context, samples, step):
        number = group_numbers(samples.group)
        sizes = number.bincount()
        weights = samples.local((sizes.double().mean() / sizes)[number].float(), context.accelerator)
        rollout = samples.rollout
        rollout = replace(rollout, loss_weights=weights[:, None].expand(rollout.tokens.shape).contiguous())
        largest = float(sizes.max())
        return replace(samples, rollout=rollout), {"groups/size_min": float(sizes.min()), "groups/size_max": largest}


@dataclass(frozen=True)
class SolvedOnly:
    """Few puzzles, with a reward only for a solved one: most groups have equal rewards."""

    puzzles: Sudoku
    name, version = "sudoku-solved", "1"

    def __len__(self):
        return len(self.puzzles)

    def __getitem__(self, index):
        return self.puzzles[index]

    def reward(self, problem, completion):
        grade = self.puzzles.reward(problem, completion)
        return replace(grade, value=grade.breakdown["solve_rate"])


recipe = base.replace(
    name="unequal-groups",
    task=SolvedOnly(Sudoku(split="train", clues=(10, 12), size=100)),
    prompt_source=MoreWhereMixed(),
    advantages=LeaveOneOut(),
    eval_task=replace(base.eval_task, size=100),
    warmup={"steps": 120},
    train_batch_size=8,
    num_steps=25,
    evaluation={"steps": 0},
)

if __name__ == "__main__":
    main(recipe, features=(EqualPrompts(),))
