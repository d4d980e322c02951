"""Rank and commit rules by hand."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from refusals import refuses

from dllm_rl.models import logprobs as head
from dllm_rl.models.logprobs import invert_cdf, sample
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.rng import generator_for
from dllm_rl.samplers import Unmask, revise, rules
from dllm_rl.samplers.with_settings import with_settings
from dllm_rl.types.rollouts import Prompts

LN2 = math.log(2)
# One position with probabilities 1/2, 1/4, 1/4, 0, and a uniform one.
LOGITS = torch.tensor([[1.0 + LN2, 1.0, 1.0, -torch.inf], [0.0, 0.0, 0.0, 0.0]])
NORMALIZER = LOGITS.logsumexp(-1)


def test_ranks_by_hand():
    tokens = torch.tensor([1, 3])
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    close(rules.Confidence()(LOGITS, NORMALIZER, tokens), torch.tensor([-2 * LN2, -2 * LN2]))
    close(rules.MaxProb()(LOGITS, NORMALIZER), torch.tensor([-LN2, -2 * LN2]))
    close(rules.Margin()(LOGITS, NORMALIZER), torch.tensor([0.25, 0.0]))
    close(rules.Entropy()(LOGITS, NORMALIZER), torch.tensor([-1.5 * LN2, -2 * LN2]))
    assert torch.equal(rules.RandomOrder()(torch.tensor([0.3, 0.7])), torch.tensor([0.3, 0.7]))


def test_needs_are_read_from_the_names():
    assert rules.Confidence().reads == {"logits", "normalizer", "tokens"}
    assert rules.RandomOrder().reads == {"uniforms"}
    assert all("tokens" not in r.reads for r in (rules.MaxProb(), rules.Margin(), rules.Entropy(), rules.RandomOrder()))


def commit(rule, probs, steps_left=1, **options):
    """Positions chosen in one row; None stands for one that is not masked."""
    masked = torch.tensor([[p is not None for p in probs]])
    scores = torch.tensor([[-torch.inf if p is None else p for p in probs]])
    chosen = rule(scores, masked, torch.tensor([steps_left]), **options)
    return chosen[0].nonzero()[:, 0].tolist()


def logs(*probs):
    return [None if p is None else math.log(p) for p in probs]


def test_schedule_takes_the_best_and_breaks_ties_by_index():
    assert commit(rules.Schedule(), [None, 0.2, 0.9, 0.2, 0.5], 2) == [2, 4]
    assert commit(rules.Schedule(), [0.5, 0.5, 0.5, 0.5], 2) == [0, 1]
    assert commit(rules.Schedule(), [None, 0.5, None], 4) == [1]
    assert commit(rules.Schedule(), [None, None], 4) == []


@pytest.mark.parametrize(
    ("length", "steps", "shares"), [(10, 4, [3, 3, 2, 2]), (8, 8, [1] * 8), (3, 5, [1, 1, 1]), (7, 1, [7])]
)
def test_schedule_is_llada_equal_shares_remainder_first(length, steps, shares):
    left, out = length, []
    for n in range(steps):
        if left:
            out.append(int(rules.Schedule().count(torch.tensor([left]), torch.tensor([steps - n]))))
            left -= out[-1]
    assert out == shares and left == 0


def test_late_schedule_keeps_the_remainder_for_the_end():
    """10 in 4 steps: 2, 2, 3, 3."""
    left, out = 10, []
    for n in range(4):
        out.append(len(commit(rules.LateSchedule(), [0.1] * left, 4 - n)))
        left -= out[-1]
    assert out == [2, 2, 3, 3]


def test_threshold():
    assert commit(rules.Threshold(tau=0.9), logs(0.95, 0.2, None, 0.91, 0.9)) == [0, 3, 4]
    assert commit(rules.Threshold(tau=0.9), logs(0.3, 0.5, None, 0.5)) == [1]  # at least one, the first of equals
    assert commit(rules.Threshold(tau=0.9), [None, None]) == []
    assert commit(rules.Threshold(tau=1.0), logs(0.99, 1.0, 1.0)) == [1, 2]
    refuses(r"tau=1\.5", lambda: commit(rules.Threshold(tau=1.5), logs(0.5)))


def test_entropy_bound():
    """Entropies 0.1, 0.2, 0.4, 1.0: sums without the largest are 0, 0.1, 0.3, 0.7."""
    scores = [-0.4, -0.1, -1.0, None, -0.2]
    assert commit(rules.EntropyBound(gamma=0.0), scores) == [1]
    assert commit(rules.EntropyBound(gamma=0.15), scores) == [1, 4]
    assert commit(rules.EntropyBound(gamma=0.31), scores) == [0, 1, 4]
    assert commit(rules.EntropyBound(gamma=0.71), scores) == [0, 1, 2, 4]
    refuses("gamma=-1", lambda: commit(rules.EntropyBound(gamma=-1.0), scores))


def test_origin():
    assert commit(rules.Origin(), [0.74, 0.75, 0.9, None], 4) == [1, 2]
    assert commit(rules.Origin(), [0.0, 0.5, None], 1) == [0, 1]


def test_rows_have_their_own_steps():
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).expand(2, -1)
    chosen = rules.Schedule()(scores, torch.ones(2, 4, dtype=torch.bool), torch.tensor([4, 2]))
    assert chosen.tolist() == [[False, True, False, False], [False, True, True, False]]


def test_steps_per_block():
    assert rules.steps_per_block(7, [8, 8, 4]) == [3, 2, 2]
    assert rules.steps_per_block(None, [8, 8, 4]) == [8, 8, 4]
    assert rules.steps_per_block(3, [8, 8, 4]) == [1, 1, 1]
    refuses("diffusion_steps=2 is fewer than the 3 blocks", lambda: rules.steps_per_block(2, [8, 8, 4]))


@pytest.mark.parametrize("size", [3, 256, 1000])
def test_inversion_is_the_cumulative_distribution(size):
    """At every edge of the cumulative mass the token changes; a token of mass 0 is never drawn, not even at the end."""
    mass = torch.randint(0, 4, (1, size), generator=torch.Generator().manual_seed(1)).float()
    mass[0, -1] = 0  # and small integers, whose sums are exact
    edges = mass[0].double().cumsum(-1)
    u = torch.arange(4 * int(edges[-1])).double() / (4 * edges[-1])
    u = torch.cat([u, torch.tensor([1 - 2.0**-53], dtype=torch.float64)])
    expected = torch.searchsorted(edges, u * edges[-1], right=True)
    expected[-1] = int(mass[0].nonzero()[-1])
    assert torch.equal(invert_cdf(mass.expand(len(u), -1), u), expected)
    assert (mass[0, expected] > 0).all()


def test_sample_needs_no_normalized_logits():
    logits = torch.tensor([[200.0, 200.0 + LN2, -torch.inf]]).expand(3, -1)
    assert sample(logits, torch.tensor([0.0, 0.33, 0.34], dtype=torch.float64)).tolist() == [0, 0, 1]


@pytest.mark.usefixtures("exact_arithmetic")
def test_head_rows_do_not_depend_on_how_many_there_are():
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(50, 96, generator=generator), torch.randn(40, 96, generator=generator)
    policy = tiny_masked_lm(characters="0123456789")
    run = lambda h: head.chunked(lambda x: (F.linear(x, weight),), h, policy=policy)[0]  # noqa: E731
    for rows in (1, 2, 3, 5, 17):
        assert torch.equal(run(hidden[:rows]), run(hidden)[:rows])


RANKS = (rules.MaxProb(), rules.Confidence(), rules.Margin(), rules.Entropy(), rules.RandomOrder())


@pytest.mark.parametrize(
    ("rule", "fitting"),
    [
        (rules.Threshold(tau=0.9), {"MaxProb", "Confidence"}),
        (rules.SoftThreshold(tau=0.9), {"MaxProb"}),
        (rules.EntropyBound(gamma=0.1), {"Entropy"}),
        (rules.Origin(), {"RandomOrder"}),
        (revise.Remask(eta=0.1), {"RandomOrder"}),
        (revise.Edit(tau=0.9), {"MaxProb", "Confidence"}),
        (rules.Schedule(), {rank.name for rank in RANKS}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_rule_reads_the_scores_that_it_is_made_for_or_is_refused(rule, fitting):
    """Random numbers and margins are at least 0, as log-probs of certain tokens are: all would be written at once."""
    policy = tiny_masked_lm(characters="1234.=")
    prompts = Prompts.from_ids([[3, 4]], pad_id=policy.pad_id)
    for rank in RANKS:
        sampler = Unmask(max_new_tokens=4, rank=rank, commit=rule)
        if rank.name in fitting:
            sampler(policy, prompts, generator_for(0))
        else:
            with pytest.raises(ValueError, match=rf"commit={rule.name}\(...\) needs the scores of .*; use rank="):
                sampler(policy, prompts, generator_for(0))
        assert with_settings(policy, {"commit": rule}, Unmask(max_new_tokens=4, rank=rank)).rank.name in fitting


def test_a_rank_of_ones_own_goes_with_any_rule_but_that_of_known_probabilities():
    policy = tiny_masked_lm(characters="1234.=")
    prompts = Prompts.from_ids([[3, 4]], pad_id=policy.pad_id)

    def first(logits, normalizer):
        return logits[:, 0] - normalizer

    sampler = Unmask(max_new_tokens=4, rank=first, commit=rules.Threshold(tau=0.9))
    assert sampler(policy, prompts, generator_for(0)).completion_mask.sum() == 4


def test_an_order_that_no_rule_has_is_refused():
    """A commit rule has no order "independent": what follows from `uniforms` alone is "deterministic"."""
    for base, kind, wrong in ((rules.Rank, "rank", "random"), (rules.Commit, "commit", "independent")):
        mine = type("Mine", (base,), {"order": wrong, "__call__": lambda self, uniforms: uniforms})
        with pytest.raises(ValueError, match=f"{kind}=Mine declares order='{wrong}', which is not one of determ"):
            mine()
        assert type("Fine", (mine,), {"order": "deterministic" if kind == "commit" else "independent"})()
    assert type("Narrow", (rules.Confidence,), {})().order == "confidence"
