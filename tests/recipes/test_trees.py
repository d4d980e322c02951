"""Tree rollouts: the gradient and its variance by enumeration of all trees, and the law of the sampled ones."""

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from accelerate import Accelerator
from likelihood_toys import TablePolicy
from refusals import refused, refuses
from run_outputs import metrics_of
from tiny_recipe import with_changes

from dllm_rl import (
    BlockCache,
    Confidence,
    FixedLengthMean,
    LateSchedule,
    LeaveOneOut,
    MaxProb,
    PlackettLuce,
    PPOClip,
    Prompts,
    RandomOrder,
    Reinforce,
    Threshold,
    Trajectory,
    Unmask,
    tiny_masked_lm,
    train,
)
from dllm_rl.algorithms.losses import K3, policy_loss
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.step.samples import Samples
from dllm_rl.testing.enumeration import ToyPolicy, contributions, per_outcome
from dllm_rl.types.groups import equal_groups
from dllm_rl.types.scoring import Batch
from recipes.examples.trees import NodeAdvantages, Tree, recipe, tree

pytestmark = pytest.mark.usefixtures("no_rehearsal")

SETTINGS = {"max_new_tokens": 2, "diffusion_steps": 2, "temperature": 1.0, "rank": RandomOrder()}
TREE = Tree(**SETTINGS, branches=2, step=1)
ROWS = 4  # of a group: 2 roots x 2 branches, or a flat group


class Context:
    """What a feature reads of a step's context. The accelerator is made anew: other tests reset accelerate's state."""

    accelerator = property(lambda self: Accelerator(cpu=True))


CONTEXT = Context()


class Toy:
    """Two positions, written one a step in random order, with `words` words and a reward for each of their pairs.

    A path is (first position, its word, the other's word). `gradient` is that of the expected reward, by autograd of
    the sum over all paths, which knows nothing of likelihoods, views and losses of the library.
    """

    def __init__(self, seed, *, words=2, rewards=None):
        generator = torch.Generator().manual_seed(seed)
        self.policy = ToyPolicy(length=2, words=words, sharpness=1.0, generator=generator)
        for weight in self.policy.weights:
            weight.requires_grad_()
        drawn = torch.randn(words, words, generator=generator, dtype=torch.float64)
        self.rewards = drawn if rewards is None else torch.tensor(rewards, dtype=torch.float64)
        self.paths = list(product(range(2), range(words), range(words)))
        self.first, self.second = zip(*(self.chances(*path) for path in self.paths), strict=True)
        self.reward = torch.stack([self.rewards[self.tokens(*path)] for path in self.paths])
        chance = torch.stack(self.first) * torch.stack(self.second)
        expected = (chance * self.reward).sum()
        self.gradient = flat(torch.autograd.grad(expected, self.policy.weights, retain_graph=True))
        self.first, self.second = torch.stack(self.first).detach(), torch.stack(self.second).detach()

    def tokens(self, position, word, other):
        return (word, other) if position == 0 else (other, word)

    def chances(self, position, word, other):
        """The probability of the first step, and that of the second one."""
        hole = self.policy.words
        empty = self.policy.logits(torch.tensor([[hole, hole]]), None)[0, position, :hole].softmax(-1)
        canvas = [hole, hole]
        canvas[position] = word
        half = self.policy.logits(torch.tensor([canvas]), None)[0, 1 - position, :hole].softmax(-1)
        return empty[word] / 2, half[other]

    def trees(self):
        """Every tree of 2 roots x 2 branches: the four paths (N, 4) of each, and its probability (N,)."""
        blocks = [
            (a, b) for a, b in product(range(len(self.paths)), repeat=2) if self.paths[a][:2] == self.paths[b][:2]
        ]
        rows = torch.tensor([(*one, *two) for one, two in product(blocks, repeat=2)])
        return rows, (self.first[rows[:, ::2]] * self.second[rows].view(-1, 2, 2).prod(-1)).prod(-1)

    def flat_groups(self):
        rows = torch.tensor(list(product(range(len(self.paths)), repeat=ROWS)))
        return rows, (self.first * self.second)[rows].prod(-1)

    def estimates(self, rows, *, feature=None, weights=None, loss=Reinforce()):
        """The gradient (N, W) that the library's loss gives for each of N groups (N, 4), a step with one prompt each.

        feature  its token_advantages; None: the leave-one-out advantages of the rows
        weights  of a rollout's tokens, from the rollout; None: 1
        """
        path = rows.flatten()
        tokens = torch.tensor([self.tokens(*each) for each in self.paths])
        step = torch.tensor([[0, 1] if position == 0 else [1, 0] for position, *_ in self.paths])
        each = replace(self.policy.rollout(2).rows(torch.zeros(len(tokens), dtype=torch.long)), tokens=tokens)
        each = replace(each, unmask_step=step)
        logps = contributions(self.policy, each, Trajectory().draw_views(each, torch.Generator()), Trajectory())
        jacobian = per_outcome(self.policy, logps)  # (paths, 2, W)

        group, reward = equal_groups(len(rows), ROWS), self.reward[path]
        rollout = replace(each.rows(path), group=group)
        views = Trajectory().draw_views(rollout, torch.Generator())
        advantages = LeaveOneOut()(reward, group)
        ones = torch.ones(len(path), dtype=torch.float64)
        samples = Samples(rollout, group, reward, advantages, ones, counts=(len(path),))
        if feature is not None:
            advantages = feature.token_advantages(CONTEXT, samples, views)
        logps = logps.detach()[path]
        batch = Batch(
            rollout=rollout,
            views=views,
            advantages=advantages,
            old_logprobs=logps,
            old_view_logprobs=logps[None],
            importance_weights=torch.ones_like(logps) if weights is None else weights(rollout),
            loss_mask=rollout.completion_mask,
            reference_logprobs=None,
            num_tokens=2 * ROWS,  # of one group: each is a step by itself
            num_sequences=ROWS,
        )
        reduction = FixedLengthMean(length=1)  # the mean over rows of the sum over tokens
        _, _, slope = policy_loss(logps, batch, surrogate=loss, loss_reduction=reduction, beta=0.0, kl=K3())
        return -torch.einsum("nrt,nrtw->nw", slope.view(-1, ROWS, 2), jacobian[rows])


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).detach()


def mean_and_variance(estimates, chances):
    mean = chances @ estimates
    return mean, float(chances @ estimates.square().sum(-1) - mean.square().sum())


def early_half(rollout):
    return torch.where(rollout.unmask_step < TREE.step, 0.5, 1.0).double()


@pytest.mark.parametrize("loss", [Reinforce(), PPOClip()])
@pytest.mark.parametrize("words", [2, 3])
def test_the_expected_gradient_is_that_of_the_expected_reward(words, loss):
    toy = Toy(0, words=words)
    rows, chances = toy.trees()
    torch.testing.assert_close(chances.sum(), torch.ones(()).double(), rtol=0, atol=1e-12)
    mean = chances @ toy.estimates(rows, feature=NodeAdvantages(TREE), loss=loss)
    torch.testing.assert_close(mean, toy.gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("feature", "weights", "share"),
    [(NodeAdvantages(TREE), early_half, 1 / 2), (None, None, 2 / 3), (None, early_half, 1 / 3)],
    ids=["nodes, shared tokens counted once", "rows", "rows, shared tokens counted once"],
)
def test_other_advantages_and_weights_shrink_the_gradient_of_the_first_level(feature, weights, share):
    """A row's baseline has its sibling, whose reward the shared token causes too: a third of the gradient is lost."""
    toy = Toy(0)
    rows, chances = toy.trees()
    mean = chances @ toy.estimates(rows, feature=feature, weights=weights)
    shared = chances @ toy.estimates(
        rows, feature=NodeAdvantages(TREE), weights=lambda r: (r.unmask_step == 0).double()
    )
    torch.testing.assert_close(mean, toy.gradient - (1 - share) * shared, rtol=0, atol=1e-12)
    assert (mean - toy.gradient).norm() > 0.15 * toy.gradient.norm()


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize(
    ("seed", "of_trees", "of_flat"), [(0, 2.5162, 1.3658), (1, 1.0999, 0.3882), (2, 0.8114, 0.5955)]
)
def test_the_variance_of_trees_and_of_flat_groups(seed, of_trees, of_flat):
    """Trees have the larger variance. At equal forwards of the sampler they win on one toy of three, and on none if the
    two forwards a row of the learner count as well."""
    toy = Toy(seed)
    (rows, chances), (flat_rows, flat_chances) = toy.trees(), toy.flat_groups()
    _, tree = mean_and_variance(toy.estimates(rows, feature=NodeAdvantages(TREE)), chances)
    mean, independent = mean_and_variance(toy.estimates(flat_rows), flat_chances)
    torch.testing.assert_close(mean, toy.gradient, rtol=0, atol=1e-12)
    assert (tree, independent) == (pytest.approx(of_trees, abs=1e-4), pytest.approx(of_flat, abs=1e-4))

    sampler, flat_sampler = rows_run(TREE), rows_run(Unmask(**SETTINGS))
    learner = 2 * ROWS
    assert (sampler, flat_sampler) == (3, 5)
    assert (tree * sampler < independent * flat_sampler) == (seed == 2)
    assert tree * (sampler + learner) > independent * (flat_sampler + learner)


def rows_run(sampler):
    policy = TablePolicy(length=2, words=2, seed=0)
    sampler(policy, Prompts.from_ids([[3]], pad_id=policy.pad_id, num_generations=ROWS), torch.Generator())
    return sum(policy.forwards)


def test_node_advantages_by_hand():
    """Groups of 4 and 6 rows; a row without a reward counts in no mean."""
    nan = math.nan
    reward = torch.tensor([1.0, 0.0, 4.0, 2.0, 1.0, nan, 0.0, 3.0, 2.0, 2.0])
    group = torch.tensor([0] * 4 + [1] * 6)
    step = torch.tensor([0, 1]).expand(10, 2)
    policy = TablePolicy(length=2, words=2, seed=0)
    rollout = policy.rollout(torch.zeros(10, 2, dtype=torch.long), prompt=0, unmask_step=step, group=group)
    samples = Samples(rollout, group, reward, LeaveOneOut()(reward, group), torch.ones(10), counts=(10,))
    found = NodeAdvantages(TREE).token_advantages(CONTEXT, samples, None)
    assert found[:, 0].tolist() == [-2.5, -2.5, 2.5, 2.5, -0.75, -0.75, 0.0, 0.0, 0.75, 0.75]
    assert found[:, 1].tolist() == [1.0, -1.0, 2.0, -2.0, 0.0, 0.0, -3.0, 3.0, 0.0, 0.0]


def after_a_step(policy, rank, state, count):
    """Every state (tokens, steps) that the next step can make of a state in which `count` positions are due."""
    tokens, steps = state
    masked = [i for i, token in enumerate(tokens) if token == policy.mask_id]
    if isinstance(rank, RandomOrder):
        chosen = list(combinations(masked, count))
    else:
        canvas = sum(token * (policy.words + 1) ** i for i, token in enumerate(tokens))
        confidence = policy.table[canvas, :, : policy.words + 1].log_softmax(-1).amax(-1)
        chosen = [tuple(sorted(masked, key=lambda i: -float(confidence[i]))[:count])]
    for positions in chosen:
        for words in product(range(policy.words), repeat=count):
            after, when = list(tokens), list(steps)
            for i, word in zip(positions, words, strict=True):
                after[i], when[i] = word, max(steps) + 1
            chance = math.exp(sum(policy.logp(after, {*masked}, i) for i in positions))
            yield (tuple(after), tuple(when)), chance / len(chosen)


def after_steps(policy, rank, state, counts):
    states = {state: 1.0}
    for count in counts:
        found = Counter()
        for each, chance in states.items():
            for after, given in after_a_step(policy, rank, each, count):
                found[after] += chance * given
        states = found
    return states


@pytest.mark.parametrize(
    ("counts", "step"), [((1, 1, 1), 1), ((1, 1, 1), 2), ((2, 2), 1)], ids=["1 of 3", "2 of 3", "1 of 2"]
)
@pytest.mark.parametrize("rank", [RandomOrder(), MaxProb()])
@pytest.mark.parametrize("infill", [False, True])
@pytest.mark.repeated(every=4)
def test_the_law_of_a_tree_is_that_of_unmask(infill, rank, counts, step):
    """Chi-square of whole trees, of one root and two branches: the rows have the law of `Unmask`, and are independent
    once they have branched."""
    length, draws = sum(counts), 5000
    policy = TablePolicy(length=length, words=2, seed=1, scale=0.5)
    hole = policy.mask_id
    settings = {"temperature": 1.0, "rank": rank, "suppress": (3, 4), "diffusion_steps": len(counts)}
    tree = Tree(**settings, max_new_tokens=0 if infill else length, branches=2, step=step)
    ids = [[3, *[hole] * length] if infill else [3]] * draws
    prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, num_generations=2, mask_id=hole if infill else None)
    rollout = tree(policy, prompts, torch.Generator().manual_seed(0))

    empty = ((hole,) * length, (-1,) * length)
    expected = {
        (one, two): chance * first * second
        for root, chance in after_steps(policy, rank, empty, counts[:step]).items()
        for (one, first), (two, second) in product(after_steps(policy, rank, root, counts[step:]).items(), repeat=2)
    }
    assert sum(expected.values()) == pytest.approx(1, abs=1e-6)
    states = [
        (tuple(tokens), tuple(steps))
        for tokens, steps in zip(rollout.tokens[:, 1:].tolist(), rollout.unmask_step[:, 1:].tolist(), strict=True)
    ]
    found = Counter(zip(states[::2], states[1::2], strict=True))
    assert found.keys() <= expected.keys()
    likely = [pair for pair, chance in expected.items() if chance * draws >= 5]
    rest = 1 - sum(expected[pair] for pair in likely), draws - sum(found[pair] for pair in likely)
    cells = [(expected[pair], found[pair]) for pair in likely] + ([rest] if rest[0] > 1e-6 else [])
    statistic = sum((count - chance * draws) ** 2 / (chance * draws) for chance, count in cells)
    freedom = len(cells) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.fixture(scope="module")
def policy():
    return tiny_masked_lm(characters="123=", hidden_size=32, num_layers=1, head_std=0.3)


def sample(policy, *, infill=False, rows=None, **changes):
    ids = [[3, 1, 6, 1, 1, 4], [1, 5, 1, 1]] if infill else [[3, 4, 6], [5]]
    numbers = {"pad_id": policy.pad_id, "num_generations": [4, 6], "mask_id": 1 if infill else None}
    prompts = Prompts.from_ids(ids, **numbers, seeds=range(10))
    length = 0 if infill else 4
    tree = Tree(
        **{"max_new_tokens": length, "temperature": 1.0, "rank": RandomOrder(), "branches": 2, "step": 1} | changes
    )
    return tree(policy, prompts if rows is None else prompts.rows(rows), torch.Generator())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": MaxProb(), "step": 2, "diffusion_steps": 3},
        {"rank": MaxProb(), "commit": LateSchedule(), "diffusion_steps": 3},
        {"top_p": 0.7, "top_k": 3, "temperature": 0.8, "suppress": (0, 2)},
        {"infill": True},
        {"infill": True, "diffusion_steps": 2, "rank": MaxProb()},
    ],
)
def test_recorded_logprobs_are_those_of_the_replay(policy, changes):
    rollout = sample(policy, **changes)
    assert rollout.order.probability in ("deterministic", "independent")
    for likelihood in (Trajectory(include_order=False), Trajectory()):
        scores = likelihood.logprobs(policy, rollout, likelihood.draw_views(rollout, torch.Generator()))
        torch.testing.assert_close(scores, rollout.logprobs, rtol=0, atol=1e-5)
    assert not (rollout.tokens == policy.spec.mask_id).any()
    assert (rollout.completion_mask == (rollout.unmask_step >= 0)).all()


def test_rows_of_a_block_share_the_steps_before_the_branch_and_no_other_row_matters(policy):
    rollout = sample(policy, step=2)
    blocks = [field.unflatten(0, (5, 2)) for field in (rollout.tokens, rollout.unmask_step, rollout.logprobs)]
    shared = (blocks[1] < 2) & (blocks[1] >= 0)
    assert shared.sum(-1).eq(2).all()
    for field in blocks:
        assert (field[:, 0] == field[:, 1])[shared[:, 0]].all()
    assert (blocks[0][:, 0] != blocks[0][:, 1]).any()
    assert rollout.group.tolist() == [0] * 4 + [1] * 6
    assert rollout.forwards == 4 and rollout.loss_weights is None
    alone = sample(policy, step=2, rows=torch.arange(4, 10))
    assert torch.equal(alone.tokens, rollout.tokens[4:]) and torch.equal(alone.unmask_step, rollout.unmask_step[4:])


test_what_a_tree_cannot_do_is_refused = refused(
    ({"branches": 4}, r"branches=4 must divide the size of each group; the sizes are \[4, 6\]"),
    ({"branches": 1}, "branches=1 must be at least 2"),
    ({"diffusion_steps": 2, "step": 2}, "step=2 must be below diffusion_steps=2"),
    ({"step": 4}, "step=4: a completion has no more steps"),
    ({"infill": True, "step": 3}, "step=3: a completion has no more steps"),
    ({"block_size": 2}, "block_size=2: a tree is sampled without"),
    ({"cache": BlockCache()}, "leave cache out"),
    ({"compile_step": True}, "leave compile_step out"),
    ({"rank": Confidence()}, "rank=Confidence with commit=Schedule: a tree needs an order"),
    ({"rank": PlackettLuce(temperature=1.0)}, "rank=PlackettLuce"),
    ({"rank": MaxProb(), "commit": Threshold(tau=0.9)}, "commit=Threshold: a tree needs"),
    by=lambda changes, policy: sample(policy, **changes),
)


def test_a_model_that_does_not_see_both_sides_is_refused(policy):
    other = tiny_llama(characters="123=", causal=True, hidden_size=32, num_layers=1)
    refuses("a tree needs full attention, and the policy's is 'causal'", lambda: sample(other))


@pytest.mark.slow
def test_a_run_trains_with_the_advantages_of_the_nodes(tmp_path):
    short = with_changes(recipe, num_steps=1, train_batch_size=2, eval_task=recipe.task, eval_steps=0)
    seen = {}
    for name, features in {"nodes": (NodeAdvantages(tree),), "rows": ()}.items():
        train(replace(short, output_dir=str(tmp_path / name)), features=features)
        (seen[name],) = metrics_of(tmp_path / name)
    assert seen["nodes"]["reward"] == seen["rows"]["reward"]
    assert seen["nodes"]["rollout_corr/abs_log_ratio_max"] < 1e-5
    assert seen["nodes"]["grad_norm"] != pytest.approx(seen["rows"]["grad_norm"], rel=1e-2)
