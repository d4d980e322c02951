"""A task with blanks: "1__4" is filled in as "1234". The model sees the text on both sides of a blank.

python recipes/examples/infill_digits.py
"""

from dataclasses import dataclass
from functools import partial

from dllm_rl import Unmask, main, tiny_masked_lm
from dllm_rl.tasks import Problem, Reward
from recipes.sudoku_unique import recipe as base


@dataclass(frozen=True)
class Missing:
    starts: range
    name, version = "missing", "1"

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        whole = "".join(str((self.starts[index] + i) % 10) for i in range(4))
        return Problem(whole[0] + "__" + whole[3], fields={"whole": whole}, blank="_")

    def reward(self, problem, completion):  # gets the whole text
        whole = problem.fields["whole"]
        right = sum(a == b for a, b in zip(completion, whole, strict=False))
        return Reward(right / 4, parsed=len(completion) == 4, breakdown={"accuracy": float(right == 4)})


fill = Unmask(max_new_tokens=0, suppress=(0, 2))  # neither padding nor the end token
recipe = base.replace(
    name="missing",
    model=partial(tiny_masked_lm, characters="0123456789"),
    warmup={"steps": 0},  # the warm-up refuses blanks
    num_steps=60,
    learning_rate=3e-3,
    task=Missing(range(10)),
    validation_task=Missing(range(10)),
    eval_task=Missing(range(10)),
    sampler=fill.replace(temperature=1.0),
    eval_sampler=fill,
)

if __name__ == "__main__":
    main(recipe)
