"""Every draw of confidence-ranked unmasking on a table of logits, followed one by one: the law, knowing no formula."""

import itertools
import math
from dataclasses import replace
from functools import cache

import torch
from likelihood_toys import TablePolicy

from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.order_logprobs import StayMasked
from dllm_rl.types.rollouts import Order, Rollout, SamplingParams
from dllm_rl.types.scoring import Views


def drawn_from(logits, *, temperature=1.0, top_k=None, top_p=None):
    """Probabilities (W,) that words are drawn with: divide, keep the top k, then those that begin below top_p."""
    scaled = logits / temperature
    order = sorted(range(len(logits)), key=lambda v: (-float(scaled[v].detach()), v))[:top_k]
    if top_p is not None:
        p, before, kept = scaled[order].softmax(-1).tolist(), 0.0, []
        for word, mass in zip(order, p, strict=True):
            if before < top_p:
                kept.append(word)
            before += mass
        order = kept
    return torch.zeros_like(logits).index_put((torch.tensor(order),), scaled[order].softmax(-1))


def outcomes(policy: TablePolicy, blocks: list[list[int]], diffusion_steps: int, *, differentiable=False, **options):
    """{(tokens, steps, opened): probability} of all that `blocks`, each in `diffusion_steps` steps, can end in.

    A step draws a word at every masked position of the block (which has at most a step for each), and keeps the
    ceil(masked / steps left) with the highest untempered log-prob; ties go to the lowest position.
    """
    hole, found = policy.mask_id, {((policy.mask_id,) * policy.length, (-1,) * policy.length): 1.0}
    opened, clock = [0] * policy.length, 0

    @cache
    def chances(state, i):
        p = drawn_from(policy.table[state, i, : policy.words], **options)
        return list(p) if differentiable else p.tolist()

    @cache
    def confidences(state, i):
        return policy.table[state, i, : policy.words + 1].log_softmax(-1).tolist()  # the mask token counts

    for block in blocks:
        for position in block:
            opened[position] = clock
        for left in range(min(diffusion_steps, len(block)), 0, -1):
            after = {}
            for (tokens, steps), chance in found.items():
                masked = [i for i in block if tokens[i] == hole]
                count = math.ceil(len(masked) / left)
                state = sum(t * (policy.words + 1) ** i for i, t in enumerate(tokens))
                p, confidence = ([at(state, i) for i in masked] for at in (chances, confidences))
                for words in itertools.product(range(policy.words), repeat=len(masked)):
                    scores = [confidence[i][word] for i, word in enumerate(words)]
                    best = sorted(range(len(masked)), key=lambda i: (-scores[i], i))[:count]
                    tokens2, steps2 = list(tokens), list(steps)
                    for i in best:
                        tokens2[masked[i]], steps2[masked[i]] = words[i], clock
                    drawn = chance
                    for i, word in enumerate(words):
                        drawn = drawn * p[i][word]
                    key = (tuple(tokens2), tuple(steps2))
                    after[key] = after.get(key, 0.0) + drawn
            found, clock = after, clock + 1
    return {(*key, tuple(opened)): p for key, p in found.items() if p > 0}


def as_rollout(policy: TablePolicy, keys, **options) -> Rollout:
    """A rollout whose rows are these outcomes; its order has a law, and its own record of it is left at 0."""
    tokens, steps, opened = (torch.tensor(column) for column in zip(*keys, strict=True))
    ahead = torch.full((len(tokens), 1), -1)
    made = policy.rollout(tokens, unmask_step=torch.cat([ahead, steps], 1))
    params = SamplingParams(**options, suppress=made.sampling_params.suppress)
    order = Order(torch.cat([ahead, opened], 1), logprobs=torch.zeros(made.tokens.shape))
    return replace(made, sampling_params=params, order=order)


def stayed_of(noise: Views) -> torch.Tensor | None:
    """The positions that the views score by the probability of having been left; None without an order's law."""
    return next((part.stay_masked for part in noise.features if isinstance(part, StayMasked)), None)


def total(policy, rollout, **options):
    """The estimate of each row by `Trajectory`."""
    estimator = lik.Trajectory(**options)
    return estimator.logprobs(policy, rollout, estimator.draw_views(rollout, torch.Generator())).sum(-1)


def missing_order(policy, rollout, found, *, atol):
    """How far a row's log-prob is off, at most, where the order is taken as given. Every outcome's log-prob is right to
    `atol`, and all of them together are 1."""
    expected = torch.tensor(list(found.values()))
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(total(policy, rollout), expected.log(), rtol=0, atol=atol)
    return (total(policy, rollout, include_order=False) - expected.log()).abs().max().item()
