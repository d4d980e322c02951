"""For every rank and commit rule: the shares of outcomes that the real rule draws, against exp(trajectory), or an order
that is said to be unknown. Logits are tied: the same ones at all positions of a state, or at every second one."""

import functools
import math
import types
from functools import partial

import pytest
import torch
from likelihood_toys import TablePolicy

from dllm_rl import trajectory
from dllm_rl.likelihoods.estimator import recorded
from dllm_rl.samplers import revise, rules, whole_step
from dllm_rl.samplers.records import Commit, Rank, as_commit, as_rank, order_probability
from dllm_rl.samplers.unmask import unmask
from dllm_rl.types import Prompts

DRAWS, LENGTH = 1500, 4
RANKS = {rank.__name__: rank for rank in (rules.confidence, rules.max_prob, rules.margin, rules.entropy, rules.random)}
RANKS["plackett_luce"] = partial(rules.plackett_luce, temperature=0.5)
COMMITS = {
    "schedule": rules.schedule,
    "late_schedule": rules.late_schedule,
    "origin": rules.origin,
    "threshold": partial(rules.threshold, tau=0.6),
    "soft_threshold": partial(rules.soft_threshold, tau=0.6),
    "factor": partial(rules.factor, f=0.5),
    "entropy_bound": partial(rules.entropy_bound, gamma=0.6),
    "remask": partial(revise.remask, eta=0.3),
    "soft_edit": partial(revise.soft_edit, rate=0.3),
    "edit": partial(revise.edit, tau=0.6),
}
PAIRS = [(rank, commit) for rank in RANKS for commit in COMMITS]
LAWS = {("confidence", "schedule"), ("confidence", "late_schedule"), ("max_prob", "soft_threshold")}
LAWS |= {("plackett_luce", "schedule"), ("plackett_luce", "late_schedule")}


def tied_policy(period: int) -> TablePolicy:
    policy = TablePolicy(length=LENGTH, words=2, seed=4, scale=1.0)
    policy.table = policy.table[:, torch.arange(LENGTH) % period]
    policy.module = torch.nn.Module()  # compiled steps ask it for layers that stay uncompiled
    return policy


def drawn(policy, rank, commit, **options):
    prompts = Prompts.from_ids([[3]], pad_id=policy.pad_id, group_size=DRAWS, seeds=range(DRAWS))
    options = {"diffusion_steps": 2, "temperature": 1.0, "suppress": (2, 3, 4), **options}
    return unmask(policy, prompts, torch.Generator(), max_new_tokens=LENGTH, rank=rank, commit=commit, **options)


def check_shares(policy, rollout):
    """The outcomes' counts, by chi-squared at 1 - 1e-5, and the sampler's record of each row."""
    views = trajectory().draw(rollout, torch.Generator())
    logps = trajectory().logprobs(policy, rollout, views).sum(-1).double()
    torch.testing.assert_close(recorded(rollout, views).sum(-1).double(), logps, rtol=0, atol=1e-5)
    steps = [rollout.unmask_step] if rollout.events is None else list(rollout.events.step.unbind(-1))
    tokens = [rollout.tokens] if rollout.events is None else list(rollout.events.token.unbind(-1))
    ahead = [] if rollout.order.draw is None else [rollout.order.draw]
    orders, order = torch.cat(steps, 1).unique(dim=0, return_inverse=True)
    total = torch.full((len(orders),), float(DRAWS), dtype=torch.float64)
    if rollout.order.probability == "independent" or rollout.events is not None:  # no weights move it: it is given
        total = torch.bincount(order).double()
    _, outcome = torch.cat([*steps, *tokens, *ahead], 1).unique(dim=0, return_inverse=True)
    first = torch.zeros(int(outcome.max()) + 1, dtype=torch.long).scatter_(0, outcome, torch.arange(DRAWS))
    counts = torch.bincount(outcome).double()
    expected = total[order[first]] * logps[first].exp()
    often = expected >= 8
    rest = counts[~often].sum(), DRAWS - expected[often].sum()  # rare ones, and those that were not drawn
    observed, wanted = torch.cat([counts[often], rest[0][None]]), torch.cat([expected[often], rest[1][None]])
    statistic = float(((observed - wanted) ** 2 / wanted.abs().clamp(min=8)).sum())
    degrees = max(len(observed) - 1, 1)
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 4.265 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fixed"])
@pytest.mark.parametrize(("rank", "commit"), PAIRS)
def test_shares_are_the_trajectorys_or_the_order_is_unknown(monkeypatch, rank, commit, compiled):
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)
    # Draws tie at all positions, and the ranks of states at every second one; edits of max_prob need one order.
    policy = tied_policy(period=1 if rank == "confidence" or commit == "soft_edit" else 2)
    known = order_probability(as_rank(RANKS[rank]), as_commit(COMMITS[commit]))
    assert ((rank, commit) in LAWS) == (known in ("confidence", "plackett_luce", "soft_threshold"))
    try:
        rollout = drawn(policy, RANKS[rank], COMMITS[commit], compile_step=compiled)
    except ValueError as error:  # in one line, and before anything is drawn
        assert "\n" not in str(error)
        assert compiled or known == "unknown" or commit in ("origin", "remask")  # whose scores are uniforms
        return
    assert rollout.order.probability == known and trajectory().is_exact_for(rollout) == (known != "unknown")
    if known != "unknown":
        check_shares(policy, rollout)


def copy_of(rule):
    """The same code under another function object."""
    made = types.FunctionType(rule.__code__, rule.__globals__, rule.__name__, rule.__defaults__, rule.__closure__)
    made.__kwdefaults__, made.__dict__ = rule.__kwdefaults__, dict(rule.__dict__)
    return made


class OfRule:
    def __init__(self, rule):
        functools.update_wrapper(self, rule)

    def __call__(self, *inputs, **named):
        return self.__wrapped__(*inputs, **named)


def wrapper_of(rule):
    @functools.wraps(rule)
    def wrapped(*inputs, **named):
        return rule(*inputs, **named)

    return wrapped


SAME = {"partial": partial, "partial of partial": lambda rule: partial(partial(rule))}
SAME["record"] = lambda rule: (Rank if rule is rules.confidence else Commit)(partial(rule))
OTHER = {
    "copy": copy_of,
    "wraps": wrapper_of,
    "object": OfRule,
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fixed"])
@pytest.mark.parametrize("wrap", [*SAME, *OTHER])
def test_a_wrapped_rule_is_the_rule_or_unknown(monkeypatch, wrap, compiled):
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)
    policy, pair = tied_policy(period=1), {"rank": rules.confidence, "commit": rules.schedule}
    for name, rule in pair.items():
        rollout = drawn(policy, **pair | {name: (SAME | OTHER)[wrap](rule)}, compile_step=compiled)
        check_wrapped(policy, rollout, same=wrap in SAME)


def check_wrapped(policy, rollout, *, same):
    if same:
        assert rollout.order.probability == "confidence" and trajectory().is_exact_for(rollout)
        check_shares(policy, rollout)
    else:
        assert rollout.order.probability == "unknown" and not trajectory().is_exact_for(rollout)
        assert rollout.order.logprobs is None and rollout.order.rank in (None, "confidence")


def test_what_a_pair_may_declare():
    def mine(logits, normalizer):
        return logits.amax(-1) - normalizer

    rollout = drawn(policy := tied_policy(period=2), Rank(mine, "deterministic"), rules.schedule)
    assert rollout.order.probability == "deterministic" and trajectory().is_exact_for(rollout)
    check_shares(policy, rollout)
    assert not trajectory().is_exact_for(drawn(policy, mine, rules.schedule))
    assert not trajectory(order="given").is_exact_for(drawn(policy, rules.confidence, rules.schedule))
    assert not trajectory(num_segments=2).is_exact_for(rollout)
    for wrong in (
        lambda: Rank(rules.confidence, "deterministic"),
        lambda: Rank(rules.random, "deterministic"),
        lambda: Rank(mine, "independent"),
        lambda: Rank(mine, "certain"),
        lambda: Rank(mine, "max_prob"),
        lambda: Commit(rules.schedule, "count"),
        lambda: as_rank("confidence"),
        lambda: as_commit(3),
    ):
        with pytest.raises(ValueError, match=r"^(rank|commit|order)="):
            wrong()
