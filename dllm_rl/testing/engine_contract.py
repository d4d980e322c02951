"""The contract of every rollout engine."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dllm_rl.likelihoods.estimators import causal, recorded, trajectory
from dllm_rl.models.base import Policy, copied
from dllm_rl.models.engine import RolloutEngine
from dllm_rl.types import Prompts, Rollout

Sampler = Callable[[Policy, Prompts, Generator], Rollout]


def check_engine(
    engine: RolloutEngine, policy: Policy, prompts: Prompts, sampler: Sampler, *, bound: float = 0.02, seed: int = 0
) -> None:
    """Raise AssertionError, naming the broken promise, unless the engine's rollouts keep their contract.

    A rollout names the learner's version. It records the log-probs of its own tokens under its sampling_params: the
    learner's differ by at most `bound` nats a token in the mean. A completion ends at its full length or with its end
    token. A row's seed alone makes its chance. After `sync` all that holds for the new weights. Nothing else changes.

    prompts  with a group_size of at least 2; their seeds are replaced
    sampler  the recipe's, at a temperature other than 0 and 1: at these a log-prob's temperature does not show
    bound    what formats and kernels of the engine may make; log-probs of other weights must exceed twice of it
    """
    learner = copied(policy)
    learner.module.requires_grad_(False)
    rollout_policy = engine.load(learner)
    seeds = torch.arange(prompts.num_rows) + 1000 * (seed + 1)

    def sampled(seeds: Tensor) -> Rollout:
        return sampler(rollout_policy, replace(prompts, seeds=seeds), Generator().manual_seed(seed))

    before = [tensor.clone() for tensor in learner.module.state_dict().values()]
    state = torch.get_rng_state()
    rollout = sampled(seeds)
    assert rollout.sampling_params.temperature not in (0, 1), "sample at another temperature than 0 and 1, as 0.7"
    assert prompts.group_size > 1, "give prompts a group_size of at least 2"
    _check_ends(learner, rollout)
    _check_record(learner, rollout, bound)
    _check_seeds(rollout, sampled, seeds)
    after = learner.module.state_dict().values()
    assert all(map(torch.equal, before, after)), "the learner's weights must be left alone"
    assert torch.equal(torch.get_rng_state(), state), "the global generator must be left alone"

    scored = _logprobs(learner, rollout)
    for tensor in learner.module.parameters():  # an update, after which the old weights would be far off
        tensor.mul_(0.5)
    learner.version += 1
    moved = (_logprobs(learner, rollout) - scored).abs()[rollout.completion_mask].mean()
    assert moved > 2 * bound, f"bound={bound} nats hides weights that differ by {moved:.3g}: give a smaller one"
    metrics = engine.sync(learner, rollout_policy)
    assert all(isinstance(value, float) for value in metrics.values()), f"sync returns metrics as floats, got {metrics}"
    _check_record(learner, sampled(seeds), bound)


def _logprobs(learner: Policy, rollout: Rollout, *, of_record: bool = False) -> Float[Tensor, "B T"]:
    """The learner's log-probs of the sampled tokens (nats), or the record of the same."""
    exact = causal() if learner.spec.attention == "causal" else trajectory()
    noise = exact.draw(rollout, Generator().manual_seed(0))
    return recorded(rollout, noise) if of_record else exact.logprobs(learner, rollout, noise)


def _check_record(learner: Policy, rollout: Rollout, bound: float) -> None:
    versions = f"weights_version={rollout.weights_version} of a rollout, but the learner's is {learner.version}"
    assert rollout.weights_version == learner.version, f"{versions}: load and sync must pass it on"
    apart = (_logprobs(learner, rollout, of_record=True) - _logprobs(learner, rollout)).abs()
    mean = apart[rollout.completion_mask].mean()
    wrong = f"log-probs differ from the learner's by {mean:.3g} nats in the mean, more than bound={bound}"
    why = "of other tokens, at another temperature, of other weights?"
    assert mean <= bound, f"{wrong}: are they {why}"  # fails on NaN


def _check_ends(learner: Policy, rollout: Rollout) -> None:
    """Full attention has no early end: a shorter row lost its end."""
    length = rollout.completion_mask.sum(-1)
    columns = torch.arange(rollout.tokens.shape[1], device=length.device)
    last = torch.where(rollout.completion_mask, columns, -1).amax(-1)
    ends = torch.isin(rollout.tokens.gather(1, last.clamp(min=0)[:, None])[:, 0], torch.tensor(learner.spec.eos_ids))
    lost = ((length < length.max()) & ~ends).nonzero()[:, 0].tolist()
    assert not lost, f"row {lost[:1]} ends early without its end token: the completion must hold that token"


def _check_seeds(rollout: Rollout, sampled: Callable[[Tensor], Rollout], seeds: Tensor) -> None:
    def written(one: Rollout) -> list[list[int]]:
        pairs = zip(one.tokens, one.completion_mask, strict=True)
        return [row[mask].tolist() for row, mask in pairs]

    first = written(rollout)
    assert written(sampled(seeds)) == first, "the same seeds must give the same tokens"
    assert written(sampled(seeds + 10**6)) != first, "other seeds must give other tokens: is engine or policy greedy?"
    groups = torch.arange(len(seeds)).view(-1, rollout.group_size).flip(1).flatten()
    turned = written(sampled(seeds[groups]))
    assert [turned[i] for i in groups.tolist()] == first, "a row's seed alone must make its chance"
