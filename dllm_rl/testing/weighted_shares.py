"""Check by sampling whether the likelihood of a sampler's rollouts is the probability with which it wrote them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator

from dllm_rl.likelihoods.estimator import LikelihoodEstimator, recorded
from dllm_rl.likelihoods.estimators import trajectory
from dllm_rl.models.base import Policy, copied
from dllm_rl.types import Prompts, Rollout


@dataclass(frozen=True)
class Shares:
    """The result of `weighted_shares`.

    Args:
        record: Largest gap between the sampler's record and the learner's log-prob of a completion, in nats. At most
            1e-5.
        mean_ratio: Mean of p_other / p_policy over the policy's rollouts. It should be 1.
        ratio_error: Standard error of mean_ratio. A mean further than three errors from 1 is a failure.
        spread: Standard deviation of the ratios. It should be 0.2 to 1, or the check sees little.
        off: Largest gap, in standard errors, between a completion's share in the weighted rollouts and its share in the
            other policy's rollouts. Above 4 is a failure.
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

    Call it in a test of a custom sampler with a known likelihood. As weights of one policy's rollouts, the ratio must
    give the completions the shares that they have in the other policy's rollouts. This holds if the likelihood is the
    probability of all that the sampler decided by the weights: the tokens, and which positions were written when.

    Args:
        policy: Tiny policy, so that few completions are possible: a hundred at most for 2000 rows.
        sampler: Sampler as in a recipe, at temperature 1, which suppresses all tokens but a few.
        prompt: Token ids.
        likelihood: Estimator to check. None: `trajectory()`.
        rows: Number of rollouts of each policy.
        factor: Factor on the weights of the second policy. Further from 1 the ratios spread more.
    """
    likelihood = likelihood or trajectory()
    other = copied(policy)
    for weight in other.module.parameters():
        weight.mul_(factor)

    def rolled(by: Policy, first: int) -> Rollout:
        seeds = range(first, first + rows)
        prompts = Prompts.from_ids([list(prompt)], pad_id=policy.pad_id, group_size=rows, seeds=seeds)
        return sampler(by, prompts, Generator().manual_seed(0))

    rollout, theirs = rolled(policy, 0), rolled(other, rows)
    views = likelihood.draw_views(rollout, Generator().manual_seed(0))
    log_p, log_q = (likelihood.logprobs(each, rollout, views).sum(-1) for each in (other, policy))
    record = recorded(rollout, views) if likelihood.exact_for_sampler else rollout.logprobs
    ratio = (log_p - log_q).double().exp()
    completions = torch.cat([rollout.tokens, theirs.tokens])[:, len(prompt) :]
    number = completions.unique(dim=0, return_inverse=True)[1]
    here, there = (F.one_hot(part, int(number.max()) + 1).double() for part in number.split(rows))
    weighted = here * ratio[:, None]
    noise = ((weighted.var(0) + there.var(0)) / rows).sqrt()
    return Shares(
        record=float((record.sum(-1) - log_q).abs().max()),
        mean_ratio=float(ratio.mean()),
        ratio_error=float(ratio.std() / rows**0.5),
        spread=float(ratio.std()),
        off=float(((weighted.mean(0) - there.mean(0)).abs() / noise).max()),
        writings=0.0 if rollout.events is None else float((rollout.events.step >= 0).sum()) / rows,
    )
