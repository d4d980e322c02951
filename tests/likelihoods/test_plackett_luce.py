"""The law of `plackett_luce` against the enumeration of every order of every step, in fp64."""

import itertools
import math
import random
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from likelihood_toys import TablePolicy
from order_toys import drawn_from, missing_order, total

from dllm_rl.algorithms.losses import K2, FixedLengthMean, PPOClip, policy_loss
from dllm_rl.decoding.support import with_support
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.samplers import rules
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.update import forward_backward
from dllm_rl.types.retained_graphs import RetainedGraphs
from dllm_rl.types.rollouts import Order, Prompts, SamplingParams
from dllm_rl.types.scoring import Batch

GENERATOR = torch.Generator()
SCORES = {
    "MaxProb": lambda p: math.log(max(p)),
    "Margin": lambda p: sorted(p)[-1] - sorted(p)[-2],
    "Entropy": lambda p: sum(x * math.log(x) for x in p),
}


@pytest.fixture
def fp64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def orders(scores):
    """Every order of these positions and its chance: one leaves after the other, in proportion to exp(score)."""
    for order in itertools.permutations(range(len(scores))):
        chance, masses = 1.0, [math.exp(score - max(scores)) for score in scores]
        for n, i in enumerate(order):
            chance *= masses[i] / sum(masses[j] for j in order[n:])
        yield order, chance


def outcomes(policy, blocks, diffusion_steps, *, tau, base_rank="MaxProb", **options):
    """{(tokens, steps, draws, opened): probability}: a step of M masked positions has M! orders of noisy scores and W^k
    words at the k positions that come first."""
    hole, size = policy.mask_id, policy.length

    @cache
    def chances(state, i):
        return drawn_from(policy.table[state, i, : policy.words].detach(), **options).tolist()

    @cache
    def score(state, i):  # the mask token takes its share
        return SCORES[base_rank](policy.table[state, i, : policy.words + 1].detach().softmax(-1).tolist()) / tau

    found, opened, clock = {((hole,) * size, (-1,) * size, (0,) * size): 1.0}, [0] * size, 0
    for block in blocks:
        for position in block:
            opened[position] = clock
        for left in range(min(diffusion_steps, len(block)), 0, -1):
            after = {}
            for (tokens, steps, draws), chance in found.items():
                masked = [i for i in block if tokens[i] == hole]
                count = math.ceil(len(masked) / left)
                state = sum(t * (policy.words + 1) ** i for i, t in enumerate(tokens))
                p = [chances(state, i) for i in masked]
                ways = orders([score(state, i) for i in masked])
                if count == len(masked):  # nothing depends on the order: one outcome
                    ways = [(tuple(range(count)), 1.0)]
                for order, likely in ways:
                    for words in itertools.product(range(policy.words), repeat=count):
                        new = list(tokens), list(steps), list(draws)
                        drawn = chance * likely
                        for n, (i, word) in enumerate(zip(order, words, strict=False)):
                            new[0][masked[i]], new[1][masked[i]] = word, clock
                            new[2][masked[i]] = n if count < len(masked) else 0
                            drawn *= p[i][word]
                        key = tuple(map(tuple, new))
                        after[key] = after.get(key, 0.0) + drawn
            found, clock = after, clock + 1
    return {(*key, tuple(opened)): p for key, p in found.items() if p > 0}


def as_rollout(policy, keys, *, tau, base_rank="MaxProb", **options):
    tokens, steps, draws, opened = (torch.tensor(column) for column in zip(*keys, strict=True))
    steps, draws, opened = (torch.nn.functional.pad(x, (1, 0), value=-1) for x in (steps, draws, opened))
    made = policy.rollout(tokens, unmask_step=steps)
    rank = rules.PlackettLuce(temperature=tau, base_rank=getattr(rules, base_rank)())
    params = SamplingParams(**options, suppress=made.sampling_params.suppress)
    order = Order(opened, logprobs=torch.zeros(made.tokens.shape), rank_function=rank, draw_index=draws)
    return replace(made, sampling_params=params, order=order)


def some_toy(seed):
    """Three positions, 1 to 3 commits a step, in one block or two."""
    pick = random.Random(seed)
    options = {"temperature": pick.choice([1.0, 0.6, 1.7])} | pick.choice([{}, {"top_k": 2}, {"top_p": 0.8}])
    options |= {"tau": pick.choice([0.03, 0.1, 0.3, 1.0, 10.0]), "base_rank": pick.choice(list(SCORES))}
    policy = TablePolicy(length=3, words=3, seed=seed, scale=pick.choice([0.7, 1.5, 2.5]))
    return policy, pick.choice([[[0, 1, 2]], [[0, 1, 2]], [[0, 1], [2]]]), 1 + seed % 3, options


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 10))])
def test_the_law_is_the_enumeration_of_all_orders(fp64, part):
    """Every outcome's log-prob to 1e-10, all of them together 1, and the draws of a set together the set."""
    missing = []
    for seed in range(10 * part, 10 * part + 10):
        policy, blocks, diffusion_steps, options = some_toy(seed)
        found = outcomes(policy, blocks, diffusion_steps, **options)
        rollout = as_rollout(policy, found, **options)
        missing.append(missing_order(policy, rollout, found, atol=1e-10))
    assert max(missing) > 0.5


def through_the_learner(policy, rollout, chances, rewards, *, retain_graphs, **options):
    """sum of P A grad log P over the rows, as an update makes it."""
    estimator = lik.Trajectory(**options)
    noise = estimator.draw_views(rollout, GENERATOR)
    mask = rollout.completion_mask
    graphs = RetainedGraphs(mask.any(-1), 999 if retain_graphs else 0)
    scores = estimator.view_logprobs(policy, rollout, noise, micro_batch_size=64, graphs=graphs)
    old = estimator.combine(scores, noise)
    weights = chances[:, None].expand(mask.shape)
    given = rollout, noise, rewards, old, scores, weights, mask, None
    batch = Batch(*given, num_tokens=1, num_sequences=1, graphs=graphs)
    surrogate, aggregate = PPOClip(epsilon=0.2), FixedLengthMean(length=1)
    loss = partial(policy_loss, surrogate=surrogate, loss_reduction=aggregate, beta=0.0, kl=K2())
    policy.table.grad = None
    forward_backward(policy, batch, scores, loss=loss, likelihood=estimator, micro_batch_size=64)
    return -policy.table.grad


@pytest.mark.parametrize(
    ("diffusion_steps", "options"),
    [
        (3, {"tau": 0.03}),
        (3, {"tau": 1.0, "base_rank": "Entropy"}),
        (2, {"tau": 0.3, "base_rank": "Margin"}),
        (1, {"tau": 0.3, "temperature": 0.7, "top_k": 2}),
    ],
    ids=str,
)
@pytest.mark.repeated
def test_the_gradient_is_the_finite_difference_of_the_expected_reward(fp64, diffusion_steps, options):
    """The reward depends on tokens and order. An update's gradient, with kept graphs and without, is the enumeration's
    difference quotient to 1e-6; without the order's part it is another vector."""
    policy = TablePolicy(length=3, words=3, seed=4, scale=1.0)
    found = outcomes(policy, [[0, 1, 2]], diffusion_steps, **options)
    rewards = torch.randn(len(found), generator=GENERATOR.manual_seed(0))
    directions = torch.randn(2, *policy.table.shape, generator=GENERATOR)
    quotients, table = [], policy.table
    for direction in directions:
        ends = []
        for step in (1e-5, -1e-5):
            policy.table = table + step * direction
            moved = outcomes(policy, [[0, 1, 2]], diffusion_steps, **options)
            ends.append(float(torch.tensor([moved[key] for key in found]) @ rewards))
        quotients.append((ends[0] - ends[1]) / 2e-5)
    policy.table = table.requires_grad_()
    rollout, chances = as_rollout(policy, found, **options), torch.tensor(list(found.values()))
    run = partial(through_the_learner, policy, rollout, chances, rewards)
    expected = torch.tensor(quotients)
    for retain_graphs in (False, True):
        slopes = (run(retain_graphs=retain_graphs) * directions).flatten(1).sum(1)
        torch.testing.assert_close(slopes, expected, rtol=0, atol=1e-6)
    given = (run(retain_graphs=False, include_order=False) * directions).flatten(1).sum(1)
    assert ((given - expected).abs().max() > 1e-2) == (diffusion_steps > 1), "one step writes all: no order matters"


def test_ratios_and_kl_take_the_order_in(fp64):
    """Between any two policies the mean ratio is 1, and the mean log-ratio is their divergence. The mean ratio of the
    draws of one set is the set's ratio."""
    policy, other = (TablePolicy(length=3, words=2, seed=seed, scale=0.8) for seed in (7, 8))
    options = {"tau": 0.3}
    found, theirs = (outcomes(each, [[0, 1, 2]], 2, **options) for each in (policy, other))
    rollout, p = as_rollout(policy, found, **options), torch.tensor(list(found.values()))
    q = torch.tensor([theirs[key] for key in found])
    log_ratio = total(other, rollout) - total(policy, rollout)
    torch.testing.assert_close((p * log_ratio.exp()).sum(), torch.tensor(1.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(-(p * log_ratio).sum(), (p * (p / q).log()).sum(), rtol=0, atol=1e-12)
    sets = [key[:2] for key in found]
    assert len(set(sets)) < len(sets), "two draws of a step have two orders"
    for each in set(sets):
        rows = torch.tensor([key == each for key in sets])
        mean = (p[rows] * log_ratio[rows].exp()).sum() / p[rows].sum()
        torch.testing.assert_close(mean, q[rows].sum() / p[rows].sum(), rtol=0, atol=1e-12)
    given = (total(other, rollout, include_order=False) - total(policy, rollout, include_order=False)).exp()
    assert abs(float((p * given).sum()) - 1) < 1e-12, "the tokens' ratio also has mean 1 ..."
    assert abs(float(((p * given) - q).abs().sum())) > 0.1, "... and moves to another law of the orders"


def sample(policy, rank, rows, *, diffusion_steps, seed=0, **options):
    suppress = (policy.words + 1, policy.words + 2)
    prompts = Prompts.from_ids([[policy.words + 1]], pad_id=policy.pad_id, num_generations=rows)
    settings = {"max_new_tokens": policy.length, "diffusion_steps": diffusion_steps, "suppress": suppress} | options
    return Unmask(rank=rank, **{"temperature": 1.0} | settings)(policy, prompts, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("diffusion_steps", "tau", "options"),
    [(3, 0.3, {}), (2, 1.0, {"temperature": 0.7}), (1, 0.5, {"top_k": 2})],
    ids=str,
)
def test_a_sampler_draws_by_the_law_and_records_it(diffusion_steps, tau, options):
    """Tokens, steps and draws pass a chi-square test; the record is what scoring finds, bit for bit."""
    policy = TablePolicy(length=3, words=3, seed=5)
    rows = 5_000
    rollout = sample(policy, rules.PlackettLuce(temperature=tau), rows, diffusion_steps=diffusion_steps, **options)
    estimator = lik.Trajectory()
    noise = estimator.draw_views(rollout, GENERATOR)
    contributions = estimator.logprobs(policy, rollout, noise)
    assert torch.equal(contributions, recorded(rollout, noise))
    if "top_k" in options:  # the order needs no kept set
        kept = with_support(rollout, "rollout")
        again = estimator.logprobs(policy, kept, estimator.draw_views(kept, GENERATOR))
        torch.testing.assert_close(again, contributions, rtol=0, atol=1e-5)
    found = outcomes(policy, [[0, 1, 2]], diffusion_steps, tau=tau, **options)
    columns = (rollout.tokens, rollout.unmask_step, rollout.order.draw_index, rollout.order.block_first_step)
    keys = [tuple(map(tuple, key)) for key in zip(*(x[:, 1:].tolist() for x in columns), strict=True)]
    chances = torch.tensor([found[key] for key in keys])
    torch.testing.assert_close(contributions.sum(-1), chances.log(), rtol=0, atol=1e-4)
    counts = dict.fromkeys(found, 0)
    for key in keys:
        counts[key] += 1
    rare = [key for key, chance in found.items() if rows * chance < 10]
    cells = [(counts[key], rows * found[key]) for key in found if key not in rare]
    cells.append((sum(counts[key] for key in rare), rows * sum(found[key] for key in rare)))
    statistic = sum((seen - wanted) ** 2 / max(wanted, 1) for seen, wanted in cells)
    degrees = len(cells) - 1
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3  # 1 - 1e-3, Wilson-Hilferty
    assert degrees >= (20 if diffusion_steps > 1 else 7) and statistic < bound


@pytest.mark.parametrize("diffusion_steps", [3, 2])
def test_the_limits_are_the_score_and_a_random_order(diffusion_steps):
    """The same seeds: a small temperature has max_prob's rollouts, and a large one those of `random`."""
    policy = TablePolicy(length=3, words=3, seed=6)
    for tau, limit in ((1e-6, rules.MaxProb()), (1e9, rules.RandomOrder())):
        ours = sample(policy, rules.PlackettLuce(temperature=tau), 500, diffusion_steps=diffusion_steps)
        theirs = sample(policy, limit, 500, diffusion_steps=diffusion_steps)
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.unmask_step, theirs.unmask_step)
        assert ours.order.rank_name is None and theirs.order.logprobs is None


def test_what_needs_log_probabilities_is_refused():
    policy = TablePolicy(length=3, words=3, seed=6)
    rank = rules.PlackettLuce(temperature=0.3)
    with pytest.raises(ValueError, match=r"commit=Threshold cannot use the noisy scores of PlackettLuce; use"):
        sample(policy, rank, 2, diffusion_steps=3, commit=rules.Threshold(tau=0.9))
    with pytest.raises(ValueError, match="temperature=0 must be at least 1e-30"):
        rules.PlackettLuce(temperature=0)
    with pytest.raises(ValueError, match="base_rank=Confidence must take some of logits, normalizer and hidden and no"):
        rank.replace(base_rank=rules.Confidence())
    assert sample(policy, rank, 2, diffusion_steps=3, temperature=0.0).order.logprobs is None
