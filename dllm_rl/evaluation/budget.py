"""The parameter of an adaptive commit rule for a budget of forwards: `--commit threshold --forwards 4`."""

from collections.abc import Callable
from functools import partial
from statistics import fmean

from dllm_rl.evaluation.evaluate import complete
from dllm_rl.models.base import Policy
from dllm_rl.samplers.by_name import COMMITS, read_commit
from dllm_rl.samplers.records import as_commit
from dllm_rl.tasks.base import Problem
from dllm_rl.types import Rollout

# More slack commits more positions per step. The ends, 10^5 nats and 1 - 10^-7, are beyond the values of any rule.
NUMBER_OF_SLACK: dict[str, Callable[[float], float]] = {
    "threshold": lambda slack: max(1 - slack, 1e-9),
    "factor": lambda slack: slack,
    "entropy_bound": lambda slack: slack,
}
SLACK_RANGE = (-7.0, 5.0)  # log10
HALVINGS = 10


def within_budget(
    policy: Policy,
    problems: dict[int, Problem],
    sampler: Callable[..., Rollout],
    commit: str,
    budget: int,
    *,
    seed: int,
) -> str:
    """Return the commit rule with the number that uses the most forwards per answer within the budget, on average over
    the problems.

    A rule of `diffusion_steps` is returned unchanged. The search reads no grades. It costs 11 batches.

    Raises:
        ValueError: The rule has a number already, is `edit`, or needs more forwards because of its blocks.
    """
    name, _, value = commit.partition("=")
    if name in COMMITS and not as_commit(COMMITS[name]).adaptive:
        return commit
    if value or name not in NUMBER_OF_SLACK:
        remedy = (
            f"write {name}, whose number is then found"
            if name in NUMBER_OF_SLACK
            else f"use {', '.join(NUMBER_OF_SLACK)}"
        )
        raise ValueError(f"--forwards {budget}: commit={commit!r} decides its own forwards; {remedy}")

    def rule(slack: float) -> str:
        return f"{name}={NUMBER_OF_SLACK[name](float(f'{10**slack:.3g}')):.9g}"

    def forwards(slack: float) -> float:
        rows = complete(policy, problems, partial(sampler, commit=read_commit(rule(slack))), seed, 1, {})
        return fmean(row["evaluation"]["steps"] for row in rows.values())

    low, high = SLACK_RANGE
    if (least := forwards(high)) > budget:
        raise ValueError(f"--forwards {budget}: commit={name} takes {least:g} at least; use larger blocks, or more")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if forwards(middle) <= budget:
            high = middle
        else:
            low = middle
    return rule(high)
