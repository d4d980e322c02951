"""Infilling as mutation: the prompts are the best sequences so far, crossed, with some residues masked.

`Elites` is a task and a callback in one: after each step it reads the paid calls of an `Oracle` and writes the prompts
of the next step. Here it searches for the best sequence of one Ehrlich function (scaffolds.py) with 5,000 calls. GRPO
trains the model that mutates. Is it better than a genetic algorithm? studies/scaffolds.md

pip install pytorch-holo==0.0.5; python -m recipes.elites
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator

from dllm_rl import Callback, Oracle, Problem, Recipe, Reward, Trajectory, main
from dllm_rl.callbacks import RunControl
from dllm_rl.monitoring.json_lines import json_objects
from dllm_rl.rng import generator_for
from recipes.scaffolds import LENGTH, chat, in_four, score, taught

BUDGET = 5000


class Elites(Callback):
    """Prompts for infilling that are mutations of the best sequences so far.

    Set the same object as the recipe's `task` and, after the oracle, in its `callbacks`. A checkpoint has the prompts
    of the next step, so that a resume repeats a killed step with the same prompts. It needs rollouts of their own step:
    leave `max_staleness` at 0.

    oracle   measures the sequences; or its `without_calls()`, for evaluations
    prompt   makes a prompt of a sequence with blanks "_"
    length   of the sequences, residues
    size     number of prompts, of which each step draws some
    elites   number of best sequences that are mutated
    masked   residues that are masked
    seed     of the mutations
    """

    name, version, graded_once = "elites", "1", True

    def __init__(
        self,
        oracle: Oracle,
        prompt: Callable[[str], Any],
        *,
        length: int,
        size: int = 64,
        elites: int = 20,
        masked: int = 8,
        seed: int = 0,
    ):
        self.oracle, self.prompt, self.elites, self.masked, self.seed = oracle, prompt, elites, masked, seed
        self.masked_texts = ["_" * length] * size  # of the first step: sequences of the pretrained model

    def __len__(self) -> int:
        return len(self.masked_texts)

    def __getitem__(self, index: int) -> Problem:
        return Problem(self.prompt(self.masked_texts[index]), blank="_")

    def reward(self, problem: Problem, completion: str) -> Reward:
        return self.rewards([problem], [completion])[0]

    def rewards(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Reward]:
        return [Reward(value, value is not None) for value in self.oracle(completions=list(completions))]

    def on_step(self, run: RunControl, metrics: Any) -> None:
        calls = [row for row in json_objects(run.directory / "oracle.jsonl") if row.get("reward") is not None]
        calls.sort(key=lambda row: -row["reward"])  # of equal ones the older first
        best = list(dict.fromkeys(row["arguments"]["completions"] for row in calls))[: self.elites]
        generator = generator_for(self.seed, "elites", run.step)
        if best:
            self.masked_texts = mutations(best, len(self), self.masked, generator)

    def state(self) -> dict[str, Any]:
        return {"masked_texts": self.masked_texts}

    def load_state(self, state: dict[str, Any]) -> None:
        self.masked_texts = state["masked_texts"]


def mutations(best: Sequence[str], count: int, masked: int, generator: Generator) -> list[str]:
    """`count` texts: the beginning of one of the best, the rest of another in half of them, `masked` places blank."""
    found = []
    for _ in range(count):
        one, other = (best[i] for i in torch.randint(len(best), (2,), generator=generator).tolist())
        # At most the whole length: in half of the texts nothing is crossed.
        cut = int(torch.randint(2 * len(one), (), generator=generator))
        blank = {*torch.randperm(len(one), generator=generator)[:masked].tolist()}
        crossed = one[:cut] + other[cut:]
        found.append("".join("_" if i in blank else residue for i, residue in enumerate(crossed)))
    return found


def infilling(
    instance: int,
    model: Any,
    *,
    budget: int = BUDGET,
    masked: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
    **settings: Any,
) -> Recipe:
    """The recipe of an instance of the functions and a model that has learned natural sequences."""

    def measured(completions: Sequence[str]) -> list[float]:
        return score(instance, completions)

    oracle = Oracle(measured, budget=budget, batch_size=64)
    elites = Elites(oracle, chat, length=LENGTH, masked=masked, seed=seed)
    whole = Elites(oracle.without_calls(), chat, length=LENGTH, size=1)  # evaluations call for no sequence
    sampler = in_four.replace(temperature=temperature)
    fields = {
        "name": "elites",
        "model": model,
        "task": elites,
        "validation_task": whole,
        "eval_task": whole,
        "callbacks": [oracle, elites],
        "sampler": sampler,
        "eval_sampler": sampler,
        "likelihood": Trajectory(),
        "train_batch_size": 16,
        "max_retained_graphs": 4,
        "num_steps": 200,
        "eval_steps": 0,
        "save_steps": 1,
        "reward_timeout": None,
        "seed": seed,
    }
    return Recipe(**fields | settings)


recipe = infilling(0, partial(taught, 0))

if __name__ == "__main__":
    main(recipe)
