"""One policy that fills in many scaffolds: Ehrlich functions, which stand for an assay of proteins.

An Ehrlich function (Stanton et al., arXiv 2407.00236) scores sequences of 32 residues: two motifs of four residues, at
distances of their own, give 0 to 1, and a sequence with a pair of neighbors that never occurs in nature gives 0. A
scaffold is 8 residues of a natural sequence; the policy writes the other 24, in four parallel steps. It is made here:
supervised steps on natural sequences, whose scores it does not see. Is it worth it? studies/scaffolds.md

pip install pytorch-holo==0.0.5; python -m recipes.scaffolds
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Generator, Tensor

from dllm_rl import MaxProb, Policy, Problem, Recipe, Reward, Trajectory, Unmask, main
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.rng import generator_for

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
LENGTH, GIVEN = 32, 8


@cache
def ehrlich(instance: int) -> Any:
    """The function of a random seed. Raises ValueError without pytorch-holo."""
    try:
        from holo.test_functions.closed_form import Ehrlich  # here: it takes seconds, and --help needs none
    except ModuleNotFoundError as error:
        raise ValueError(f"Ehrlich functions need pytorch-holo ({error}): pip install pytorch-holo==0.0.5") from error

    return Ehrlich(
        num_states=len(RESIDUES), dim=LENGTH, num_motifs=2, motif_length=4, quantization=4, random_seed=instance
    )


def score(instance: int, sequences: Sequence[str]) -> list[float]:
    """The function's values, 0 to 1; 0 for what is not feasible, or no sequence of 32 residues."""
    values = [0.0] * len(sequences)
    valid = [i for i, text in enumerate(sequences) if len(text) == LENGTH and set(text) <= {*RESIDUES}]
    if valid:
        found = ehrlich(instance)(states([sequences[i] for i in valid])).clamp_min(0)
        for i, value in zip(valid, found.tolist(), strict=True):
            values[i] = value
    return values


def states(sequences: Sequence[str]) -> Tensor:
    """(N, 32) numbers of the residues."""
    return torch.tensor([[RESIDUES.index(residue) for residue in text] for text in sequences])


def text_of(row: Tensor) -> str:
    return "".join(RESIDUES[i] for i in row.tolist())


def natural(instance: int, count: int, generator: Generator) -> Tensor:
    """(count, 32) natural sequences: walks of the function's Markov chain."""
    function = ehrlich(instance)
    from holo.test_functions.elemental import sample_dmp

    start = function.stationary_dist.squeeze(-1)
    return sample_dmp(start, function.transition_matrix, LENGTH, count, generator)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]  # the template adds <eos>, as in the supervised steps


@dataclass(frozen=True)
class Scaffolds:
    """`size` scaffolds of an instance; those of two splits differ."""

    instance: int
    split: str
    size: int
    name, version = "scaffolds", "1"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        generator = generator_for(self.instance, "scaffold", self.split, index)
        residues = text_of(natural(self.instance, 1, generator)[0])
        kept = {*torch.randperm(LENGTH, generator=generator)[:GIVEN].tolist()}
        return Problem(chat("".join(r if i in kept else "_" for i, r in enumerate(residues))), blank="_")

    def reward(self, problem: Problem, completion: str) -> Reward:
        return self.rewards([problem], [completion])[0]

    def rewards(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Reward]:
        values = score(self.instance, completions)
        return [Reward(value, True, {"found": float(value == 1), "positive": float(value > 0)}) for value in values]


def taught(instance: int, *, seed: int = 0, steps: int = 300, dry_run: bool = False) -> Policy:
    """A model after `steps` supervised steps on 64 natural sequences each; with `dry_run`, after none."""
    policy = tiny_llama(
        characters=RESIDUES, causal=False, hidden_size=64, num_layers=2, max_length=LENGTH + 1, seed=seed
    )
    policy.tokenizer.chat_template = "{{ messages[0]['content'] }}<eos>"
    if dry_run:
        return policy
    from dllm_rl.distributed.collectives import OneProcess  # here: --help would wait for it
    from dllm_rl.supervised.examples import Example
    from dllm_rl.supervised.trainer import SupervisedTrainer

    optimizer = torch.optim.AdamW(policy.module.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    trainer = SupervisedTrainer(policy=policy, processes=OneProcess(), like_rollouts=True)
    learned = torch.tensor([True] * LENGTH + [False])
    for step in range(steps):
        generator = generator_for(seed, "lesson", step)
        rows = natural(instance, 64, generator)
        ids = torch.cat([rows + 3, torch.full((64, 1), policy.tokenizer.eos_token_id)], 1)  # after the special tokens
        rate = 4e-3 * min(1.0, (step + 1) / 30, (steps - step) / 60)
        examples = [Example(row, learned) for row in ids]
        loss = trainer.step(optimizer, examples, generator, learning_rate=rate, place=f"step {step}")["loss"]
        if step % 50 == 0 and os.environ.get("RANK", "0") == "0":
            print(f"supervised step {step} of {steps}: loss {loss:.3f}", flush=True)
    return policy


in_four = Unmask(
    max_new_tokens=0, diffusion_steps=4, rank=MaxProb(), temperature=1.0, suppress=("<pad>", "<eos>", "<mask>")
)
recipe = Recipe(
    name="scaffolds",
    model=partial(taught, 0),
    task=Scaffolds(0, "train", 4000),
    validation_task=Scaffolds(0, "validation", 100),
    eval_task=Scaffolds(0, "test", 200),
    sampler=in_four,
    eval_sampler=in_four,
    likelihood=Trajectory(),
    learning_rate=3e-3,
    train_batch_size=64,
    max_retained_graphs=4,
    num_steps=40,
    eval_steps=20,
)

if __name__ == "__main__":
    main(recipe)
