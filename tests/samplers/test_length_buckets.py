"""Rows of like length go through the model together: the same completions as in one batch, from fewer positions."""

from functools import partial

import pytest
import torch
from layouts import checkpoint
from repetitions import few, slow
from simulated_cuda import SimulatedCuda

from dllm_rl import load_policy
from dllm_rl.models.base import FORWARD_COST
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.samplers import rules
from dllm_rl.samplers.cache import BlockCache, DualCache, PrefixCache
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts

CHARACTERS = "0123456789 abcdefghijklmnop"
SIZES = [3, 40, 9, 40, 17, 4]
IDS = [[3 + (7 * row + 5 * i) % 25 for i in range(size)] for row, size in enumerate(SIZES)]
NEVER = 10**9
OPTIONS = {
    "exact": {},
    "threshold": {"commit": rules.Threshold(tau=0.3)},
    "infilling": {"fill": True},
    "prefix cache": {"cache": PrefixCache(refresh=1)},
    "dual cache": {"cache": DualCache(refresh=1)},
    "block cache": {"cache": BlockCache()},
}


@pytest.fixture
def split(monkeypatch):
    """How many positions a forward costs: 0 gives every length a bucket, NEVER keeps the batch whole."""
    return lambda cost: monkeypatch.setitem(FORWARD_COST, "cpu", cost)


def policy_for(name, tmp_path):
    if name == "block cache":
        return load_policy(checkpoint(tmp_path, "sdar"))
    sizes = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return tiny_llama(characters=CHARACTERS, causal=False, head_std=0.5, **sizes)


def sample(policy, ids=IDS, seeds=range(12), *, fill=False, group=2, **options):
    options = {"temperature": 1.0, "rank": rules.MaxProb(), "diffusion_steps": 4} | options
    if not fill and policy.spec.attention == "full":
        options["block_size"] = 4
    opened = [[i % 3 == 1 for i in range(len(row))] for row in ids] if fill else None
    prompts = Prompts.from_ids(ids, pad_id=0, num_generations=group, seeds=seeds, open_positions=opened)
    return Unmask(max_new_tokens=8, **options)(policy, prompts, torch.Generator())


def positions_run(policy, monkeypatch, run):
    shapes, encode = [], policy.encode
    spy = lambda tokens, *a, **k: (shapes.append(tuple(tokens.shape)), encode(tokens, *a, **k))[1]  # noqa: E731
    monkeypatch.setattr(policy, "encode", spy)
    run()
    monkeypatch.undo()
    return shapes


@pytest.mark.parametrize(
    ("name", "cost"),
    [("exact", 60), ("block cache", 0), *(slow(name, 0) for name in OPTIONS if name != "block cache")],
)
def test_completions_are_those_of_one_batch(name, cost, tmp_path, split):
    """Tokens and their order are equal; log-probs to the rounding of sums over other numbers of columns."""
    policy = policy_for(name, tmp_path)
    split(NEVER)
    whole = sample(policy, **OPTIONS[name])
    split(cost)
    apart = sample(policy, **OPTIONS[name])
    assert torch.equal(apart.tokens, whole.tokens) and torch.equal(apart.unmask_step, whole.unmask_step)
    assert torch.equal(apart.attention_mask, whole.attention_mask) and apart.forwards == whole.forwards
    torch.testing.assert_close(apart.logprobs, whole.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", few(OPTIONS, [*OPTIONS][:2]))
@pytest.mark.usefixtures("exact_arithmetic")
def test_in_a_bucket_of_its_length_a_row_is_bitwise_what_it_is_alone(name, tmp_path, split):
    policy = policy_for(name, tmp_path)
    split(0)
    together = sample(policy, **OPTIONS[name])
    for prompt in (1, 2, 5):
        alone = sample(policy, IDS[prompt : prompt + 1], range(2 * prompt, 2 * prompt + 2), **OPTIONS[name])
        width, rows = alone.tokens.shape[1], slice(2 * prompt, 2 * prompt + 2)
        assert torch.equal(together.tokens[rows, -width:], alone.tokens)
        found = together.logprobs[rows, -width:]
        if name == "block cache":  # attention over a cache reads fewer rows, and rounds by their number
            torch.testing.assert_close(found, alone.logprobs, rtol=0, atol=1e-5)
        else:
            assert torch.equal(found, alone.logprobs)


def test_the_padding_that_a_bucket_shares_is_not_run(split, monkeypatch):
    """Prompts of 40 twice, 17, 9, 4, 3, two completions each and 8 new: the group's first forward, then one by rows."""
    policy = policy_for("exact", None)
    split(40)
    shapes = positions_run(policy, monkeypatch, lambda: sample(policy, diffusion_steps=2))
    assert shapes == [(2, 48), (2, 25), (2, 12), (4, 48), (4, 25), (4, 12)]
    split(NEVER)
    assert positions_run(policy, monkeypatch, lambda: sample(policy, diffusion_steps=2)) == [(6, 48), (12, 48)]


def test_rows_of_one_length_are_one_batch_whatever_a_forward_costs(split, monkeypatch):
    policy, ids = policy_for("exact", None), [IDS[1], IDS[3]]
    split(0)
    run = partial(sample, policy, ids, range(4), diffusion_steps=2)
    assert positions_run(policy, monkeypatch, run) == [(2, 48), (4, 48)]
    apart = run()
    split(NEVER)
    assert torch.equal(apart.logprobs, run().logprobs)


def test_a_step_waits_for_the_device_once_a_bucket_at_most(monkeypatch):
    monkeypatch.setitem(FORWARD_COST, "cuda", 0)
    waits = []
    with SimulatedCuda() as cuda:
        policy = tiny_llama(characters=CHARACTERS, causal=False, num_layers=1).to("cuda")
        for steps in (2, 4):
            with cuda.phase(f"{steps} steps"):
                sample(policy, IDS[:3], range(6), diffusion_steps=steps)
            waits.append(cuda.waits(f"{steps} steps"))
        assert waits[1] - waits[0] <= 2 * 3, cuda.report()
        once = [cuda.waits(f"{steps} steps", place="samplers/unmask.py") for steps in (2, 4)]
        assert once == [4, 4], "each bucket's rows that share a prompt, and whether a score is NaN: " + cuda.report()
