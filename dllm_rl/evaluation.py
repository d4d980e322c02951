"""Evaluate a policy on a task."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from dllm_rl.policies import Policy
from dllm_rl.tasks.base import Problem, Reward, Task
from dllm_rl.text import decode, encode, stream
from dllm_rl.types import Rollout


def score(task: Task, problems: Sequence[Problem], completions: Sequence[str]) -> list[Reward]:
    """Grade completions, G in a row for each problem. A grader that raises stops the run, with what it was given."""
    group, graded = len(completions) // len(problems), []
    for i, completion in enumerate(completions):
        problem = problems[i // group]
        try:
            graded.append(task.reward(problem, completion))
        except Exception as error:
            raise RuntimeError(f"the grader of task {task.name!r} raised on problem {problem!r}, completion {completion!r}") from error
    return graded


def evaluate(
    policy: Policy,
    task: Task,
    sampler: Callable[..., Rollout],
    *,
    seed: int = 0,
    batch_size: int = 256,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Means over all problems of the task: reward, parsed, and every name of the rewards' breakdown.

    Problem i's random numbers depend on (seed, i) only. With an accelerator the problems are shared out to processes.
    """
    accelerator = accelerator or Accelerator(cpu=policy.device.type == "cpu")
    sums: dict[str, float] = {}
    mine = range(accelerator.process_index, len(task), accelerator.num_processes)
    for begin in range(0, len(mine), batch_size):
        indices = mine[begin : begin + batch_size]
        problems = [task[i] for i in indices]
        seeds = [stream(seed, "evaluate", i).initial_seed() for i in indices]
        rollout = sampler(policy, encode(policy, problems, seeds=seeds), stream(seed, "evaluate"))
        for reward in score(task, problems, decode(policy, rollout)):
            for name, value in {"reward": reward.value, "parsed": reward.parsed, **reward.breakdown}.items():
                sums[name] = sums.get(name, 0.0) + value
    names = sorted({name for part in accelerator.gather_for_metrics([list(sums)], use_gather_object=True) for name in part})
    totals = torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64, device=accelerator.device)
    return dict(zip(names, (accelerator.reduce(totals, reduction="sum") / len(task)).tolist(), strict=True))
