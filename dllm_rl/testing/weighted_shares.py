"""Check by sampling whether an estimator gives the probability with which a sampler writes its rollouts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator

from dllm_rl.likelihoods.estimator import LikelihoodEstimator, recorded
from dllm_rl.likelihoods.estimators import Trajectory
from dllm_rl.models.base import Policy, copied
from dllm_rl.types import Prompts, Rollout


@dataclass(frozen=True)
class Shares:
    """The result of `weighted_shares`.

    Args:
        record: Largest difference between a completion's log-prob as the sampler recorded it and as the estimator
            computes it, in nats. It should be at most 1e-5.
        mean_ratio: Mean of p_other / p_policy over the policy's rollouts. It should be 1.
        ratio_error: Standard error of mean_ratio. A mean further than three errors from 1 is a failure.
        spread: Standard deviation of the ratios. It should be 0.2 to 1, else the check detects little.
        off: Largest difference, in standard errors, between a completion's share of the policy's weighted rollouts and
            its share of the other policy's rollouts. Above 4 is a failure.
        writings: Tokens written per completion, including rewritten ones. 0 for a sampler that records no events.
    """

    record: float
    mean_ratio: float
    ratio_error: float
    spread: float
    off: float
    writings: float


@torch.no_grad()
def weighted_shares(
    policy: Policy,
    sampler: Callable,
    prompt: Sequence[int],
    *,
    likelihood: LikelihoodEstimator | None = None,
    rows: int = 2000,
    factor: float = 1.15,
) -> Shares:
    """Check by sampling that the likelihood ratio of two policies is a correct importance weight.

    Call it in a test of a custom sampler with a known likelihood. If one policy's rollouts are weighted with the ratio,
    each completion must have the share that it has in the other policy's rollouts. This holds if the likelihood is the
    probability of everything in which the sampler depends on the policy: the tokens, and when each position is written.

    Args:
        policy: Tiny policy, so that few completions are possible: at most a hundred for 2000 rows.
        sampler: Sampler as in a recipe, at temperature 1, with all but a few tokens suppressed.
        prompt: Token ids.
        likelihood: Estimator to check. None: `Trajectory()`.
        rows: Number of rollouts of each policy.
        factor: The other policy's weights are the policy's times this factor. Further from 1, ratios differ more.

    Returns:
        What to assert on: see `Shares`.
    """
    likelihood = likelihood or Trajectory()
    other = copied(policy)
    for weight in other.module.parameters():
        weight.mul_(factor)

    def sample(sampling_policy: Policy, first_seed: int) -> Rollout:
        seeds = range(first_seed, first_seed + rows)
        prompts = Prompts.from_ids([list(prompt)], pad_id=policy.pad_id, num_generations=rows, seeds=seeds)
        return sampler(sampling_policy, prompts, Generator().manual_seed(0))

    rollout, other_rollout = sample(policy, 0), sample(other, rows)
    views = likelihood.draw_views(rollout, Generator().manual_seed(0))
    other_logps, logps = (likelihood.logprobs(scorer, rollout, views).sum(-1) for scorer in (other, policy))
    record = recorded(rollout, views) if likelihood.exact_for_sampler else rollout.logprobs
    ratio = (other_logps - logps).double().exp()
    completions = torch.cat([rollout.tokens, other_rollout.tokens])[:, len(prompt) :]
    completion_index = completions.unique(dim=0, return_inverse=True)[1]
    num_completions = int(completion_index.max()) + 1
    one_hot, other_one_hot = (F.one_hot(part, num_completions).double() for part in completion_index.split(rows))
    weighted = one_hot * ratio[:, None]
    standard_error = ((weighted.var(0) + other_one_hot.var(0)) / rows).sqrt()
    return Shares(
        record=float((record.sum(-1) - logps).abs().max()),
        mean_ratio=float(ratio.mean()),
        ratio_error=float(ratio.std() / rows**0.5),
        spread=float(ratio.std()),
        off=float(((weighted.mean(0) - other_one_hot.mean(0)).abs() / standard_error).max()),
        writings=0.0 if rollout.events is None else float((rollout.events.step >= 0).sum()) / rows,
    )
