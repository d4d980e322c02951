"""The chunked head against the plain computation: values, gradients, memory, filters, dtypes."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_rl.models import logprobs as head_module
from dllm_rl.models.logprobs import (
    backward_token_logprobs,
    invert_cdf,
    process,
    sample,
    token_logprobs,
)
from dllm_rl.samplers import choose as propose_module
from dllm_rl.types.rollouts import SamplingParams

ROWS, WIDTH, VOCABULARY = 23, 8, 50
FILTERS = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "greedy": SamplingParams(temperature=0.0),
    "suppress": SamplingParams(suppress=(0, 7)),
    "top_k": SamplingParams(top_k=6),
    "top_p": SamplingParams(top_p=0.7),
    "all": SamplingParams(temperature=1.3, top_k=12, top_p=0.8, suppress=(3,)),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy(dtype=torch.float32):
    layer = nn.Linear(WIDTH, VOCABULARY, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_(generator=seeded(1))
        layer.bias.normal_(generator=seeded(2))
    policy = SimpleNamespace(head=layer, vocab_size=VOCABULARY, device=torch.device("cpu"))
    hidden = torch.randn(ROWS, WIDTH, generator=seeded(3)).to(dtype).requires_grad_()
    tokens = torch.randint(8, VOCABULARY, (ROWS,), generator=seeded(4))  # none of the suppressed ones
    return policy, hidden, tokens


def plain(policy, hidden, tokens, p: SamplingParams):
    """Log-probs by masking and normalizing probabilities in fp64, written out a row at a time."""
    logps = []
    for row, y in zip(policy.head(hidden).double(), tokens.tolist(), strict=True):
        allowed = torch.ones(VOCABULARY, dtype=torch.bool)
        allowed[list(p.suppress)] = False
        row = row / (p.temperature or 1)
        if p.top_k:
            order = [i for i in row.argsort(descending=True).tolist() if allowed[i]]
            allowed = torch.tensor([i in order[: p.top_k] or i == y for i in range(VOCABULARY)])
        if p.top_p:
            probs = row.masked_fill(~allowed, -torch.inf).softmax(-1)
            mass, kept = 0.0, set()
            for i in probs.argsort(descending=True).tolist():
                if mass < p.top_p:
                    kept.add(i)
                mass += probs[i].item()
            allowed = torch.tensor([bool(allowed[i]) and (i in kept or i == y) for i in range(VOCABULARY)])
        logps.append(row[y] - row[allowed].exp().sum().log())
    return torch.stack(logps)


@pytest.fixture(params=[1, 16, 1000], ids=lambda n: f"chunks of {n}")
def chunk(request, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", request.param * VOCABULARY)
    return request.param


@pytest.mark.parametrize("name", FILTERS)
def test_values_and_gradients_are_those_of_the_plain_computation(name, chunk):
    policy, hidden, tokens = toy()
    vector = torch.randn(ROWS, generator=seeded(5))
    leaves = [hidden, policy.head.weight, policy.head.bias]
    expected = plain(policy, hidden, tokens, FILTERS[name])
    gradients = torch.autograd.grad((expected * vector).sum(), leaves)

    logps = token_logprobs(policy, hidden, tokens, FILTERS[name])
    torch.testing.assert_close(logps, expected.float(), atol=2e-6, rtol=1e-6)
    close = {"atol": 5e-6, "rtol": 1e-5}
    for got, want in zip(torch.autograd.grad((logps * vector).sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(got, want.float(), **close)

    backward_token_logprobs(policy, hidden, tokens, FILTERS[name], vector)
    for leaf, want in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad, want.float(), **close)


def test_by_hand():
    """Logits (log 1, log 2, log 5), token 1: log 2/8; without token 2, log 2/3; the two likeliest at T = 1/2, 4/29."""
    row = torch.tensor([[math.log(1), math.log(2), math.log(5)]])
    policy = SimpleNamespace(head=lambda h: h, vocab_size=3, device=torch.device("cpu"))
    at = lambda y, **p: token_logprobs(policy, row, torch.tensor([y]), SamplingParams(**p)).item()  # noqa: E731
    assert at(1) == pytest.approx(math.log(2 / 8))
    assert at(1, suppress=(2,)) == pytest.approx(math.log(2 / 3))
    assert at(1, temperature=0.5, top_k=2) == pytest.approx(math.log(4 / 29))
    assert at(2, top_p=0.6) == pytest.approx(0.0)
    assert at(2, top_p=0.7) == pytest.approx(math.log(5 / 7))
    # Token 0 is outside the two likeliest: it is scored with itself added to them, 1/8, and not as impossible.
    assert at(0, top_k=2) == pytest.approx(math.log(1 / 8))
    assert at(0, top_k=1, top_p=0.5) == pytest.approx(math.log(1 / 6))


class Largest(TorchDispatchMode):
    """Element count of the largest floating tensor that any operation makes, but for those of the given shapes."""

    def __init__(self, *ignored: tuple[int, ...]):
        super().__init__()
        self.ignored, self.seen = {math.prod(shape) for shape in ignored}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() not in self.ignored:
                self.seen = max(self.seen, x.numel())
        return out


@pytest.mark.parametrize("name", ["plain", "all"])
def test_no_tensor_of_logits_is_larger_than_a_chunk(name, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 16 * VOCABULARY)
    policy, hidden, tokens = toy()
    weights = ((VOCABULARY, WIDTH), (WIDTH, VOCABULARY))
    for run in (
        lambda: token_logprobs(policy, hidden, tokens, FILTERS[name]).sum().backward(),
        lambda: backward_token_logprobs(policy, hidden, tokens, FILTERS[name], torch.ones(ROWS)),
    ):
        with Largest(*weights) as largest:
            run()
        assert largest.seen == 16 * VOCABULARY
    with Largest(*weights) as largest:
        plain(policy, hidden, tokens, FILTERS[name])
    assert largest.seen == ROWS * VOCABULARY  # the spy does see the plain way's tensor


def test_chunks_by_device():
    """32 MiB of fp32 logits on a CPU, 256 MiB on an accelerator, in multiples of 16 rows; 16 of the widest."""
    llada = 126_464
    assert head_module.chunk_rows(llada, torch.device("cpu")) == 64
    assert head_module.chunk_rows(llada, torch.device("cuda")) == 528
    assert head_module.chunk_rows(10**9, torch.device("cuda")) == 16
    # What a sampler reduces at once is a part of that, on either.
    for device, elements in propose_module.SLAB_ELEMENTS.items():
        assert elements < llada * head_module.chunk_rows(llada, torch.device(device))


def test_each_chunk_of_logits_is_made_once_when_the_vector_is_known(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 16 * VOCABULARY)
    policy, hidden, tokens = toy()
    layer, calls = policy.head, []
    policy.head = lambda h: (calls.append(len(h)), layer(h))[1]
    backward_token_logprobs(policy, hidden, tokens, SamplingParams(), torch.ones(ROWS))
    assert calls == [16, 7]
    calls.clear()
    token_logprobs(policy, hidden, tokens, SamplingParams()).sum().backward()
    assert calls == [16, 16, 16, 16]  # padded to whole multiples, and recomputed in the backward


def test_bf16_inputs_are_reduced_in_fp32(chunk):
    policy, hidden, tokens = toy(torch.bfloat16)
    seen = []
    with policy.head.register_forward_hook(lambda head, inputs, logits: seen.append(logits.detach())):
        logps = token_logprobs(policy, hidden, tokens, SamplingParams(temperature=0.5))
    assert logps.dtype == torch.float32
    low = torch.cat(seen)[: len(tokens)]  # its own bf16 logits: another call would round otherwise
    logits = low.double() / 0.5  # everything after them in fp64
    expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=0)
    in_bf16 = (low / 0.5).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert (in_bf16.double() - expected).abs().max() > 1e-2  # what a bf16 reduction would have lost
    logps.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    reference = hidden.detach().double().requires_grad_()
    weights, bias = policy.head.weight.detach().double(), policy.head.bias.detach().double()
    (reference @ weights.T + bias).div(0.5).log_softmax(-1).gather(-1, tokens[:, None]).sum().backward()
    scale = reference.grad.abs().max()
    assert ((hidden.grad.double() - reference.grad).abs().max() / scale) < 0.02


def test_nothing_to_score():
    policy, hidden, tokens = toy()
    assert token_logprobs(policy, hidden[:0], tokens[:0], FILTERS["all"]).shape == (0,)
    backward_token_logprobs(policy, hidden[:0], tokens[:0], FILTERS["all"], torch.zeros(0))
    assert hidden.grad is None or hidden.grad.abs().max() == 0


def test_filters_leave_the_tokens_that_they_should():
    logits = torch.tensor([[3.0, 1.0, 3.0, 0.0, 2.0]])
    kept = lambda **p: torch.isfinite(process(logits, SamplingParams(**p)))[0].tolist()  # noqa: E731
    assert kept(top_k=1) == [True, False, True, False, False]  # a tie with the k-th stays
    assert kept(top_k=3) == [True, False, True, False, True]
    assert kept(suppress=(0, 4)) == [False, True, True, True, False]
    assert kept(top_p=0.3) == [True, False, False, False, False]  # a tie in top-p goes to the lowest index
    assert kept(suppress=(0,), top_k=2) == [False, False, True, False, True]
    # Four equal tokens have exactly 1/4 each: the mass before the third is 1/2, which is not below top_p.
    equal = process(torch.zeros(1, 4), SamplingParams(top_p=0.5))
    assert torch.isfinite(equal)[0].tolist() == [True, True, False, False]
    keep = process(logits, SamplingParams(top_k=1, top_p=0.3, suppress=(0,)), torch.tensor([3]))
    assert torch.isfinite(keep)[0].tolist() == [False, False, True, True, False]
    assert torch.equal(process(logits, SamplingParams(temperature=0.0)), logits)


def test_samples_follow_the_processed_distribution():
    """100,000 draws at even quantiles: shares within 1/100,000 of the probabilities; filtered tokens never drawn."""
    logits = process(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), SamplingParams(temperature=0.8, suppress=(3,), top_k=2))
    uniforms = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    drawn = sample(logits.expand(100_000, -1), uniforms)
    share = torch.bincount(drawn, minlength=4).double() / 100_000
    torch.testing.assert_close(share, logits.double().softmax(-1)[0], atol=1e-5, rtol=0)
    assert share[0] == 0 and share[3] == 0
    edge = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits.expand(2, -1), edge).tolist() == [1, 2]


def test_inversion_in_groups_is_inversion_over_the_whole_vocabulary():
    """600 tokens are two groups of 256 and a rest. Masses of 0 to 2 that sum to 512: quantile k / 512 is exact."""
    mass = torch.randint(0, 3, (600,), generator=seeded()).float()
    mass[:300] = 0  # a group and a bit of tokens that are never drawn
    mass[300] += 512 - mass.sum()
    quantiles = torch.arange(512, dtype=torch.float64) / 512
    expected = torch.arange(600).repeat_interleave(mass.long())
    assert torch.equal(invert_cdf(mass.expand(512, -1), quantiles), expected)
    assert torch.equal(invert_cdf(mass.flip(0).expand(512, -1), quantiles), 599 - expected.flip(0))


def test_rounding_draws_no_token_outside_of_the_vocabulary():
    """In fp32 1 + 1.5 * 2^-24 is 1 + 2^-23, more than the two masses: the last quantile lies beyond both."""
    mass = torch.tensor([[1.0, 1.5 * 2**-24]])
    assert invert_cdf(mass, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [1]


def test_defaults_are_neutral():
    assert replace(SamplingParams(), top_k=VOCABULARY, top_p=1.0) != SamplingParams()
    policy, hidden, tokens = toy()
    a, b = (
        token_logprobs(policy, hidden, tokens, p)
        for p in (SamplingParams(), SamplingParams(top_k=VOCABULARY, top_p=1.0))
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("size", [3, 256, 300, 1000])
def test_masses_that_are_nan_draw_some_token(size):
    """An index behind the vocabulary would end the process on a GPU; the token's log-prob tells."""
    mass = torch.full((2, size), torch.nan)
    drawn = invert_cdf(mass, torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert ((drawn >= 0) & (drawn < size)).all()
