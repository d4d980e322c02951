"""Policies small enough to enumerate, and the enumeration itself in plain Python floats."""

import math
from dataclasses import replace
from functools import cache
from itertools import combinations, permutations

import torch

from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.masks import k_masked_view
from dllm_rl.models.checkpoint.families import DIFFUSION_LM
from dllm_rl.types.rollouts import Rollout, SamplingParams
from dllm_rl.types.scoring import Views


class TablePolicy:
    """A lookup table of logits per visible state, consistent with no joint distribution. Words 0..W-1, mask token W,
    prompt token W+1, padding W+2 (neither of the last two is part of the state); the mask is never sampled."""

    def __init__(self, *, length: int, words: int, seed: int, scale: float = 1.5):
        generator = torch.Generator().manual_seed(seed)
        self.length, self.words, self.mask_id, self.vocab_size = length, words, words, words + 3
        self.table = scale * torch.randn((words + 1) ** length, length, self.vocab_size, generator=generator)
        self.spec = replace(DIFFUSION_LM, mask_id=self.mask_id)
        self.device, self.weights_version, self.forwards = torch.device("cpu"), 0, []
        self.module, self.tokenizer, self.pad_id = None, None, words + 2
        self.lora = self.quantization = self.quantization_report = None
        self.float32_head, self.gradient_checkpointing = True, False

    def encode(self, tokens, attention_mask, positions, **cache):
        return self.hidden(tokens, attention_mask)

    def hidden(self, tokens, attention_mask):
        """The logits themselves; the head passes them on."""
        self.forwards.append(len(tokens))
        place = (self.words + 1) ** torch.arange(self.length)
        state = (tokens[:, -self.length :].clamp(max=self.words) * place).sum(-1)
        out = torch.zeros(*tokens.shape, self.vocab_size)
        out[:, -self.length :] = self.table[state]
        return out

    def head(self, hidden):
        return hidden

    def logits(self, tokens, attention_mask, positions=None):
        hidden = self.hidden(tokens, attention_mask)
        return hidden if positions is None else hidden[positions]

    def to(self, device):
        return self

    def save_pretrained(self, directory, *, stock=False):
        raise NotImplementedError

    def reference(self):
        raise NotImplementedError

    def rollout(self, tokens, *, prompt: int = 1, num_generations: int = 1, **changes) -> Rollout:
        """Completions (B, length) behind `prompt` prompt tokens."""
        tokens = torch.as_tensor(tokens)
        ahead = torch.full((len(tokens), prompt), self.words + 1)
        mask = torch.cat([torch.zeros_like(ahead, dtype=torch.bool), torch.ones_like(tokens, dtype=torch.bool)], 1)
        record = Rollout(
            tokens=torch.cat([ahead, tokens], 1),
            attention_mask=torch.ones_like(mask),
            completion_mask=mask,
            unmask_step=torch.where(mask, torch.arange(mask.shape[1]) - prompt, -1),
            logprobs=torch.zeros(mask.shape),
            group=torch.arange(len(tokens)) // num_generations,
            sampling_params=SamplingParams(suppress=(self.words, self.words + 1, self.words + 2)),
        )
        return replace(record, **changes)

    def logp(self, tokens, masked, i: int) -> float:
        """log p(tokens[i] | tokens with the positions in `masked` hidden), by hand."""
        visible = [self.words if j in masked else int(t) for j, t in enumerate(tokens)]
        state = sum(t * (self.words + 1) ** j for j, t in enumerate(visible))
        logits = [float(x) for x in self.table[state, i, : self.words]]
        return logits[int(tokens[i])] - math.log(sum(math.exp(x) for x in logits))


def elbo_by_hand(policy: TablePolicy, tokens, inside=None, later=()) -> float:
    """sum_k (1/k) mean_{|m|=k, m in inside} sum_{i in m} l_i(m and later)."""
    inside = range(len(tokens)) if inside is None else inside
    total = 0.0
    for k in range(1, len(inside) + 1):
        masks = list(combinations(inside, k))
        total += sum(policy.logp(tokens, {*m, *later}, i) for m in masks for i in m) / (k * len(masks))
    return total


def order_probs(policy: TablePolicy, tokens) -> list[float]:
    """The completion's probability under each order of unmasking, one token a step."""
    probs = []
    for order in permutations(range(len(tokens))):
        steps = [policy.logp(tokens, set(order[s:]), i) for s, i in enumerate(order)]
        probs.append(math.exp(sum(steps)))
    return probs


def log_any_order(policy: TablePolicy, tokens) -> float:
    """log of the mean over all orders of the completion's probability."""
    probs = order_probs(policy, tokens)
    return math.log(sum(probs) / len(probs))


def eubo_by_hand(policy: TablePolicy, tokens, beta: float) -> float:
    """sum_i (1/beta) log E_k E_{|m|=k} [(L/k) 1(i in m) p_i(m)^beta]."""
    size, total = len(tokens), 0.0
    for i in range(size):
        mean = 0.0
        for k in range(1, size + 1):
            masks = list(combinations(range(size), k))
            inside = sum(math.exp(beta * policy.logp(tokens, set(m), i)) for m in masks if i in m)
            mean += inside / (k * len(masks))
        total += math.log(mean) / beta
    return total


LENGTH, WORDS = 3, 3
COMPLETION = [2, 0, 1]
TOY = TablePolicy(length=LENGTH, words=WORDS, seed=0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orders(length: int, prompt: int = 1):
    """Every order of the completion's positions, as keys (1, T)."""
    for order in permutations(range(length)):
        keys = torch.full((1, prompt + length), torch.inf)
        keys[0, prompt:] = torch.tensor(order, dtype=torch.float)
        yield keys


def summed(policy, rollout, views, estimator=lik.ELBO()) -> float:
    """The estimate that these views give together, a mean over as many samples as there are views' weights for."""
    noise = Views(*(torch.stack(column) for column in zip(*views, strict=True)))
    return estimator.logprobs(policy, rollout, noise).double().sum().item()


@cache
def all_exact(length: int):
    """(masked, weight) for every k and every order, weights divided by their number: the whole of elbo's randomness."""
    inside = torch.tensor([[False] + [True] * length])
    views = [k_masked_view(inside, keys, torch.tensor([[k]])) for keys in orders(length) for k in range(1, length + 1)]
    return [(masked, weight / len(views)) for masked, weight in views]
