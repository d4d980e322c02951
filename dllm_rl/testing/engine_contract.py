"""The contract of rollout engines."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Generator, Tensor

from dllm_rl.diagnostics.trace_check import check_trace, replayed
from dllm_rl.models.base import Policy, copied
from dllm_rl.models.engine import RolloutEngine
from dllm_rl.types import Prompts, Rollout


def check_engine(
    engine: RolloutEngine, policy: Policy, prompts: Prompts, sampler: Callable, *, bound: float = 0.02, seed: int = 0
) -> None:
    """Raise AssertionError, naming the broken promise, unless the engine's rollouts fulfill their contract.

    Call it in a test of a custom `RolloutEngine`.

    A rollout must name the learner's version. Its steps must be possible (`check_trace`). It must record the log-probs
    of its tokens under its sampling_params: the learner's differ by at most `bound` nats a token in the mean. A
    completion ends at its full length, with its end token, or (block-causal) with the block of that token. A row's
    randomness depends only on its seed. After `sync` all this holds for the new weights. Nothing else changes.

    Args:
        engine: Engine to check.
        policy: Learner. It is copied and does not change.
        prompts: Prompts with a group_size of at least 2. Their seeds are replaced.
        sampler: Sampler of the recipe, at a temperature other than 0 and 1: these would hide a log-prob at a wrong
            temperature.
        bound: Largest mean difference in nats that formats and kernels of the engine may cause. Log-probs of other
            weights must differ by more than twice the bound.
        seed: Seed of the rows' seeds.

    Raises:
        AssertionError: A promise is broken, or the inputs cannot show it.
    """
    learner = copied(policy)
    learner.module.requires_grad_(False)
    facts = _facts(learner)
    rollout_policy = engine.load(learner)
    seeds = torch.arange(prompts.num_rows) + 1000 * (seed + 1)

    def sampled(seeds: Tensor) -> Rollout:
        return sampler(rollout_policy, replace(prompts, seeds=seeds), Generator().manual_seed(seed))

    rollout = sampled(seeds)
    telling = rollout.sampling_params.temperature not in (0, 1) and prompts.group_size > 1
    assert telling, "sample at a temperature other than 0 and 1, as 0.7, with a group_size of at least 2"
    in_blocks = learner.spec.attention == "block_causal"
    _check_rows(rollout, sampled, seeds, {*learner.spec.eos_ids}, in_blocks=in_blocks)
    _check_record(learner, rollout, bound)
    _check_untouched(learner, *facts)

    scored = replayed(learner, rollout)[1][rollout.completion_mask]
    for tensor in learner.module.parameters():  # an update, after which the old weights would be far off
        tensor.mul_(0.5)
    learner.weights_version += 1
    moved = (replayed(learner, rollout)[1][rollout.completion_mask] - scored).abs().mean()
    assert moved > 2 * bound, f"bound={bound} nats hides weights that differ by {moved:.3g}: give a smaller one"
    facts = _facts(learner)
    metrics = engine.sync(learner, rollout_policy)
    assert all(isinstance(value, float) for value in metrics.values()), f"sync returns metrics as floats, got {metrics}"
    _check_record(learner, sampled(seeds), bound)
    _check_untouched(learner, *facts)


def _facts(learner: Policy) -> tuple[dict[str, Tensor], Tensor]:
    return copied(learner).module.state_dict(), torch.get_rng_state()


def _check_untouched(learner: Policy, before: dict[str, Tensor], state: Tensor) -> None:
    now = learner.module.state_dict()
    same = now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)
    assert same, "the learner's weights must not change"
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not be used"


def _check_record(learner: Policy, rollout: Rollout, bound: float) -> None:
    versions = f"weights_version={rollout.weights_version} of a rollout, but the learner's is {learner.weights_version}"
    assert rollout.weights_version == learner.weights_version, f"{versions}: load and sync must pass it on"
    report = check_trace(learner, rollout, bound=bound)
    mean = report.total.mean_abs
    why = report.verdict if report.differs else "are they of other tokens, at another temperature, of other weights?"
    assert mean <= bound, f"log-probs differ by {mean:.3g} nats a token, more than bound={bound}: {why}"  # also on NaN
    # Kernels that round differently may choose another order.
    faults = [f"{fault.kind}: {fault.text}" for fault in report.faults if fault.kind != "order"]
    assert not faults, f"the record is impossible: {'; '.join(faults)}"


def _check_rows(
    rollout: Rollout, sampled: Callable[[Tensor], Rollout], seeds: Tensor, ends: set[int], *, in_blocks: bool
) -> None:
    first = _written(rollout)
    full = max(map(len, first))
    # A block-causal model completes the block of its end token.
    lost = [row for row in first if len(row) < full and not {*(row if in_blocks else row[-1:])} & ends]
    assert not lost, f"tokens {lost[:1]} end early without an end token: a completion must hold that token"
    assert _written(sampled(seeds)) == first, "the same seeds must give the same tokens"
    assert _written(sampled(seeds + 10**6)) != first, "other seeds must give other tokens: is engine or policy greedy?"
    groups = torch.arange(len(seeds)).view(-1, rollout.group_size).flip(1).flatten()
    turned = _written(sampled(seeds[groups]))
    assert [turned[i] for i in groups] == first, "a row's random numbers must depend only on its seed"


def _written(rollout: Rollout) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.completion_mask, strict=True)]
