"""Check a rollout engine against its contract."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Generator, Tensor

from dllm_rl.decoding.texts import completion_token_ids
from dllm_rl.diagnostics.trace_check import check_trace, replayed
from dllm_rl.models.base import Policy, copied
from dllm_rl.models.rollout_engine import RolloutEngine
from dllm_rl.types.groups import group_sizes
from dllm_rl.types.rollouts import Prompts, Rollout


def check_engine(
    engine: RolloutEngine, policy: Policy, prompts: Prompts, sampler: Callable, *, bound: float = 0.02, seed: int = 0
) -> None:
    """Check that an engine's rollouts fulfill their contract.

    Call it in a test of a custom `RolloutEngine`.

    A rollout must have the learner's weights_version. Its steps must be possible (`check_trace`). It must record the
    log-probs of its tokens under its sampling_params; on average they differ from the learner's by at most `bound` nats
    per token. A completion ends at its full length, with its end token, or (block-causal) with the block of that token.
    A row's randomness depends only on its seed. After `sync`, all this holds for the new weights. The learner and the
    global random generator do not change.

    Args:
        engine: Engine to check.
        policy: Learner. It is copied and does not change.
        prompts: Prompts with at least 2 rows in each group. Their seeds are replaced.
        sampler: Sampler of the recipe, at a temperature other than 0 and 1, because these would hide a log-prob at a
            wrong temperature.
        bound: Largest mean difference in nats that the engine's number formats and kernels may cause. The check also
            changes the weights, which must change the log-probs by more than twice the bound.
        seed: Seed from which the rows' seeds are made.

    Raises:
        AssertionError: A requirement is violated, or the inputs cannot show it. The message says which.
    """
    learner = copied(policy)
    learner.module.requires_grad_(False)
    state = _learner_state(learner)
    rollout_policy = engine.load(learner)
    seeds = torch.arange(len(prompts.tokens)) + 1000 * (seed + 1)

    def sample(seeds: Tensor) -> Rollout:
        return sampler(rollout_policy, replace(prompts, seeds=seeds), Generator().manual_seed(seed))

    rollout = sample(seeds)
    is_informative = rollout.sampling_params.temperature not in (0, 1) and min(group_sizes(prompts.group)) > 1
    assert is_informative, "sample at a temperature other than 0 and 1, as 0.7, with at least 2 rows in each group"
    in_blocks = learner.spec.attention == "block_causal"
    _check_rows(rollout, sample, seeds, {*learner.spec.eos_ids}, in_blocks=in_blocks)
    _check_record(learner, rollout, bound)
    _check_untouched(learner, *state)

    before = replayed(learner, rollout)[1][rollout.completion_mask]
    for tensor in learner.module.parameters():  # an update so large that stale weights are detected
        tensor.mul_(0.5)
    learner.weights_version += 1
    change = (replayed(learner, rollout)[1][rollout.completion_mask] - before).abs().mean()
    assert change > 2 * bound, f"bound={bound} nats hides weights that differ by {change:.3g}: give a smaller one"
    state = _learner_state(learner)
    metrics = engine.sync(learner, rollout_policy)
    assert all(isinstance(value, float) for value in metrics.values()), f"sync returns metrics as floats, got {metrics}"
    _check_record(learner, sample(seeds), bound)
    _check_untouched(learner, *state)


def _learner_state(learner: Policy) -> tuple[dict[str, Tensor], Tensor]:
    """Return copies of the learner's weights and of the global generator's state."""
    return copied(learner).module.state_dict(), torch.get_rng_state()


def _check_untouched(learner: Policy, before: dict[str, Tensor], rng_state: Tensor) -> None:
    now = learner.module.state_dict()
    is_same = now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)
    assert is_same, "the learner's weights must not change"
    assert torch.equal(torch.get_rng_state(), rng_state), "the global generator must not be used"


def _check_record(learner: Policy, rollout: Rollout, bound: float) -> None:
    versions = f"weights_version={rollout.weights_version} of a rollout, but the learner's is {learner.weights_version}"
    assert rollout.weights_version == learner.weights_version, f"{versions}: load and sync must pass it on"
    report = check_trace(learner, rollout, bound=bound)
    mean = report.total.mean_abs
    # A NaN fails this assertion too.
    assert mean <= bound, f"log-probs differ by {mean:.3g} nats a token, more than bound={bound}: {report.verdict}"
    # Faults of the order are not errors: kernels that round differently may choose another order.
    faults = [f"{fault.kind}: {fault.text}" for fault in report.faults if fault.kind != "order"]
    assert not faults, f"the record is impossible: {'; '.join(faults)}"


def _check_rows(
    rollout: Rollout, sample: Callable[[Tensor], Rollout], seeds: Tensor, eos_ids: set[int], *, in_blocks: bool
) -> None:
    """Check where completions end, and that a row's tokens depend only on its seed."""
    expected = completion_token_ids(rollout)
    full_length = max(map(len, expected))
    # A block-causal model completes the block of its end token, so tokens may follow that token.
    lacking = [row for row in expected if len(row) < full_length and not {*(row if in_blocks else row[-1:])} & eos_ids]
    assert not lacking, f"tokens {lacking[:1]} end early without an end token: a completion must hold that token"
    assert completion_token_ids(sample(seeds)) == expected, "the same seeds must give the same tokens"
    assert completion_token_ids(sample(seeds + 10**6)) != expected, (
        "other seeds must give other tokens: is engine or policy greedy?"
    )
    # Seeds in reverse order within each group, whose rows have the same prompt.
    order = torch.cat([rows.flip(0) for rows in torch.arange(len(seeds)).split(group_sizes(rollout.group.cpu()))])
    reordered = completion_token_ids(sample(seeds[order]))
    assert [reordered[i] for i in order] == expected, "a row's random numbers must depend only on its seed"
