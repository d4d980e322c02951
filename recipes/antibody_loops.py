"""What runs of antibody_cdr3 write on held-out frameworks, beside what the pretrained model writes.

    python -m recipes.antibody_loops RUN [RUN ...]

A line for each: reward and what it is made of; `natural`, the pretrained model's mean pseudo-log-likelihood of a
residue of the loop, all others seen, in nats; `distinct`, the share of loops among them that are not said twice;
`identity`, the mean share of places at which two loops of one problem agree. Then the first problem's loops.
"""

import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch
from torch import Generator

from dllm_rl import Policy, load_policy
from dllm_rl.decoding.prompts import encode, ids_and_blanks
from dllm_rl.decoding.texts import full_texts
from dllm_rl.files import read_json
from dllm_rl.records import from_json
from dllm_rl.samplers import Sampler
from dllm_rl.tasks import Problem
from recipes import weights
from recipes.antibody_cdr3 import SPECIALS, Loops, in_two, loop_of

GROUP = 4  # loops of each problem


def measure(
    policy: Policy, pretrained: Policy, task: Loops, sampler: Sampler = in_two
) -> tuple[dict[str, float], list[str]]:
    """The numbers of the module's docstring over GROUP loops of each problem, and the loops, a problem's in a row."""
    problems = [task[i] for i in range(len(task))]
    prompts = encode(policy, problems, num_generations=GROUP, seeds=range(GROUP * len(problems)))
    texts = full_texts(policy, sampler(policy, prompts, Generator()))
    owners = [problem for problem in problems for _ in range(GROUP)]
    loops = [loop_of(problem, text) for problem, text in zip(owners, texts, strict=True)]
    rewards = [task.reward(problem, text) for problem, text in zip(owners, texts, strict=True)]
    numbers = {"reward": fmean(reward.value for reward in rewards)}
    numbers |= {name: fmean(reward.breakdown[name] for reward in rewards) for name in rewards[0].breakdown}
    numbers["natural"] = fmean(naturalness(pretrained, p, loop) for p, loop in zip(owners, loops, strict=True))
    numbers["distinct"] = len(set(loops)) / len(loops)
    numbers["identity"] = fmean(identity(loops[i : i + GROUP]) for i in range(0, len(loops), GROUP))
    return numbers, loops


@torch.no_grad()
def naturalness(policy: Policy, problem: Problem, loop: str) -> float:
    """Mean over the loop's residues of log p(residue | all of the sequence but that residue), nats."""
    ids, blanks = ids_and_blanks(policy, problem.prompt, problem.blank)
    gap, own = torch.tensor(blanks).nonzero()[:, 0], torch.tensor(policy.tokenizer.convert_tokens_to_ids(list(loop)))
    whole = torch.tensor(ids).index_copy(0, gap, own)
    views, order = whole.repeat(len(gap), 1), torch.arange(len(gap))
    views[order, gap] = policy.spec.mask_id
    logits = policy.logits(views, torch.ones_like(views, dtype=torch.bool))[order, gap]
    logits[:, [*SPECIALS, policy.spec.mask_id]] = -torch.inf
    return float(logits.log_softmax(-1)[order, own].mean())


def identity(loops: Sequence[str]) -> float:
    """Mean over pairs of loops of one length of the share of places at which they agree."""
    return fmean(sum(map(str.__eq__, one, other)) / len(one) for one, other in combinations(loops, 2))


def held_out(checkpoint: Path) -> tuple[Loops, Sampler]:
    """Ten of the problems that a run was evaluated on, and the sampler of its evaluations."""
    stored = read_json(checkpoint / "state.json")["recipe"]
    sampler = from_json(Sampler, stored["eval_sampler"], "eval_sampler")
    return Loops(**stored["eval_task"]["init_args"] | {"size": 10}), sampler


if __name__ == "__main__":
    pretrained = load_policy(weights.antiberty())
    for run in map(Path, sys.argv[1:]):
        checkpoint = max(run.glob("checkpoints/step-*[0-9]"))
        for name, policy in {"pretrained": pretrained, run.name: load_policy(checkpoint)}.items():
            numbers, loops = measure(policy, pretrained, *held_out(checkpoint))
            print(name, *(f"{key} {value:.3f}" for key, value in numbers.items()), sep="  ")
            print("   ", *loops[:GROUP], flush=True)
