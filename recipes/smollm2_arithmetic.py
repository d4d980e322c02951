"""SmolLM2-135M-Instruct, an autoregressive model, learns to add numbers of two digits by GRPO with FP8 rollouts.

Chat template, LoRA, and a KL term to the model as it was published. Weights: recipes/weights.py (Apache-2.0; needs
`pip install gguf`). Results: recipes/results.md.
"""

import re
from dataclasses import dataclass
from functools import cache
from zlib import crc32

from dllm_rl import TIS, Autoregress, Float8WeightOnly, Lora, Policy, Recipe, load_policy, main
from dllm_rl.groups import Evaluation, Log
from dllm_rl.likelihoods.estimators import Causal
from dllm_rl.tasks import Problem, Reward
from recipes import weights


@cache
def pairs(held_out: bool) -> list[tuple[int, int]]:
    """Those of one side, a fifth or the rest, in an order of no meaning; both orders of two numbers are on one."""
    key = lambda pair: crc32(f"{min(pair)}+{max(pair)}".encode())  # noqa: E731
    every = [(a, b) for a in range(10, 50) for b in range(10, 50)]
    return sorted((pair for pair in every if (key(pair) % 5 == 0) == held_out), key=key)


@dataclass(frozen=True)
class Sums:
    """Sums of two numbers from 10 to 49.

    held_out  those that are kept from training, or the others
    size      number of problems

    Reward: 1 for the right number at the answer's start, else half the share of its digits that are right.
    """

    name, version = "sums", "1"
    held_out: bool
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        a, b = pairs(self.held_out)[: self.size][index]
        said = [("system", "Add."), ("user", f"{a} + {b}"), ("assistant", f"{a} + {b} =")]  # where its turn begins
        return Problem([{"role": role, "content": text} for role, text in said], {"sum": a + b}, f" {a + b}")

    def reward(self, problem: Problem, completion: str) -> Reward:
        found, wanted = re.match(r"\s*(\d+)", completion), str(problem.fields["sum"])
        written = found[1] if found else ""
        right = sum(x == y for x, y in zip(written, wanted, strict=False)) / max(len(written), len(wanted))
        return Reward(1.0 if right == 1 else right / 2, found is not None, {"accuracy": float(right == 1)})


def smollm2() -> Policy:
    """The pretrained model, downloaded at the first call."""
    return load_policy(weights.smollm2())


answer = Autoregress(max_new_tokens=4)
recipe = Recipe(
    name="smollm2-arithmetic",
    model=smollm2,
    task=Sums(held_out=False, size=1200),
    validation_task=Sums(held_out=True, size=40),
    eval_task=Sums(held_out=True, size=100),
    sampler=answer.replace(temperature=1.0),
    eval_sampler=answer.replace(temperature=0.0),
    likelihood=Causal(),
    corrector=TIS(),  # the mean ESS is 0.92: docs/mismatch.md
    rollout_quantization=Float8WeightOnly(dequantized=True),
    lora=Lora(),
    beta=0.02,
    learning_rate=5e-4,
    train_batch_size=4,
    num_steps=30,
    evaluation=Evaluation(batch_size=100),
    log=Log(steps=5, completions_steps=20),
)

if __name__ == "__main__":
    main(recipe)
