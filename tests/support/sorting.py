"""The smallest task, of no split and no protocol: sort four digits."""

from dataclasses import dataclass
from random import Random

from dllm_rl.tasks.base import Problem, Reward


@dataclass(frozen=True)
class Mini:
    """Problem i asks "4213=" and is answered by "1234"; the reward is the share of places that are right."""

    name = "mini"
    version = "1"
    size: int = 1000
    seed: int = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self.size:
            raise IndexError(f"problem {index} of {self.size}")
        rng = Random(f"mini/{self.seed}/{index}")
        digits = "".join(str(int(rng.random() * 10)) for _ in range(4))
        ordered = "".join(sorted(digits))
        return Problem(prompt=digits + "=", fields={"sorted": ordered}, solution=ordered)

    def reward(self, problem: Problem, completion: str) -> Reward:
        answer, right = completion.strip(), problem.fields["sorted"]
        share = sum(a == b for a, b in zip(answer, right, strict=False)) / 4
        return Reward(share, len(answer) == 4, {"accuracy": float(answer == right)})
