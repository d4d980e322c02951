from dataclasses import dataclass
from functools import partial
from operator import eq

from dllm_rl import Problem, Recipe, Reward, from_command_line, train, trajectory, unmask
from dllm_rl.models.tiny import tiny_masked_lm


@dataclass(frozen=True)
class Sorting:  # "4213=" is answered by "1234"
    numbers: range
    name, version = "sorting", "1"

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        digits = f"{self.numbers[index]:04d}"
        return Problem(prompt=digits + "=", solution="".join(sorted(digits)))

    def reward(self, problem, completion):
        right = sum(map(eq, completion, problem.solution))
        return Reward(right / 4, parsed=len(completion) == 4, breakdown={"accuracy": float(right == 4)})


recipe = Recipe(
    name="sorting",
    model=partial(tiny_masked_lm, characters="0123456789="),
    task=Sorting(range(0, 10_000, 3)),
    validation_task=Sorting(range(1, 10_000, 33)),
    eval_task=Sorting(range(2, 10_000, 33)),
    sampler=partial(unmask, max_new_tokens=4, num_steps=2, temperature=1.0),
    eval_sampler=partial(unmask, max_new_tokens=4, num_steps=2, temperature=0.0),
    likelihood=trajectory(),
    warmup_steps=200,
    warmup_target=0.2,
    warmup_metric="accuracy",
    num_steps=60,
)

if __name__ == "__main__":
    train(from_command_line(recipe))
