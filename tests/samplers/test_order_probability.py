"""For every rank and commit rule: the shares of outcomes that the real rule draws, against exp(trajectory), or an order
that is said to be unknown. Logits are tied: the same ones at all positions of a state, or at every second one."""

import functools
import types
from functools import partial

import pytest
import torch
from likelihood_toys import TablePolicy

from dllm_rl import trajectory
from dllm_rl.samplers import revise, rules, whole_step
from dllm_rl.samplers.records import Commit, Rank, as_commit, as_rank, order_probability
from dllm_rl.samplers.unmask import unmask
from dllm_rl.testing import check_order
from dllm_rl.types import Prompts

LENGTH = 4
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
# margin and entropy are ranks of the state, as max_prob is.
ONE = ("margin", "entropy")
PAIRS = [(rank, commit) for rank in RANKS for commit in COMMITS if rank not in ONE or commit == "schedule"]
CASES = [(*pair, False) for pair in PAIRS]
CASES += [(*pair, True) for pair in PAIRS if pair[0] in ("confidence", "max_prob", "plackett_luce")]
LAWS = {("confidence", "schedule"), ("confidence", "late_schedule"), ("max_prob", "soft_threshold")}
LAWS |= {("plackett_luce", "schedule"), ("plackett_luce", "late_schedule")}


def tied_policy(period: int) -> TablePolicy:
    policy = TablePolicy(length=LENGTH, words=2, seed=4, scale=1.0)
    policy.table = policy.table[:, torch.arange(LENGTH) % period]
    policy.module = torch.nn.Module()  # compiled steps ask it for layers that stay uncompiled
    return policy


def check(policy, rank, commit, **options):
    return check_order(rank, commit, policy=policy, suppress=(2, 3, 4), **options)


@pytest.mark.parametrize(("rank", "commit", "compiled"), CASES)
def test_shares_are_the_trajectorys_or_the_order_is_unknown(monkeypatch, rank, commit, compiled):
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)
    # Draws tie at all positions, and the ranks of states at every second one; edits of max_prob need one order.
    policy = tied_policy(period=1 if rank == "confidence" or commit == "soft_edit" else 2)
    known = order_probability(as_rank(RANKS[rank]), as_commit(COMMITS[commit]))
    assert ((rank, commit) in LAWS) == (known in ("confidence", "plackett_luce", "soft_threshold"))
    rows = 2 if known == "unknown" else 1500  # nothing is compared
    try:
        assert check(policy, RANKS[rank], COMMITS[commit], compile_step=compiled, rows=rows) == known
    except ValueError as error:  # in one line, and before anything is drawn
        assert "\n" not in str(error)
        assert compiled or known == "unknown" or commit in ("origin", "remask")  # whose scores are uniforms


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
    pair = {"rank": rules.confidence, "commit": rules.schedule}
    for name, rule in pair.items():
        wrapped = pair | {name: (SAME | OTHER)[wrap](rule)}
        known = check(tied_policy(period=1), **wrapped, compile_step=compiled, rows=100)
        assert known == ("confidence" if wrap in SAME else "unknown")


def mine(logits, normalizer):
    return logits.amax(-1) - normalizer


def of_logits(logits):
    return logits[:, :2].amax(-1)


def of_states(hidden):
    """`of_logits`: the states of a `TablePolicy` are its logits."""
    return hidden[:, :2].amax(-1)


def by_chance(logits, normalizer):
    """Reads more than it names."""
    return logits.amax(-1) - normalizer + torch.rand(len(logits), generator=CHANCE)


def halves(scores, masked, steps_left):
    left = masked.sum(-1)
    return rules.highest(scores, masked, count=torch.where(steps_left == 1, left, (left + 1) // 2))


CHANCE = torch.Generator().manual_seed(0)
FIXED = partial(Rank, order="deterministic")


def test_declared_rules_keep_the_contract_or_are_caught():
    commit = Commit(halves, "deterministic")
    assert check(tied_policy(period=2), FIXED(mine), commit) == "deterministic"
    assert check_order(FIXED(of_states_of_tiny), commit, rows=500) == "deterministic"
    assert check_order(rules.random, commit, rows=500) == "independent"
    assert check_order(mine, commit, rows=2) == check_order(FIXED(mine), halves, rows=2) == "unknown"
    with pytest.raises(AssertionError, match="as often as trajectory"):
        check(tied_policy(period=2), FIXED(by_chance), commit)


NOISY = partial(rules.plackett_luce, temperature=0.5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fixed"])
@pytest.mark.parametrize(
    ("base", "known"),
    [
        (rules.margin, "plackett_luce"),
        (partial(rules.entropy), "plackett_luce"),
        (FIXED(mine), "plackett_luce"),
        (Rank(partial(rules.max_prob)), "plackett_luce"),
        (mine, "unknown"),
        (Rank(mine), "unknown"),
        (by_chance, "unknown"),
        (copy_of(rules.max_prob), "unknown"),
        (wrapper_of(rules.margin), "unknown"),
        (lambda logits, normalizer: rules.entropy(logits, normalizer), "unknown"),
    ],
)
def test_a_noisy_order_of_a_rank_is_known_where_the_rank_is(monkeypatch, base, known, compiled):
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)
    rows = 2 if known == "unknown" else 1500
    rank = partial(NOISY, base_rank=base)
    for given in (rank, Rank(rank)):
        assert check(tied_policy(period=2), given, rules.schedule, compile_step=compiled, rows=rows) == known


def test_an_undeclared_noisy_order_is_drawn_as_the_declared_one_and_a_false_declaration_is_caught():
    policy, steps = tied_policy(period=2), []
    prompts = Prompts.from_ids([[3]], pad_id=4, group_size=32, seeds=range(32))
    options = {"max_new_tokens": LENGTH, "diffusion_steps": 2, "temperature": 1.0, "suppress": (2, 3, 4)}
    for base in (mine, FIXED(mine)):
        rollout = unmask(policy, prompts, torch.Generator(), rank=partial(NOISY, base_rank=base), **options)
        steps.append(rollout.unmask_step)
        assert trajectory().is_exact_for(rollout) == (base is not mine)
    assert torch.equal(*steps) and len(steps[0].unique(dim=0)) > 2
    with pytest.raises(AssertionError, match=r"as often as trajectory|learner's log-prob"):
        check(policy, partial(NOISY, base_rank=FIXED(by_chance)), rules.schedule)
    for wrong, message in (
        (lambda: as_rank(partial(NOISY, base_rank=rules.confidence)), "base_rank=confidence must take logits and"),
        (lambda: as_rank(partial(NOISY, base_rank=FIXED(of_states))), "base_rank=of_states must take logits and"),
        (lambda: as_rank(partial(NOISY, base_rank=rules.random)), "base_rank=random must take logits and"),
        (lambda: Rank(partial(NOISY, base_rank=mine), "plackett_luce"), "order='plackett_luce' of rank=plackett_luce"),
        (lambda: check(policy, partial(NOISY, base_rank=mine), COMMITS["threshold"]), "cannot use rank=plackett_luce"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def of_states_of_tiny(hidden):
    return hidden.float().norm(dim=-1)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "compile_step": True}])
@pytest.mark.parametrize("with_draws", [False, True])
def test_a_rank_may_read_the_hidden_states(monkeypatch, options, with_draws):
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)
    prompts = Prompts.from_ids([[3]], pad_id=4, group_size=16, seeds=range(16))
    options = {"max_new_tokens": LENGTH, "diffusion_steps": 2, "suppress": (2, 3, 4), **options}
    steps = []
    for rank in (of_logits, of_states):
        if with_draws:
            rank = READING_TOKENS[rank]
        rollout = unmask(tied_policy(period=3), prompts, torch.Generator(), rank=rank, **options)
        steps.append((rollout.unmask_step, rollout.tokens))
    assert all(map(torch.equal, *steps))


READING_TOKENS = {
    of_logits: lambda logits, tokens: of_logits(logits) + tokens,
    of_states: lambda hidden, tokens: of_states(hidden) + tokens,
}


def test_what_a_pair_may_declare():
    policy, prompts = tied_policy(period=2), Prompts.from_ids([[3]], pad_id=4, group_size=2)
    for likelihood, rank in (
        (trajectory(), mine),
        (trajectory(include_order=False), rules.confidence),
        (trajectory(num_segments=2), FIXED(mine)),
    ):
        rollout = unmask(policy, prompts, torch.Generator(), max_new_tokens=LENGTH, temperature=1.0, rank=rank)
        assert not likelihood.is_exact_for(rollout)
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
