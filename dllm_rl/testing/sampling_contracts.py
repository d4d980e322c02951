"""Check by sampling that outcomes are as frequent as a likelihood says, for ranks, commit rules and samplers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dllm_rl.likelihoods.estimators import LikelihoodEstimator, Trajectory, recorded
from dllm_rl.models.base import Policy, copied
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.samplers.rules import FunctionCommit, highest
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts, Rollout

LENGTH = 4  # tokens of a completion; with a vocabulary of two, 16 completions are possible
DRAWS, CHANGE = 512, 3e-4  # random numbers of each position and each rollout; by what the scores change
QUANTILE = 4.265  # of the standard normal distribution: a correct rule fails in one of 100,000 cases


def check_order(rank: Any, commit: Any, *, policy: Policy | None = None, rows: int = 1500, **options: Any) -> str:
    """Check that `Trajectory()` gives the probability with which a rank and a commit rule write.

    Call it in a test of a custom rank or commit rule.

    It samples completions of four positions and a vocabulary of two tokens. An outcome is a completion and the step
    that wrote each token. The check compares how often each outcome occurs with its probability, the exponential of
    `Trajectory()`. The log-probs that the sampler records must be equal to those of `Trajectory()`. If the
    commit rule reads `uniforms`, this is the probability of the tokens alone: the share of each choice of positions is
    counted, and must not depend on the weights.

    Args:
        rank: Rank to check.
        commit: Commit rule to check.
        policy: Policy to sample from. None: a tiny one, which samples only two characters.
        rows: Number of rollouts. More rollouts reveal smaller deviations.
        options: Keywords of `Unmask`. Default: two steps at temperature 1.

    Returns:
        The rollout's `Rollout.order.probability`. If it is "unknown", nothing is compared.

    Raises:
        AssertionError: The counts or the record contradict `Trajectory()`.
    """
    prompt = 3
    if policy is None:
        policy = tiny_masked_lm(characters="ab=", head_std=0.5)
        a, b, prompt = policy.tokenizer.encode("ab=", add_special_tokens=False)
        options = {"suppress": tuple({*range(policy.vocab_size)} - {a, b}), **options}
    prompts = Prompts.from_ids([[prompt]], pad_id=policy.pad_id, num_generations=rows, seeds=range(rows))
    options = {"max_new_tokens": LENGTH, "diffusion_steps": 2, "temperature": 1.0, **options}
    sampler = Unmask(rank=rank, commit=commit, **options)
    rollout = sampler(policy, prompts, Generator())
    assert rollout.order is not None, "a sampler that unmasks records the order"
    probability = rollout.order.probability
    if probability == "unknown":
        assert rollout.order.logprobs is None, "an order of unknown probability has no log-probs"
    else:
        reads_uniforms = "uniforms" in sampler.commit.reads
        draws_positions = probability == "deterministic" and reads_uniforms and rollout.events is None
        _check_counts(policy, rollout, probability, draws_positions=draws_positions)
        if draws_positions:
            _check_draws(policy, prompts, sampler)
    return probability


def _check_draws(policy: Policy, prompts: Prompts, sampler: Unmask) -> None:
    """Check that the same `uniforms` choose the same positions if all scores change a little, but not their order."""
    commit, calls = sampler.commit, []

    def keep(scores: Tensor, masked: Tensor, steps_left: Tensor, steps: Tensor) -> Tensor:
        calls.append((scores, masked, steps_left, steps))
        return masked & ((steps_left == 1)[:, None] | highest(scores, masked, count=torch.ones_like(steps)))

    sampler.replace(commit=FunctionCommit(function=keep))(policy, prompts, Generator())
    generator = Generator().manual_seed(0)
    for call in calls:
        scores, masked, steps_left, steps = (values.repeat_interleave(DRAWS, 0) for values in call)
        inputs = {"uniforms": torch.rand(scores.shape, generator=generator).to(scores)}
        inputs |= {"steps": steps} if "steps" in commit.reads else {}
        # Neither a factor nor a constant, which a softmax or a ratio of scores would not see.
        moved = scores + CHANGE * scores.sign() * scores.abs().sqrt()
        chosen, chosen_moved = (commit(values, masked, steps_left, **inputs) & masked for values in (scores, moved))
        changed = int((chosen != chosen_moved).any(-1).sum())
        assert not changed, (
            f"commit={commit.name} must not compare `uniforms` with numbers that depend on the weights: {changed} of "
            f"{len(scores)} choices changed when the scores changed by about {CHANGE:g}; declare no order"
        )


def _choice_shares(rollout: Rollout) -> Tensor:
    """Return the product over the steps of each row's share, among rows with the same earlier steps and tokens, of rows
    that wrote the same positions in this step.
    """

    def count(*values: Tensor) -> Tensor:
        _, number, counts = torch.cat(values, 1).unique(dim=0, return_inverse=True, return_counts=True)
        return counts[number].double()

    step_of, share = rollout.unmask_step, torch.ones(len(rollout.tokens), dtype=torch.float64)
    for step in range(int(step_of.max()) + 1):
        before = [values.masked_fill(step_of >= step, -1) for values in (step_of, rollout.tokens)]
        share *= count(*before, step_of == step) / count(*before)
    return share


def _check_counts(policy: Policy, rollout: Rollout, probability: str, *, draws_positions: bool = False) -> None:
    """Compare the counts of the outcomes with their probabilities, by a chi-squared test."""
    views = Trajectory().draw_views(rollout, Generator())
    logps = Trajectory().logprobs(policy, rollout, views).sum(-1).double()
    difference = float((recorded(rollout, views).sum(-1).double() - logps).abs().max())
    assert difference <= 1e-5, (
        f"the sampler's record must be the learner's log-prob, but they differ by {difference:.2g} nats"
    )
    events, order = rollout.events, rollout.order
    assert order is not None, "as in the caller"
    steps = [rollout.unmask_step] if events is None else list(events.step.unbind(-1))
    tokens = [rollout.tokens] if events is None else list(events.token.unbind(-1))
    draws = [] if order.draw_index is None else [order.draw_index]
    rows = len(logps)
    orders, order_number = torch.cat(steps, 1).unique(dim=0, return_inverse=True)
    total = torch.full((len(orders),), float(rows), dtype=torch.float64)
    # In these cases `Trajectory()` gives the probability of the tokens, given the order.
    if probability == "independent" or events is not None:
        total = torch.bincount(order_number).double()
    share = _choice_shares(rollout) if draws_positions else torch.ones(rows, dtype=torch.float64)
    _, outcome = torch.cat([*steps, *tokens, *draws], 1).unique(dim=0, return_inverse=True)
    first = torch.zeros(int(outcome.max()) + 1, dtype=torch.long).scatter_(0, outcome, torch.arange(rows))
    counts = torch.bincount(outcome).double()
    expected = total[order_number[first]] * share[first] * logps[first].exp()
    is_frequent = expected >= 8
    # Rare outcomes, and outcomes that never occurred, are merged into one.
    observed = torch.cat([counts[is_frequent], counts[~is_frequent].sum()[None]])
    expected = torch.cat([expected[is_frequent], rows - expected[is_frequent].sum()[None]])
    statistic = float(((observed - expected) ** 2 / expected.abs().clamp(min=8)).sum())
    degrees = max(len(observed) - 1, 1)
    limit = degrees * (1 - 2 / (9 * degrees) + QUANTILE * math.sqrt(2 / (9 * degrees))) ** 3  # Wilson-Hilferty
    assert statistic < limit, (
        f"outcomes must occur as often as Trajectory() says: chi-squared is {statistic:.0f}, at most {limit:.0f} for "
        f"{degrees} degrees of freedom; the order is declared {probability}"
    )


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
