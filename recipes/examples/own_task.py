"""A task of your own, for generated problems or a grader that needs more than a row: sort four digits.

python recipes/examples/own_task.py
dllm-rl evaluate runs/sorting-seed0 --task recipes.examples.own_task:held_out
"""

from dataclasses import dataclass
from functools import partial

from dllm_rl import Unmask, main, tiny_masked_lm
from dllm_rl.tasks import Problem, Reward
from recipes.sudoku_unique import recipe as base


@dataclass(frozen=True)
class Sorting:
    """ "4213=" is answered by "1234".

    An optional method `rewards(problems, completions)` grades many completions together. Both may also take `forwards`
    and `num_tokens`. An optional `reward_weights` maps names of the breakdown to weights.
    """

    numbers: range
    name, version = "sorting", "1"

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        digits = f"{self.numbers[index]:04d}"
        return Problem(prompt=digits + "=", solution="".join(sorted(digits)))

    def reward(self, problem, completion):
        right = sum(a == b for a, b in zip(completion, problem.solution, strict=False))
        return Reward(right / 4, parsed=len(completion) == 4, breakdown={"accuracy": float(right == 4)})


def held_out():  # what `dllm-rl evaluate --task` calls, without arguments
    return Sorting(range(2, 10_000, 33))


recipe = base.replace(
    name="sorting",
    model=partial(tiny_masked_lm, characters="0123456789="),
    warmup={"metric": "accuracy"},
    num_steps=60,
    task=Sorting(range(0, 10_000, 3)),
    validation_task=Sorting(range(1, 10_000, 33)),
    eval_task=held_out(),
    sampler=Unmask(max_new_tokens=4, diffusion_steps=2, temperature=1.0),
    eval_sampler=Unmask(max_new_tokens=4, diffusion_steps=2),
)

if __name__ == "__main__":
    main(recipe)
