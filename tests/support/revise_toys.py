"""Every event sequence of samplers that revise, on a table of logits, followed one by one; no formula of the law."""

import itertools
import math
from dataclasses import replace
from functools import cache, partial

import torch
from likelihood_toys import TablePolicy
from order_toys import drawn_from

from dllm_rl.types.rollouts import Events, Rollout, SamplingParams


def decisions(rule, policy, state, block, done, left, certainty):
    """[(probability, what each position of the block does)]: "draw", "mask" or None; known rates, by no weight."""
    hole = policy.mask_id
    masked = [i for i in block if state[i] == hole]
    if rule["name"] == "remask":
        sigma = min(rule["eta"], (left - 1) / done) if done else 0.0
        write = (1 + sigma * done) / left
        ways = [(("draw", write), (None, 1 - write)) if state[i] == hole else (("mask", sigma), (None, 1 - sigma))
                for i in block]  # fmt: skip
        for way in itertools.product(*ways):
            yield math.prod(p for _, p in way), dict(zip(block, (what for what, _ in way), strict=True))
        return
    count = math.ceil(len(masked) / left)
    sets = list(itertools.combinations(masked, count))
    if rule["rank"] == "MaxProb":
        sets = [tuple(sorted(masked, key=lambda i: (-certainty(i), i))[:count])]
    written = [i for i in block if state[i] != hole]
    for chosen in sets:
        for again in itertools.product((True, False), repeat=len(written)):
            drawn = {*chosen, *(i for i, yes in zip(written, again, strict=True) if yes)}
            rate = math.prod(rule["rate"] if yes else 1 - rule["rate"] for yes in again)
            yield rate / len(sets), {i: "draw" if i in drawn else None for i in block}


def sequences(policy: TablePolicy, blocks, diffusion_steps: int, rule: dict, *, differentiable=False, **options):
    """{events: (known, drawn)}: the events (step, token) of each position, -1 for masked again; the probability of the
    decisions, which no weight changes, and that of the tokens. `diffusion_steps` is of each block."""
    hole = policy.mask_id

    @cache
    def chances(place, i):
        p = drawn_from(policy.table[place, i, : policy.words], **options)
        return list(p) if differentiable else p.tolist()

    @cache
    def certainty(place, i):
        return float(policy.table[place, i, : policy.words + 1].detach().log_softmax(-1).max())

    found = {(((),) * policy.length, (hole,) * policy.length): (1.0, 1.0)}
    clock = 0
    for block in blocks:
        for done in range(diffusion_steps):
            after = {}
            for (events, state), (known, drawn) in found.items():
                place = sum(t * (policy.words + 1) ** i for i, t in enumerate(state))
                left = diffusion_steps - done
                for rate, way in decisions(rule, policy, state, block, done, left, partial(certainty, place)):
                    if not rate:
                        continue
                    acting = [i for i, what in way.items() if what == "draw"]
                    p = [chances(place, i) for i in acting]
                    for words in itertools.product(range(policy.words), repeat=len(acting)):
                        new, tokens, chance = list(events), list(state), drawn
                        for i, what in way.items():
                            if what == "mask":
                                new[i], tokens[i] = (*new[i], (clock, -1)), hole
                        for i, word, q in zip(acting, words, p, strict=True):
                            new[i], tokens[i] = (*new[i], (clock, word)), word
                            chance = chance * q[word]
                        key = (tuple(new), tuple(tokens))
                        assert key not in after, "a sequence tells how it came about"
                        after[key] = (known * rate, chance)
            found, clock = after, clock + 1
    return {events: (known, drawn) for (events, _), (known, drawn) in found.items() if drawn > 0}


def events_of(rollout: Rollout) -> list[tuple]:
    """What `sequences` has as keys, of each row of a rollout with one prompt token."""
    steps, tokens = (x[:, 1:].tolist() for x in (rollout.events.step, rollout.events.token))
    rows = zip(steps, tokens, strict=True)
    return [
        tuple(
            tuple((s, t) for s, t in zip(*place, strict=True) if s >= 0) for place in zip(step, token, strict=True)
        )
        for step, token in rows
    ]  # fmt: skip


def as_rollout(policy: TablePolicy, keys, **options) -> Rollout:
    """A rollout whose rows are these sequences; its own record of log-probs is left at 0."""
    keys = list(keys)
    width = max(len(place) for row in keys for place in row)
    filled = [[[*place, *[(-1, -1)] * (width - len(place))] for place in row] for row in keys]
    events = torch.tensor([[[(-1, -1)] * width, *row] for row in filled])
    steps = torch.tensor([[-1, *(place[-1][0] for place in row)] for row in keys])
    made = policy.rollout([[place[-1][1] for place in row] for row in keys], unmask_step=steps)
    params = SamplingParams(**options, suppress=made.sampling_params.suppress)
    record = Events(events[..., 0], events[..., 1], torch.zeros(events.shape[:-1]))
    return replace(made, sampling_params=params, events=record)
