"""Three positions, three words, a table instead of a model: draws against the enumeration of every outcome."""

import itertools
import math
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from repetitions import few, nightly, slow

from dllm_rl.models.checkpoint.families import FamilySpec
from dllm_rl.rng import uniforms
from dllm_rl.samplers import rules
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts

MASK, LENGTH, DRAWS = 3, 3, 50_000
STATES = 4**LENGTH


class TablePolicy:
    """Logits of each position are looked up by the state of all three; the head does nothing."""

    def __init__(self, seed):
        self.table = torch.randn(STATES, LENGTH, 4, generator=torch.Generator().manual_seed(seed)) * 1.5
        self.spec = FamilySpec("table", "full", mask_id=MASK)
        self.tokenizer, self.module, self.weights_version = SimpleNamespace(pad_token_id=0), None, 7
        self.float32_head, self.gradient_checkpointing = True, False
        self.device, self.vocab_size, self.pad_id = torch.device("cpu"), 4, 0
        self.lora = self.quantization = self.quantization_report = None

    def encode(self, tokens, attention_mask, positions, **cache):
        return self.hidden(tokens, attention_mask)

    def hidden(self, tokens, attention_mask):
        state = (tokens[:, 1:] * torch.tensor([16, 4, 1])).sum(-1)
        return torch.cat([torch.zeros(len(tokens), 1, 4), self.table[state]], dim=1)

    def head(self, hidden):
        return hidden.clone()

    def logits(self, tokens, attention_mask, positions=None):
        return self.hidden(tokens, attention_mask)

    to = save_pretrained = reference = head  # nothing here asks for them


POLICY = TablePolicy(seed=24)


@cache
def draw_distribution(tokens, temperature):
    """log p per position and word, under what is sampled from (the mask word is never drawn)."""
    logits = POLICY.table[tokens[0] * 16 + tokens[1] * 4 + tokens[2]].double()[:, :MASK]
    return (logits / temperature).log_softmax(-1).tolist()


@cache
def ranks(name, tokens, position):
    """A score per word, from the untempered distribution at a position, the mask word in it."""
    p = POLICY.table[tokens[0] * 16 + tokens[1] * 4 + tokens[2]].double()[position].softmax(-1)
    top = p.sort(descending=True).values
    states = {"MaxProb": p.max(), "Margin": top[0] - top[1], "Entropy": (p * p.log()).sum()}
    return [float(states[name])] * MASK if name in states else p.tolist()


def enumerate_outcomes(name, quotas, temperature, start=(MASK,) * LENGTH):
    """{(tokens, steps, log-probs at commit): probability} by following every draw of every step."""
    outcomes = {}

    def follow(tokens, steps, logps, step, probability):
        masked = [i for i in range(LENGTH) if tokens[i] == MASK]
        if not masked:
            key = (tuple(tokens), tuple(steps), tuple(logps))
            outcomes[key] = outcomes.get(key, 0.0) + probability
            return
        logp = draw_distribution(tuple(tokens), temperature)
        for words in itertools.product(range(MASK), repeat=len(masked)):
            drawn = math.prod(math.exp(logp[i][w]) for i, w in zip(masked, words, strict=True))
            if name == "RandomOrder":
                orders = [
                    (list(o), 1 / math.factorial(len(masked))) for o in itertools.permutations(range(len(masked)))
                ]
            else:
                scores = [ranks(name, tuple(tokens), i)[w] for i, w in zip(masked, words, strict=True)]
                orders = [(sorted(range(len(masked)), key=lambda j: (-scores[j], j)), 1.0)]
            for order, chance in orders:
                after = list(tokens), list(steps), list(logps)
                for j in order[: quotas[step]]:
                    position, word = masked[j], words[j]
                    after[0][position], after[1][position] = word, step
                    after[2][position] = logp[position][word]
                follow(*after, step + 1, probability * drawn * chance)

    follow(list(start), [-1] * LENGTH, [0.0] * LENGTH, 0, 1.0)
    return outcomes


def upper_bound(degrees):
    """Chi-squared quantile at 1 - 1e-5, by Wilson and Hilferty."""
    return degrees * (1 - 2 / (9 * degrees) + 4.265 * math.sqrt(2 / (9 * degrees))) ** 3


RANKED = ["Confidence", "MaxProb", "Margin", "Entropy", "RandomOrder"]


@pytest.mark.parametrize("name,temperature,diffusion_steps", [
    ("Confidence", 1.0, 3), *[slow(name, 0.6, 2) for name in RANKED], *[nightly(name, 1.0, 3) for name in RANKED[1:]]
])  # fmt: skip
def test_tokens_and_order_follow_the_enumerated_distribution(name, temperature, diffusion_steps):
    rollout = Unmask(
        max_new_tokens=LENGTH, diffusion_steps=diffusion_steps, temperature=temperature, rank=getattr(rules, name)()
    )(POLICY, Prompts.from_ids([[0]], pad_id=0, num_generations=DRAWS), torch.Generator().manual_seed(5))
    agrees(rollout, enumerate_outcomes(name, {3: [1, 1, 1], 2: [2, 1]}[diffusion_steps], temperature), least_cells=20)


@pytest.mark.parametrize(
    ("prompt", "new", "steps"),
    [slow([0, MASK, 2, MASK], 0, [1, 1]), ([0, MASK, 1], 1, [1, 1]), slow([0, MASK, 0], 1, [2])],
)
@pytest.mark.parametrize("name", few(["Confidence", "MaxProb", "RandomOrder"], ["Confidence"]))
def test_open_positions_follow_the_enumerated_distribution(name, prompt, new, steps):
    """Gaps before and after what the prompt says: tokens, order and log-probs are those of the enumeration."""
    rollout = Unmask(max_new_tokens=new, diffusion_steps=len(steps), temperature=0.8, rank=getattr(rules, name)())(
        POLICY,
        Prompts.from_ids([prompt], pad_id=0, num_generations=DRAWS, mask_id=MASK),
        torch.Generator().manual_seed(7),
    )
    start = [*prompt[1:], *[MASK] * new]
    assert (rollout.completion_mask[:, 1:] == (torch.tensor(start) == MASK)).all() and rollout.attention_mask.all()
    agrees(rollout, enumerate_outcomes(name, steps, 0.8, start), least_cells=7)


def agrees(rollout, expected, *, least_cells):
    """The rollout's tokens and steps are drawn from `expected`, and its log-probs are those of what was drawn."""
    assert abs(sum(expected.values()) - 1) < 1e-9
    keys = {(tokens, steps): (p, logps) for (tokens, steps, logps), p in expected.items()}
    assert len(keys) == len(expected)

    code = lambda x: (x * torch.tensor([16, 4, 1])).sum(-1)  # noqa: E731
    tokens, steps = rollout.tokens[:, 1:], rollout.unmask_step[:, 1:]
    outcome, counts = torch.unique(code(tokens) * STATES + code(steps), return_counts=True)
    observed = dict(zip(outcome.tolist(), counts.tolist(), strict=True))
    index = {int(code(torch.tensor(t)) * STATES + code(torch.tensor(s))): p for (t, s), (p, _) in keys.items()}
    assert set(observed) <= set(index)  # nothing of probability 0

    # Outcomes too rare for the chi-squared approximation are pooled into one cell.
    cells = [(observed.get(k, 0), p * DRAWS) for k, p in index.items() if p * DRAWS >= 10]
    rare = [(observed.get(k, 0), p * DRAWS) for k, p in index.items() if p * DRAWS < 10]
    if sum(e for _, e in rare) >= 10:
        cells.append((sum(o for o, _ in rare), sum(e for _, e in rare)))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    assert len(cells) >= least_cells and statistic < upper_bound(len(cells) - 1)

    for row in range(0, DRAWS, 997):
        logps = keys[tuple(tokens[row].tolist()), tuple(steps[row].tolist())][1]
        torch.testing.assert_close(rollout.logprobs[row, 1:], torch.tensor(logps), rtol=0, atol=2e-6)


@pytest.mark.slow
def test_origin_commits_each_position_independently():
    """Three steps with probabilities 1/3, 1/2, 1: every position's step is uniform on {0, 1, 2}, independently."""
    rollout = Unmask(
        max_new_tokens=LENGTH, diffusion_steps=3, temperature=1.0, rank=rules.RandomOrder(), commit=rules.Origin()
    )(POLICY, Prompts.from_ids([[0]], pad_id=0, num_generations=DRAWS), torch.Generator().manual_seed(6))
    steps = rollout.unmask_step[:, 1:]
    counts = torch.bincount((steps * torch.tensor([9, 3, 1])).sum(-1), minlength=27).double()
    assert float(((counts - DRAWS / 27) ** 2 / (DRAWS / 27)).sum()) < upper_bound(26)


def test_state_only_and_token_ranks_differ():
    """The toy can tell the rules apart: their distributions over orders are far from each other."""
    by_order = {}
    for name in ("Confidence", "MaxProb", "Margin", "Entropy", "RandomOrder"):
        totals = {}
        for (_, steps, _), p in enumerate_outcomes(name, [1, 1, 1], 1.0).items():
            totals[steps] = totals.get(steps, 0.0) + p
        by_order[name] = totals
    for a, b in itertools.combinations(by_order, 2):
        steps = set(by_order[a]) | set(by_order[b])
        distance = sum(abs(by_order[a].get(s, 0) - by_order[b].get(s, 0)) for s in steps) / 2
        assert distance > 0.05, (a, b)


def test_uniforms_are_uniform_and_independent_of_the_batch():
    seeds, steps = torch.arange(200).repeat_interleave(500), torch.arange(500).repeat(200)
    places = (seeds * 7 + steps) % 64
    u = uniforms(seeds, steps, places, stream=0)
    counts = torch.histc(u, bins=100, min=0, max=1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < upper_bound(99)
    for other in (
        uniforms(seeds, steps, places, stream=1),
        uniforms(seeds + 1, steps, places, stream=0),
        uniforms(seeds, steps + 1, places, stream=0),
        uniforms(seeds, steps, places + 1, stream=0),
    ):
        assert abs(float(torch.corrcoef(torch.stack([u, other]))[0, 1])) < 0.02
    pick = torch.tensor([9, 40_000, 77])
    assert torch.equal(uniforms(seeds[pick], steps[pick], places[pick], stream=0), u[pick])


def test_uniforms_are_splitmix64():
    """Against the generator in Python's own integers."""
    wrap = 2**64 - 1

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & wrap
        x = (x ^ x >> 27) * 0x94D049BB133111EB & wrap
        return x ^ x >> 31

    for seed, step, position, stream in ((0, 0, 0, 0), (2**63 - 5, 12, 511, 1), (123456789, 3, 7, 0)):
        gamma = 0x9E3779B97F4A7C15
        state = mix(seed + (2 * step + stream + 1) * gamma & wrap)
        expected = (mix(state + (position + 1) * gamma & wrap) >> 11) / 2**53
        assert (
            uniforms(torch.tensor([seed]), torch.tensor([step]), torch.tensor([position]), stream=stream).item()
            == expected
        )
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 for seed 0


def test_order_of_partial_rules_is_by_name():
    """A user's own rank takes what it names, partials included."""

    def own(logits, normalizer, *, sharpness):
        return (logits.amax(-1) - normalizer) * sharpness

    plain = {"max_new_tokens": LENGTH, "diffusion_steps": 3, "temperature": 1.0}
    prompts = Prompts.from_ids([[0]], pad_id=0, num_generations=50)
    a = Unmask(rank=partial(own, sharpness=2.0), **plain)(POLICY, prompts, torch.Generator().manual_seed(1))
    b = Unmask(rank=rules.MaxProb(), **plain)(POLICY, prompts, torch.Generator().manual_seed(1))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.unmask_step, b.unmask_step)
