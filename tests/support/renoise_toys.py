"""A model in float64 of three tokens and canvases of three, whose rollouts under `Renoise` can be enumerated; and what
`Renoise` does with it, written out again, step by step."""

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from dllm_rl.models.base import FamilySpec
from dllm_rl.models.denoiser import SelfConditioning
from dllm_rl.models.kv_cache import KVCache
from dllm_rl.models.policy import ModulePolicy
from dllm_rl.types.rollouts import Renoised, Rollout

V, C = 3, 3


class Toy(nn.Module):
    """The encoder caches a sum over the prompt; the decoder mixes it, its canvas and the step before."""

    def __init__(self, seed: int, strength: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def made(*shape):
            numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(strength * numbers)

        self.embed, self.place = made(V, 4), made(C, 4)
        self.mix, self.before, self.read = made(C, C), made(V, 4), made(4, 4)
        self.head = made(4, V)
        self.config = None

    def encode(self, tokens, attention_mask, positions, cache=None, previous=None):
        embedded = self.embed[tokens]
        if previous is None:
            real = attention_mask[:, -tokens.shape[1] :, None]
            keys = torch.where(real, torch.tanh(embedded @ self.read), 0.0)[:, None]
            if cache is not None:
                cache.update(keys, keys, 0)
            return embedded.cumsum(1)
        context = cache.layers[0].keys.sum(2)  # (R, 1, 4)
        soft = 0.0 if previous.logits is None else previous.logits.softmax(-1) @ self.before
        return torch.tanh(self.place + torch.einsum("ij,rjd->rid", self.mix, embedded) + context + soft)


def toy(seed: int = 0, strength: float = 1.0) -> ModulePolicy:
    spec = FamilySpec(
        name="toy",
        attention="encoder_decoder",
        vocab_size=V,
        block_size=C,
        eos_ids=(V,),  # no token of the vocabulary: no row ends
        encode=lambda module, *args, **kept: module.encode(*args, **kept),
        head=lambda module, states: states @ module.head,
        new_cache=lambda module: KVCache(),
    )
    return ModulePolicy(Toy(seed, strength), spec, tokenizer=None)


@dataclass(frozen=True)
class Histories:
    """Every history of N after a prompt, T steps. `p` (N,) is the product of the accepted draws' probabilities, and
    `noise` (N,) that of the random tokens; seen, drawn (N, C, T): -1 where there is none; answer (N, C)."""

    p: torch.Tensor
    noise: torch.Tensor
    seen: torch.Tensor
    drawn: torch.Tensor
    answer: torch.Tensor

    def expected(self, reward) -> torch.Tensor:
        return (self.p * self.noise * reward(self.answer)).sum()


def enumerate_all(policy, prompt, temperatures, bound, answer, *, stops=None, detached=False) -> Histories:
    """What `Renoise` may do with one canvas, written without the package: every canvas may follow every one, by a draw
    where the step accepts and by chance elsewhere.

    stops     (stability 0 or 1, confidence), or None
    detached  no gradient through the logits of the step before
    """
    module = policy.module
    every = torch.tensor(list(product(range(V), repeat=C)))
    canvas, previous, best = every, None, None
    p = torch.ones(len(every))
    noise = torch.full((len(every),), 1.0 / V**C)
    seen = drawn = torch.zeros(len(every), C, 0, dtype=torch.long)
    ended = []
    for step, temperature in enumerate(temperatures):
        rows = prompt.expand(len(canvas), -1)
        cache = DynamicCache()
        module.encode(rows, torch.ones_like(rows, dtype=torch.bool), None, cache=cache)
        logits = (
            module.encode(canvas, None, None, cache=cache, previous=SelfConditioning(previous))
            @ module.head
            / temperature
        )
        probs = logits.softmax(-1)
        entropy = -(probs * probs.log()).sum(-1)
        # A place is accepted if the places before it in the order of entropies sum up to the bound at most.
        before = ((entropy[:, None] < entropy[:, :, None]) * entropy[:, None]).sum(-1)
        accepted = before <= bound
        likeliest = probs.argmax(-1)
        stop = torch.full((len(canvas),), step + 1 == len(temperatures))
        if stops is not None:
            stability, confidence = stops
            same = best is not None and (best == likeliest).all(-1) if stability else torch.ones_like(stop)
            stop |= same & (entropy.mean(-1) < confidence)
        here = (seen, drawn, torch.cat([seen, canvas[..., None]], -1))
        if answer == "argmax":
            none = torch.full((len(canvas), C, 1), -1)
            record = [torch.cat([x, none], -1) for x in here[:2]]
            ended.append([x[stop] for x in (p, noise, *record, likeliest)])
            p, noise, probs, accepted = (x[~stop] for x in (p, noise, probs, accepted))
            here = tuple(x[~stop] for x in here)
            logits, likeliest, stop = logits[~stop], likeliest[~stop], stop[~stop]
        accepted = accepted | stop[:, None]
        count = len(p)
        after = every.repeat(count, 1)
        of = torch.arange(count).repeat_interleave(len(every))
        taken = accepted[of]
        each = probs[of].gather(-1, after[..., None])[..., 0]
        p = p[of] * torch.where(taken, each, 1.0).prod(-1)
        noise = noise[of] * (1.0 / V) ** (~taken).sum(-1)
        seen = here[2][of]
        drawn = torch.cat([here[1][of], torch.where(taken, after, -1)[..., None]], -1)
        canvas, previous, best = after, logits[of].detach() if detached else logits[of], likeliest[of]
        over = stop[of]
        ended.append([x[over] for x in (p, noise, seen, drawn, after)])
        p, noise, seen, drawn, canvas, previous, best = (
            x[~over] for x in (p, noise, seen, drawn, canvas, previous, best)
        )
    steps = len(temperatures)
    filled = [
        [F.pad(x, (0, steps - x.shape[2]), value=-1) if x.dim() == 3 else x for x in part]
        for part in ended
        if len(part)
    ]
    return Histories(*map(torch.cat, zip(*filled, strict=True)))


def as_rollout(found: Histories, prompt, temperatures) -> Rollout:
    """The histories as rows of a rollout."""
    count, width = len(found.p), len(prompt)
    tokens = torch.cat([prompt.expand(count, -1), found.answer], 1)
    own = torch.arange(tokens.shape[1]).expand(count, -1) >= width
    part = Renoised(
        block=torch.zeros(count, C, dtype=torch.long),
        seen=found.seen,
        drawn=found.drawn,
        logprobs=torch.zeros(found.drawn.shape),
        temperatures=temperatures,
    )
    return Rollout(
        tokens=tokens,
        attention_mask=torch.ones_like(own),
        completion_mask=own,
        unmask_step=torch.where(own, 0, -1),
        logprobs=torch.zeros(tokens.shape),
        group=torch.arange(len(tokens)),
        renoised=part.padded(width),
    )
