"""Left-to-right sampling: generate's argmax, the distribution's frequencies, a forward's log-probs."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from layouts import checkpoint
from own_module import Own, own_policy
from repetitions import slow

from dllm_rl import Autoregress, PrefixCache, Prompts, Unmask, load_policy
from dllm_rl.models.base import copied
from dllm_rl.models.logprobs import process
from dllm_rl.models.rollout_engine import with_forward
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.types.rollouts import SamplingParams

SMALL = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
PROMPTS = [[5, 9, 4], [7, 12, 30, 8, 21, 6], [11]]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return load_policy(checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3"))


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompts(ids=PROMPTS, **more) -> Prompts:
    return Prompts.from_ids(ids, pad_id=1, **more)


class OwnCausal(Own):
    causal = True


def plain_forward(policy):
    """A policy of a function of tokens, mask and positions, as an engine of one's own makes it."""
    engine = copied(policy)
    return with_forward(policy, lambda *inputs: engine.head(engine.encode(*inputs)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: own_policy(kind=OwnCausal),
        lambda: plain_forward(own_policy(kind=OwnCausal)),
        lambda: plain_forward(tiny_llama(characters="1234.=", causal=True)),
    ],
    ids=["module", "engine of a module", "engine"],
)
def test_a_model_that_keeps_no_keys_and_values_runs_whole_rows(make):
    """Its log-probs are those of one forward of the completed rows."""
    policy = make()
    ids = [[3, 5, 4], [7], [6, 3, 3, 4, 5]]
    rollout = Autoregress(max_new_tokens=5)(policy, prompts(ids, num_generations=2), gen())
    with torch.no_grad():
        logits = policy.logits(rollout.tokens, rollout.attention_mask)
    expected = logits.log_softmax(-1).gather(-1, rollout.tokens[..., None])[..., 0]
    done = rollout.completion_mask
    torch.testing.assert_close(rollout.logprobs[done].float(), expected[done].float(), atol=1e-5, rtol=1e-4)
    assert len(done) == 6 and (done.sum(-1) > 1).any()


def test_a_samplers_cache_needs_keys_and_values():
    policy = own_policy()
    sampler = Unmask(max_new_tokens=4, block_size=2, cache=PrefixCache())
    with pytest.raises(ValueError, match=r"policy 'own' keeps no keys and values: set the sampler's cache=None"):
        sampler(policy, prompts([[3, 4]]), gen())


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.usefixtures("exact_arithmetic")
def test_a_row_is_bitwise_the_same_among_few_rows_and_many(count):
    policy = tiny_llama(characters="1234.=", causal=True, **SMALL)
    ids, seeds = [[3 + (7 * row + i) % 6 for i in range(9)] for row in range(6)], list(range(6))
    many = Autoregress(max_new_tokens=8)(policy, prompts(ids, seeds=seeds), gen())
    few = Autoregress(max_new_tokens=8)(policy, prompts(ids[:count], seeds=seeds[:count]), gen())
    width = few.tokens.shape[1]
    assert len(few.tokens) == len(few.attention_mask) == count
    assert torch.equal(few.tokens, many.tokens[:count, :width])
    assert torch.equal(few.logprobs, many.logprobs[:count, :width])


@pytest.mark.parametrize("family", ["llama", "qwen3", slow("smollm2")])
def test_greedy_is_generate(qwen, tmp_path, family):
    policy = qwen if family == "qwen3" else load_policy(checkpoint(tmp_path, family))
    rollout = Autoregress(max_new_tokens=8, temperature=0.0)(policy, prompts(), gen())
    for row, ids in zip(rollout.tokens[:, 6:], PROMPTS, strict=True):
        alone = torch.tensor([ids])
        # One by one: generate's own left padding is not what is tested here.
        expected = policy.module.generate(
            alone,
            attention_mask=torch.ones_like(alone),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=2,
        )[0, len(ids) :]
        assert row[: len(expected)].tolist() == expected.tolist()
        assert (row[len(expected) :] == 1).all()


@pytest.mark.parametrize(
    ("options", "sampling_params"),
    [
        ({}, SamplingParams(1.0)),
        ({"temperature": 0.7}, SamplingParams(0.7)),
        ({"temperature": 1.3, "top_k": 5}, SamplingParams(1.3, 5)),
        ({"top_p": 0.6}, SamplingParams(1.0, None, 0.6)),
        ({"temperature": 0.8, "top_k": 9, "top_p": 0.9, "suppress": (3, 4)}, SamplingParams(0.8, 9, 0.9, (3, 4))),
        ({"temperature": 0.0}, SamplingParams(0.0)),
    ],
)
def test_logprobs_are_those_of_a_forward_over_the_result(qwen, options, sampling_params):
    rollout = Autoregress(max_new_tokens=10, **options)(qwen, prompts(num_generations=4), gen(1))
    assert rollout.sampling_params == sampling_params
    marked = rollout.completion_mask
    logits = process(qwen.logits(rollout.tokens, rollout.attention_mask)[marked], sampling_params)
    expected = logits.log_softmax(-1).gather(-1, rollout.tokens[marked][:, None])[:, 0]
    torch.testing.assert_close(rollout.logprobs[marked], expected, rtol=0, atol=1e-5)
    assert (rollout.logprobs[~marked] == 0).all()
    assert not torch.isin(rollout.tokens[marked], torch.tensor(sampling_params.suppress, dtype=torch.long)).any()


def test_a_row_does_not_depend_on_padding_or_neighbors(qwen):
    seeds = list(range(12))
    together = Autoregress(max_new_tokens=9)(qwen, prompts(num_generations=4, seeds=seeds), gen())
    for p, ids in enumerate(PROMPTS):
        alone = Autoregress(max_new_tokens=9)(
            qwen, prompts([ids], num_generations=4, seeds=seeds[4 * p : 4 * p + 4]), gen(5)
        )
        width = alone.tokens.shape[1] - len(ids)  # all four may have ended early
        rows = slice(4 * p, 4 * p + 4)
        assert torch.equal(together.tokens[rows, 6 : 6 + width], alone.tokens[:, len(ids) :])
        torch.testing.assert_close(
            together.logprobs[rows, 6 : 6 + width], alone.logprobs[:, len(ids) :], rtol=0, atol=1e-5
        )


def test_a_longer_limit_begins_with_the_shorter_ones_tokens(qwen):
    short, long = (Autoregress(max_new_tokens=n)(qwen, prompts(), gen(3)).tokens for n in (4, 10))
    assert torch.equal(short, long[:, : short.shape[1]])


def test_frequencies_are_the_exact_distribution():
    """All 4 * 4 completions of two tokens, the end token among them; chi-squared at the 0.1 % level."""
    policy = tiny_llama(
        characters="a",
        causal=True,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        head_std=0.2,
    )
    ids, count = [3, 3], 5000
    rollout = Autoregress(max_new_tokens=2, temperature=0.8, suppress=(1,))(
        policy, prompts([ids], num_generations=count), gen(2)
    )
    found = {}
    for row, mask in zip(rollout.tokens[:, 2:].tolist(), rollout.completion_mask[:, 2:].tolist(), strict=True):
        key = tuple(t for t, m in zip(row, mask, strict=True) if m)
        found[key] = found.get(key, 0) + 1

    def probs(prefix):
        tokens = torch.tensor([[*ids, *prefix, 0]])
        logits = policy.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, -1] / 0.8
        logits[1] = -torch.inf
        return logits.double().softmax(-1).tolist()

    exact, first = {}, probs([])
    for a, b in itertools.product((0, 2, 3), repeat=2):
        key, p = ((2,), first[2]) if a == 2 else ((a, b), first[a] * probs([a])[b])
        exact[key] = p
    assert set(found) <= set(exact)
    assert abs(sum(exact.values()) - 1) < 1e-12
    chi = sum((found.get(k, 0) - count * p) ** 2 / (count * p) for k, p in exact.items())
    assert len(exact) == 7
    assert min(exact.values()) * count > 20
    assert chi < 22.46  # 6 degrees of freedom


def test_top_k_and_top_p_draw_from_what_they_keep(qwen):
    """The first token of 2000 rows, against sets worked out from the raw logits."""
    ids = [5, 9, 4]
    tokens = torch.tensor([[*ids, 0]])
    probs = qwen.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))[0, -1].double().softmax(-1)
    order = probs.argsort(descending=True)
    nucleus = order[: int((probs[order].cumsum(0) < 0.5).sum()) + 1]
    for options, kept in (({"top_k": 4}, order[:4]), ({"top_p": 0.5}, nucleus)):
        rollout = Autoregress(max_new_tokens=1, **options)(qwen, prompts([ids], num_generations=2000), gen(4))
        drawn, counts = rollout.tokens[:, 3].unique(return_counts=True)
        assert set(drawn.tolist()) == set(kept.tolist())
        share = torch.zeros(40, dtype=torch.float64).index_put((drawn,), counts.double() / 2000)
        torch.testing.assert_close(share[kept], probs[kept] / probs[kept].sum(), rtol=0, atol=0.04)


def test_the_end_token_ends_a_row():
    policy = tiny_llama(characters="ab", causal=True, head_std=0.5, **SMALL)
    rollout = Autoregress(max_new_tokens=12)(policy, prompts([[3], [4, 3]], num_generations=25), gen())
    new, mask = rollout.tokens[:, 2:], rollout.completion_mask[:, 2:]
    ends = (new == 2) & mask
    assert (ends.sum(-1) <= 1).all()
    assert 0.1 < ends.any(-1).float().mean() < 0.9
    for row, kept in zip(new.tolist(), mask.tolist(), strict=True):
        length = row.index(2) + 1 if 2 in row else len(row)
        assert kept == [i < length for i in range(len(row))]
        assert row[length:] == [policy.pad_id] * (len(row) - length)
    assert torch.equal(rollout.attention_mask[:, 2:], mask)
    assert torch.equal(rollout.unmask_step[:, 2:], torch.where(mask, torch.arange(mask.shape[1]), -1))


def test_any_of_several_end_tokens_ends_a_row():
    policy = tiny_llama(characters="ab", causal=True, head_std=0.5, **SMALL)
    policy.spec = replace(policy.spec, eos_ids=(2, 4))
    rollout = Autoregress(max_new_tokens=16)(policy, prompts([[3]], num_generations=50), gen())
    ends = set()
    for row, kept in zip(rollout.tokens[:, 1:].tolist(), rollout.completion_mask[:, 1:].tolist(), strict=True):
        length = next((i + 1 for i, token in enumerate(row) if token in (2, 4)), len(row))
        assert kept == [i < length for i in range(len(row))]
        ends.add(row[length - 1])
    assert {2, 4} <= ends


def test_what_does_not_fit_is_refused(qwen):
    with pytest.raises(
        ValueError, match="max_new_tokens=60 after a prompt of 6 tokens exceeds the model's 64 positions"
    ):
        Autoregress(max_new_tokens=60)(qwen, prompts(), gen())


def test_a_row_ends_with_whichever_end_token_comes_first():
    """LLaDA and others have several."""
    policy = tiny_llama(
        characters="123456789", causal=True, hidden_size=32, num_layers=1, num_attention_heads=2, head_std=0.5
    )
    prompts = Prompts.from_ids([[5, 6, 7]], pad_id=policy.pad_id, num_generations=40, seeds=range(40))
    run = partial(Autoregress(max_new_tokens=12), policy, prompts, torch.Generator())
    policy.spec = replace(policy.spec, eos_ids=())
    endless = run()
    ends = (4, 9)
    policy.spec = replace(policy.spec, eos_ids=ends)
    rollout = run()
    stops = {4: 0, 9: 0}
    for row, free in enumerate(endless.tokens[:, 3:].tolist()):
        last = next((i for i, token in enumerate(free) if token in ends), 11)
        stops |= {free[last]: stops.get(free[last], 0) + 1}
        chosen = rollout.completion_mask[row, 3:].tolist()
        assert chosen == [i <= last for i in range(len(chosen))]
        assert rollout.tokens[row, 3 : 4 + last].tolist() == free[: last + 1]
    assert min(stops[4], stops[9]) >= 1  # each of the two did end rows
