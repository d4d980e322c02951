"""For every rank and commit rule: the shares of outcomes that the real rule draws, against exp(trajectory), or an order
that is said to be unknown. Logits are tied: the same ones at all positions of a state, or at every second one."""

from functools import partial

import pytest
import torch
from likelihood_toys import TablePolicy

from dllm_rl.samplers import revise, rules, whole_step
from dllm_rl.samplers.rules import FunctionCommit, FunctionRank, order_probability
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.testing import check_order
from dllm_rl.types.rollouts import Prompts

LENGTH = 4
RANKS = {
    "confidence": rules.Confidence(),
    "max_prob": rules.MaxProb(),
    "margin": rules.Margin(),
    "entropy": rules.Entropy(),
    "random": rules.RandomOrder(),
    "left_to_right": rules.LeftToRight(),
    "plackett_luce": rules.PlackettLuce(temperature=0.5),
}
COMMITS = {
    "schedule": rules.Schedule(),
    "late_schedule": rules.LateSchedule(),
    "origin": rules.Origin(),
    "threshold": rules.Threshold(tau=0.6),
    "soft_threshold": rules.SoftThreshold(tau=0.6),
    "entropy_bound": rules.EntropyBound(gamma=0.6),
    "remask": revise.Remask(eta=0.3),
    "soft_edit": revise.SoftEdit(rate=0.3),
    "edit": revise.Edit(tau=0.6),
}
# margin and entropy are ranks of the state, as max_prob is; left_to_right needs no weights, as random.
ONE = ("margin", "entropy", "left_to_right")
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
    known = order_probability(RANKS[rank], COMMITS[commit])
    assert ((rank, commit) in LAWS) == (known in ("confidence", "plackett_luce", "soft_threshold"))
    rows = 2 if known == "unknown" else 1500  # nothing is compared
    try:
        assert check(policy, RANKS[rank], COMMITS[commit], compile_step=compiled, rows=rows) == known
    except ValueError as error:  # in one line, and before anything is drawn
        assert "\n" not in str(error)
        ranks = COMMITS[commit].required_ranks
        assert compiled or known == "unknown" or (ranks and RANKS[rank] not in ranks)


class LikeConfidence(rules.Confidence):
    """Its own scores do not have the order of the class above it, unless it says so."""

    def __call__(self, logits, normalizer, tokens):
        return super().__call__(logits, normalizer, tokens)


class LikeSchedule(rules.Schedule):
    def __call__(self, scores, masked, steps_left):
        return super().__call__(scores, masked, steps_left)


class SameConfidence(rules.Confidence):
    pass


class LikeMargin(rules.Margin):
    def __call__(self, logits, normalizer):
        return super().__call__(logits, normalizer)


class SameMargin(rules.Margin):
    pass


SAME = {"same": lambda rule: SameConfidence() if rule == rules.Confidence() else rules.Schedule()}
OTHER = {
    "partial": partial,
    "subclass": lambda rule: LikeConfidence() if rule == rules.Confidence() else LikeSchedule(),
    "function": lambda rule: rule.__call__,
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fixed"])
@pytest.mark.parametrize("wrap", [*SAME, *OTHER])
def test_a_wrapped_rule_is_the_rule_or_unknown(monkeypatch, wrap, compiled):
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)
    pair = {"rank": rules.Confidence(), "commit": rules.Schedule()}
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


def some(scores, masked, steps_left, uniforms):
    """The best one or, by chance, the best two; all that are left in the last step."""
    return rules.highest(scores, masked, count=torch.where(steps_left == 1, 9, 1 + (uniforms[:, 0] < 0.3)))


def a_part(scores, masked, steps_left, uniforms):
    """Whatever the scores are."""
    return masked & ((uniforms < 0.5) | (steps_left[:, None] == 1))


def by_probability(scores, masked, steps_left, uniforms):
    """Compares random numbers with numbers that depend on the weights."""
    return masked & ((uniforms < scores.exp()) | (steps_left[:, None] == 1))


def by_share(scores, masked, steps_left, uniforms):
    """As `by_probability`, where a change that all scores share does not count."""
    return masked & ((uniforms < scores.softmax(-1)) | (steps_left[:, None] == 1))


CHANCE = torch.Generator().manual_seed(0)
FIXED = lambda function: FunctionRank(function=function, order="deterministic")  # noqa: E731


def test_declared_rules_keep_the_contract_or_are_caught():
    commit = FunctionCommit(function=halves, order="deterministic")
    assert check(tied_policy(period=2), FIXED(mine), commit) == "deterministic"
    assert check_order(FIXED(of_states_of_tiny), commit, rows=300) == "deterministic"
    assert check_order(rules.RandomOrder(), commit, rows=300) == "independent"
    assert check_order(mine, commit, rows=2) == check_order(FIXED(mine), halves, rows=2) == "unknown"
    for name, known in (("max_prob", "deterministic"), ("random", "independent")):
        for drawn in (some, a_part):
            declared = FunctionCommit(function=drawn, order="deterministic")
            assert check(tied_policy(period=2), RANKS[name], declared, rows=500) == known
    for wrong in (by_probability, by_share):
        declared = FunctionCommit(function=wrong, order="deterministic")
        with pytest.raises(AssertionError, match=f"commit={wrong.__name__} must not compare `uniforms` with numbers"):
            check(tied_policy(period=2), FIXED(mine), declared, rows=500)
    with pytest.raises(ValueError, match="rank=by_chance is declared deterministic, but gave different scores"):
        check(tied_policy(period=2), FIXED(by_chance), commit)


NOISY = rules.PlackettLuce(temperature=0.5)


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fixed"])
@pytest.mark.parametrize(
    ("base", "known"),
    [
        (rules.Margin(), "plackett_luce"),
        (rules.Entropy(), "plackett_luce"),
        (FIXED(mine), "plackett_luce"),
        (SameMargin(), "plackett_luce"),
        (FIXED(of_states), "plackett_luce"),
        (of_states, "unknown"),
        (mine, "unknown"),
        (FunctionRank(function=mine), "unknown"),
        (by_chance, "unknown"),
        (FunctionRank(function=rules.MaxProb()), "unknown"),
        (LikeMargin(), "unknown"),
        (lambda logits, normalizer: rules.Entropy()(logits, normalizer), "unknown"),
    ],
)
def test_a_noisy_order_of_a_rank_is_known_where_the_rank_is(monkeypatch, base, known, compiled):
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)
    rows = 2 if known == "unknown" else 1500
    rank = NOISY.replace(base_rank=base)
    assert check(tied_policy(period=2), rank, rules.Schedule(), compile_step=compiled, rows=rows) == known


def test_an_undeclared_noisy_order_is_drawn_as_the_declared_one_and_a_false_declaration_is_refused():
    policy, steps = tied_policy(period=2), []
    prompts = Prompts.from_ids([[3]], pad_id=4, num_generations=32, seeds=range(32))
    options = {"max_new_tokens": LENGTH, "diffusion_steps": 2, "temperature": 1.0, "suppress": (2, 3, 4)}
    for base in (mine, FIXED(mine)):
        rollout = Unmask(rank=NOISY.replace(base_rank=base), **options)(policy, prompts, torch.Generator())
        steps.append(rollout.unmask_step)
        assert (rollout.order.probability == "unknown") == (base is mine)
    assert torch.equal(*steps) and len(steps[0].unique(dim=0)) > 2
    for wrong, message in (
        (
            lambda: check(policy, NOISY.replace(base_rank=FIXED(by_chance)), rules.Schedule()),
            "rank=by_chance is declared deterministic, but gave different scores",
        ),
        (lambda: NOISY.replace(base_rank=rules.Confidence()), "base_rank=Confidence must take some of logits"),
        (lambda: NOISY.replace(base_rank=rules.RandomOrder()), "base_rank=RandomOrder must take some of logits"),
        (lambda: FunctionRank(function=mine, order="plackett_luce"), "order='plackett_luce' must be one of 'unknown'"),
        (
            lambda: check(policy, NOISY.replace(base_rank=mine), COMMITS["threshold"]),
            "cannot use the noisy scores of PlackettLuce",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def of_states_of_tiny(hidden):
    return hidden.float().norm(dim=-1)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "compile_step": True}])
@pytest.mark.parametrize("with_draws", [False, True])
def test_a_rank_may_read_the_hidden_states(monkeypatch, options, with_draws):
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)
    prompts = Prompts.from_ids([[3]], pad_id=4, num_generations=16, seeds=range(16))
    options = {"max_new_tokens": LENGTH, "diffusion_steps": 2, "suppress": (2, 3, 4), **options}
    steps = []
    for rank in (of_logits, of_states):
        if with_draws:
            rank = READING_TOKENS[rank]
        rollout = Unmask(rank=rank, **options)(tied_policy(period=3), prompts, torch.Generator())
        steps.append((rollout.unmask_step, rollout.tokens))
    assert all(map(torch.equal, *steps))


READING_TOKENS = {
    of_logits: lambda logits, tokens: of_logits(logits) + tokens,
    of_states: lambda hidden, tokens: of_states(hidden) + tokens,
}


def test_what_a_pair_may_declare():
    for wrong in (
        lambda: FunctionRank(function=rules.Confidence(), order="deterministic"),
        lambda: FunctionRank(function=rules.RandomOrder(), order="deterministic"),
        lambda: FunctionRank(function=mine, order="independent"),
        lambda: FunctionRank(function=mine, order="certain"),
        lambda: FunctionRank(function=mine, order="max_prob"),
        lambda: FunctionCommit(function=rules.Schedule(), order="count"),
        lambda: Unmask(max_new_tokens=4, rank="best"),
        lambda: Unmask(max_new_tokens=4, commit=3),
    ):
        with pytest.raises(ValueError, match=r"^(rank|commit|order)="):
            wrong()
