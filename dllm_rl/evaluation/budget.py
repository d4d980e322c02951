"""Search for the parameter of an adaptive commit rule that meets a budget: `--commit threshold --forwards 4`."""

from collections.abc import Callable
from functools import partial
from statistics import fmean

from dllm_rl.evaluation.evaluate import complete
from dllm_rl.models.base import Policy
from dllm_rl.samplers.by_name import COMMITS, read_commit
from dllm_rl.samplers.records import as_commit
from dllm_rl.tasks.base import Problem
from dllm_rl.types import Rollout

# Commit rule -> function from slack to the rule's parameter. More slack commits more positions per step.
PARAMETER_FROM_SLACK: dict[str, Callable[[float], float]] = {
    "threshold": lambda slack: max(1 - slack, 1e-9),
    "factor": lambda slack: slack,
    "entropy_bound": lambda slack: slack,
}
SLACK_RANGE = (-7.0, 5.0)  # of log10(slack): from a threshold of 1 - 10^-7 to a factor or bound of 10^5
NUM_BISECTIONS = 10


def within_budget(
    policy: Policy,
    problems: dict[int, Problem],
    sampler: Callable[..., Rollout],
    commit: str,
    budget: int,
    *,
    seed: int,
) -> str:
    """Return the commit rule with the parameter that uses the most forwards per answer within the budget.

    The forwards are averaged over the problems. The search samples 11 batches and grades nothing. A rule that is not
    adaptive follows `diffusion_steps` and is returned unchanged.

    Args:
        policy: Policy to sample from.
        problems: Problems by index.
        sampler: Sampler with all settings except `commit` bound.
        commit: Name of the commit rule.
        budget: Largest number of forwards per answer.
        seed: Seed of the sampler.

    Returns:
        The rule as text, such as "threshold=0.9".

    Raises:
        ValueError: The rule has a parameter already, has none to search for (such as edit), or its blocks alone need
            more forwards than the budget.
    """
    name, _, value = commit.partition("=")
    if name in COMMITS and not as_commit(COMMITS[name]).adaptive:
        return commit
    if value or name not in PARAMETER_FROM_SLACK:
        remedy = (
            f"write {name}, whose number is then searched"
            if name in PARAMETER_FROM_SLACK
            else f"use {', '.join(PARAMETER_FROM_SLACK)}"
        )
        raise ValueError(f"--forwards {budget}: commit={commit!r} decides its own forwards; {remedy}")

    def rule(slack: float) -> str:
        return f"{name}={PARAMETER_FROM_SLACK[name](float(f'{10**slack:.3g}')):.9g}"

    def forwards(slack: float) -> float:
        rows = complete(policy, problems, partial(sampler, commit=read_commit(rule(slack))), seed, 1, {})
        return fmean(row["evaluation"]["steps"] for row in rows.values())

    low, high = SLACK_RANGE
    if (fewest := forwards(high)) > budget:
        raise ValueError(f"--forwards {budget}: commit={name} takes {fewest:g} at least; use larger blocks, or more")
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        if forwards(middle) <= budget:
            high = middle
        else:
            low = middle
    return rule(high)
