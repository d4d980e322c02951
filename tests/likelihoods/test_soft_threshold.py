"""The law of `soft_threshold` against the enumeration of every coin of every step, in fp64."""

import itertools
import math
import random
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from likelihood_toys import TablePolicy
from order_toys import drawn_from, missing_order, stayed_of, total

from dllm_rl.algorithms.losses import K2, FixedLengthMean, PPOClip, policy_loss
from dllm_rl.decoding.order import MAX_LOGPROB, draw_set
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.likelihoods.views import each_view
from dllm_rl.samplers import rules
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.update import forward_backward
from dllm_rl.types.retained_graphs import RetainedGraphs
from dllm_rl.types.rollouts import Order, Prompts, SamplingParams
from dllm_rl.types.scoring import Batch

GENERATOR = torch.Generator()


@pytest.fixture
def fp64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def coin(p, tau, temperature):
    """The chance of a yes: odds to the power of 1/temperature, over those of the threshold."""
    p = min(p, math.exp(MAX_LOGPROB))
    odds = (p / (1 - p) * (1 - tau) / tau) ** (1 / temperature)
    return odds / (1 + odds)


def ways(coins):
    """Every set that is not empty and its chance, where all coins are thrown again until one says yes."""
    for yes in itertools.product((False, True), repeat=len(coins)):
        if any(yes):
            chance = math.prod(c if y else 1 - c for c, y in zip(coins, yes, strict=True))
            yield [i for i, y in enumerate(yes) if y], chance / (1 - math.prod(1 - c for c in coins))


def outcomes(policy, blocks, *, tau, softness, **options):
    """{(tokens, steps, opened): probability}. A block's rows take 1 to M steps, and the next block follows at once."""
    hole, size = policy.mask_id, policy.length

    @cache
    def chances(state, i):
        return drawn_from(policy.table[state, i, : policy.words].detach(), **options).tolist()

    @cache
    def own(state, i):  # the mask token takes its share
        return policy.table[state, i, : policy.words + 1].detach().softmax(-1).max().item()

    found = {}
    waiting = {((hole,) * size, (-1,) * size, (0,) * size, 0, 0): 1.0}  # tokens, steps, opened, block, clock
    while waiting:
        after = {}
        for (tokens, steps, opened, number, clock), chance in waiting.items():
            masked = [i for i in blocks[number] if tokens[i] == hole]
            state = sum(t * (policy.words + 1) ** i for i, t in enumerate(tokens))
            p = [chances(state, i) for i in masked]
            for chosen, likely in ways([coin(own(state, i), tau, softness) for i in masked]):
                for words in itertools.product(range(policy.words), repeat=len(chosen)):
                    new, when, begun = list(tokens), list(steps), list(opened)
                    drawn = chance * likely
                    for n, word in zip(chosen, words, strict=True):
                        new[masked[n]], when[masked[n]] = word, clock
                        drawn *= p[n][word]
                    block = number + (len(chosen) == len(masked))
                    if block > number and block < len(blocks):
                        for i in blocks[block]:
                            begun[i] = clock + 1
                    key = tuple(new), tuple(when), tuple(begun)
                    if block == len(blocks):
                        found[key] = found.get(key, 0.0) + drawn
                    else:
                        key = (*key, block, clock + 1)
                        after[key] = after.get(key, 0.0) + drawn
        waiting = after
    return {key: p for key, p in found.items() if p > 0}


def as_rollout(policy, keys, *, tau, softness, **options):
    tokens, steps, opened = (torch.tensor(column) for column in zip(*keys, strict=True))
    steps, opened = (torch.nn.functional.pad(x, (1, 0), value=-1) for x in (steps, opened))
    made = policy.rollout(tokens, unmask_step=steps)
    params = SamplingParams(**options, suppress=made.sampling_params.suppress)
    order = Order(
        opened,
        logprobs=torch.zeros(made.tokens.shape),
        soft_threshold_params=(tau, softness),
        rank_function=rules.MaxProb(),
    )
    return replace(made, sampling_params=params, order=order)


def some_toy(seed):
    """Three positions in one block or two."""
    pick = random.Random(seed)
    options = {"temperature": pick.choice([1.0, 0.6, 1.7])} | pick.choice([{}, {"top_k": 2}, {"top_p": 0.8}])
    options |= {"tau": pick.choice([0.3, 0.6, 0.9]), "softness": pick.choice([0.3, 0.5, 1.0, 3.0])}
    policy = TablePolicy(length=3, words=3, seed=seed, scale=pick.choice([0.7, 1.5, 2.5]))
    return policy, pick.choice([[[0, 1, 2]], [[0, 1, 2]], [[0, 1], [2]]]), options


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 10))])
def test_the_law_is_the_enumeration_of_all_coins(fp64, part):
    """Every outcome's log-prob to 1e-9, and all of them together 1."""
    missing = []
    for seed in range(10 * part, 10 * part + 10):
        policy, blocks, options = some_toy(seed)
        found = outcomes(policy, blocks, **options)
        rollout = as_rollout(policy, found, **options)
        missing.append(missing_order(policy, rollout, found, atol=1e-9))
    assert max(missing) > 0.5, "without the sets' part the product of token probabilities is another number"


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
    ("blocks", "options"),
    [
        ([[0, 1, 2]], {"tau": 0.5, "softness": 0.3}),
        ([[0, 1, 2]], {"tau": 0.9, "softness": 1.0}),
        ([[0, 1], [2]], {"tau": 0.6, "softness": 0.5, "temperature": 0.7, "top_k": 2}),
    ],
    ids=str,
)
@pytest.mark.repeated
def test_the_gradient_is_the_finite_difference_of_the_expected_reward(fp64, blocks, options):
    """The reward pays for few steps too. An update's gradient, with kept graphs and without, is the enumeration's
    difference quotient to 1e-6; without the sets' part it is another vector."""
    policy = TablePolicy(length=3, words=3, seed=4, scale=1.0)
    found = outcomes(policy, blocks, **options)
    forwards = torch.tensor([max(steps) + 1.0 for _, steps, _ in found])
    rewards = torch.randn(len(found), generator=GENERATOR.manual_seed(0)) + 1 / forwards
    directions = torch.randn(2, *policy.table.shape, generator=GENERATOR)
    quotients, table = [], policy.table
    for direction in directions:
        ends = []
        for step in (1e-5, -1e-5):
            policy.table = table + step * direction
            moved = outcomes(policy, blocks, **options)
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
    assert (given - expected).abs().max() > 1e-2


def test_only_what_moves_is_scored_again(fp64):
    """The gradient of some of the contributions is autograd's, though each depends on all that its step offered."""
    policy = TablePolicy(length=3, words=3, seed=2)
    policy.table.requires_grad_()
    options = {"tau": 0.6, "softness": 0.5}
    rollout = as_rollout(policy, list(outcomes(policy, [[0, 1, 2]], **options))[:40], **options)
    noise = lik.Trajectory().draw_views(rollout, GENERATOR)
    vectors = torch.randn(noise.coefficients.shape, generator=GENERATOR.manual_seed(3)) * (noise.coefficients != 0)
    vectors = vectors * (torch.rand(vectors.shape, generator=GENERATOR) < 0.3)
    scores = [view.logprobs(policy, rollout) for view in each_view(noise)]
    (expected,) = torch.autograd.grad((torch.stack(scores) * vectors).sum(), policy.table)
    policy.table.grad = None
    for view, vector in zip(each_view(noise), vectors, strict=True):
        view.backward(policy, rollout, vector)
    torch.testing.assert_close(policy.table.grad, expected, rtol=0, atol=1e-12)


def test_ratios_take_the_sets_in(fp64):
    """Between any two policies the mean ratio is 1, and the mean log-ratio is their divergence."""
    policy, other = (TablePolicy(length=3, words=2, seed=seed, scale=0.8) for seed in (7, 8))
    options = {"tau": 0.6, "softness": 0.5}
    found, theirs = (outcomes(each, [[0, 1, 2]], **options) for each in (policy, other))
    rollout, p = as_rollout(policy, found, **options), torch.tensor(list(found.values()))
    q = torch.tensor([theirs[key] for key in found])
    log_ratio = total(other, rollout) - total(policy, rollout)
    torch.testing.assert_close((p * log_ratio.exp()).sum(), torch.tensor(1.0), rtol=0, atol=1e-9)
    torch.testing.assert_close(-(p * log_ratio).sum(), (p * (p / q).log()).sum(), rtol=0, atol=1e-9)


def sample(policy, rows, *, seed=0, rank=rules.MaxProb(), **options):
    suppress = (policy.words + 1, policy.words + 2)
    prompts = Prompts.from_ids([[policy.words + 1]], pad_id=policy.pad_id, num_generations=rows)
    settings = {"max_new_tokens": policy.length, "suppress": suppress, "temperature": 1.0} | options
    return Unmask(rank=rank, **settings)(policy, prompts, torch.Generator().manual_seed(seed))


@pytest.mark.repeated
@pytest.mark.parametrize(
    ("tau", "softness", "options"),
    [(0.6, 0.5, {}), (0.9, 1.0, {"temperature": 0.7}), (0.5, 0.3, {"block_size": 2, "top_k": 2})],
    ids=str,
)
def test_a_sampler_draws_by_the_law_and_records_it(tau, softness, options):
    """Tokens and steps pass a chi-square test; the record is what scoring finds, bit for bit."""
    policy = TablePolicy(length=3, words=3, seed=5)
    rows = 5_000
    rollout = sample(policy, rows, commit=rules.SoftThreshold(tau=tau, temperature=softness), **options)
    estimator = lik.Trajectory()
    noise = estimator.draw_views(rollout, GENERATOR)
    contributions = estimator.logprobs(policy, rollout, noise)
    assert torch.equal(contributions, recorded(rollout, noise)) and rollout.order.rank_name is None
    law = {name: value for name, value in options.items() if name != "block_size"}
    blocks = [[0, 1], [2]] if "block_size" in options else [[0, 1, 2]]
    found = outcomes(policy, blocks, tau=tau, softness=softness, **law)
    columns = (rollout.tokens, rollout.unmask_step, rollout.order.block_first_step)
    keys = [tuple(map(tuple, key)) for key in zip(*(x[:, 1:].tolist() for x in columns), strict=True)]
    chances = torch.tensor([found[key] for key in keys])
    torch.testing.assert_close(contributions.sum(-1), chances.log(), rtol=0, atol=1e-3)
    counts = dict.fromkeys(found, 0)
    for key in keys:
        counts[key] += 1
    rare = [key for key, chance in found.items() if rows * chance < 10]
    cells = [(counts[key], rows * found[key]) for key in found if key not in rare]
    cells.append((sum(counts[key] for key in rare), rows * sum(found[key] for key in rare)))
    statistic = sum((seen - wanted) ** 2 / max(wanted, 1) for seen, wanted in cells)
    degrees = len(cells) - 1
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3  # 1 - 1e-3, Wilson-Hilferty
    assert degrees >= 15 and statistic < bound


def test_drawn_sets_have_the_frequencies_of_the_law():
    """Five places of which two are not masked, in 40,000 rows: every set within four standard errors of its chance."""
    p, masked = torch.tensor([0.3, 0.9, 0.5, 0.99, 0.2]), torch.tensor([True, False, True, True, False])
    rows = 40_000
    uniforms = torch.rand(rows, 5, generator=GENERATOR.manual_seed(3))
    law = {"tau": 0.95, "temperature": 0.8}
    drawn = draw_set(p.log().expand(rows, -1), masked.expand(rows, -1), uniforms, **law)
    assert not drawn[:, ~masked].any()
    places = masked.nonzero()[:, 0].tolist()
    coins = [coin(float(p[i]), *law.values()) for i in places]
    for chosen, chance in ways(coins):
        wanted = torch.zeros(5, dtype=torch.bool)
        wanted[[places[n] for n in chosen]] = True
        share = float((drawn == wanted).all(-1).double().mean())
        assert abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / rows), (chosen, share, chance)
    nothing = draw_set(p.log()[None], torch.zeros(1, 5, dtype=torch.bool), uniforms[:1], **law)
    assert not nothing.any()
    sure = draw_set(torch.zeros(1, 5), masked[None], torch.ones(1, 5), **law)  # a number that rounded to 1
    assert sure.sum() == 1


def test_the_limit_is_the_threshold():
    """The same seeds: at the least temperature almost every rollout is `threshold`'s."""
    lasts = set()
    for seed in (6, 7, 8):
        policy = TablePolicy(length=3, words=3, seed=seed)
        ours = sample(policy, 500, commit=rules.SoftThreshold(tau=0.6, temperature=0.01))
        theirs = sample(policy, 500, commit=rules.Threshold(tau=0.6))
        same = (ours.tokens == theirs.tokens).all(-1) & (ours.unmask_step == theirs.unmask_step).all(-1)
        assert same.double().mean() > 0.95
        lasts |= set(theirs.unmask_step.amax(-1).tolist())
    assert len(lasts) > 1, "toys that take another number of steps"


def test_far_below_the_threshold_the_law_is_finite(fp64):
    """Where every coin is of a chance below the least fp64 number, the ratio of chances decides, and has a gradient."""
    policy = TablePolicy(length=3, words=3, seed=6, scale=0.5)
    policy.table.requires_grad_()
    keys = [((0, 1, 2), steps, (0, 0, 0)) for steps in ((0, 1, 2), (0, 0, 0))]
    rollout = as_rollout(policy, keys, tau=0.999, softness=0.01)
    views = list(each_view(lik.Trajectory().draw_views(rollout, GENERATOR)))
    found = sum(view.logprobs(policy, rollout) for view in views).sum(-1)
    found.sum().backward()
    assert found.isfinite().all() and found[1] < -500 and policy.table.grad.isfinite().all()


def test_what_has_no_law_is_refused_or_left_out():
    policy = TablePolicy(length=3, words=3, seed=6)
    rule = rules.SoftThreshold(tau=0.6)
    for rank in (rules.Confidence(), rules.RandomOrder(), rules.Margin(), rules.PlackettLuce(temperature=1.0)):
        with pytest.raises(ValueError, match=r"(commit=SoftThreshold|scores of PlackettLuce)"):
            sample(policy, 2, rank=rank, commit=rule)
    with pytest.raises(TypeError, match="'tau'"):
        rules.SoftThreshold()
    with pytest.raises(ValueError, match="commit=SoftThreshold, which reads uniforms: use Threshold"):
        sample(policy, 2, commit=rule, compile_step=True)
    with pytest.raises(ValueError, match=r"tau=1.0 must lie in \(0, 1\)"):
        rules.SoftThreshold(tau=1.0)
    rollout = sample(policy, 4, commit=rule)
    assert stayed_of(lik.Trajectory(num_segments=1).draw_views(rollout, GENERATOR)) is None
    assert stayed_of(lik.Trajectory().draw_views(rollout, GENERATOR)) is not None
    greedy = sample(policy, 2, commit=rule, temperature=0.0)
    assert greedy.order.logprobs is None and greedy.order.soft_threshold_params is None
