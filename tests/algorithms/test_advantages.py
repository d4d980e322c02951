"""Advantages against values worked by hand."""

import math
from functools import partial

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from dllm_rl.algorithms.advantages import (
    Advantages,
    Decoupled,
    GroupRelative,
    LeaveOneOut,
    has_unequal_rewards,
    to_groups,
    to_rows,
)
from dllm_rl.records import fit, subclasses
from dllm_rl.types.groups import equal_groups

# Two groups of three. Means 2 and 5; centered (-1, 0, 1) and (-4, 0, 4); sample std 1 and sqrt(32/2) = 4.
REWARDS = tensor([[1.0, 2.0, 3.0], [1.0, 5.0, 9.0]])


def grouped(advantages, rewards, **parts):
    """The advantages of groups of equal size, one row per group like the rewards."""
    parts = {name: x.flatten(1) if name == "parts" else x for name, x in parts.items()}
    return advantages(rewards.flatten(), equal_groups(*rewards.shape), **parts).view_as(rewards)


def has_unequal(rewards):
    """The same of groups of equal size, one row per group."""
    return has_unequal_rewards(rewards.flatten(0, 1), equal_groups(*rewards.shape[:2])).tolist()


def test_mean_only():
    assert_close(grouped(GroupRelative(scale_rewards="none"), REWARDS), tensor([[-1.0, 0.0, 1.0], [-4.0, 0.0, 4.0]]))


def test_divided_by_each_groups_sample_deviation():
    expected = tensor([[-1 / 1.0001, 0, 1 / 1.0001], [-4 / 4.0001, 0, 4 / 4.0001]])
    assert_close(grouped(GroupRelative(), REWARDS), expected, rtol=1e-6, atol=0)


def test_divided_by_the_batchs_sample_deviation():
    # All six: mean 3.5, squares 6.25 + 2.25 + 0.25 + 6.25 + 2.25 + 30.25 = 47.5, sample variance 47.5 / 5 = 9.5.
    scale = math.sqrt(9.5) + 1e-4
    expected = tensor([[-1.0, 0.0, 1.0], [-4.0, 0.0, 4.0]]) / scale
    assert_close(grouped(GroupRelative(scale_rewards="batch"), REWARDS), expected, rtol=1e-6, atol=0)


def test_leave_one_out():
    # Others' means: 2.5, 2, 1.5 and 7, 5, 3.
    assert_close(grouped(LeaveOneOut(), REWARDS), tensor([[-1.5, 0.0, 1.5], [-6.0, 0.0, 6.0]]))


def alone(rewards, group):
    return Decoupled()(rewards, group, parts=rewards[None], weights=torch.ones(1))


EVERY = [GroupRelative(scale_rewards=by) for by in ("group", "batch", "none")] + [LeaveOneOut(), alone]


@pytest.mark.parametrize("advantages", EVERY)
def test_a_group_of_one_and_a_group_of_equal_rewards_teach_nothing(advantages):
    assert torch.equal(grouped(advantages, tensor([[3.0], [7.0]])), torch.zeros(2, 1))
    assert torch.equal(grouped(advantages, tensor([[2.0, 2.0, 2.0]])), torch.zeros(1, 3))


@pytest.mark.parametrize("advantages", EVERY)
def test_equal_rewards_whose_mean_is_rounded_teach_nothing(advantages):
    rewards = torch.full((1, 8), 1.2)
    assert (rewards - rewards.mean(-1, keepdim=True)).abs().min() > 0, "fp32 rounds this mean"
    assert torch.equal(grouped(advantages, rewards), torch.zeros(1, 8))
    # Beside a group that differs, which keeps its advantages: (1, 3) about 2.
    found = grouped(advantages, torch.cat([rewards, tensor([[1.0, 3.0] * 4])]))
    assert torch.equal(found[0], torch.zeros(8))
    assert (found[1, ::2] < 0).all() and torch.equal(found[1, ::2], -found[1, 1::2])


def test_every_public_function_of_the_module_is_among_these():
    tested = {type(advantages).__name__ for advantages in EVERY if isinstance(advantages, Advantages)}
    assert subclasses(Advantages).keys() - {"FunctionAdvantages", "Decoupled"} == tested


def test_a_single_reward_in_the_whole_batch():
    assert torch.equal(grouped(GroupRelative(scale_rewards="batch"), tensor([[3.0]])), torch.zeros(1, 1))


@pytest.mark.parametrize("by", ["group", "batch"])
def test_a_normalizer_of_zero_and_eps_of_zero(by):
    """Equal rewards, one completion, rewards so small that their squares are 0 in fp32: never 0 / 0 or x / 0."""
    scaled = partial(grouped, GroupRelative(scale_rewards=by, eps=0.0))
    assert torch.equal(scaled(torch.ones(2, 3)), torch.zeros(2, 3))
    assert torch.equal(scaled(tensor([[3.0]])), torch.zeros(1, 1))
    half = 1 / math.sqrt(2)
    for small in (1e-30, 1e-38, 1e37):
        assert_close(scaled(tensor([[small, 2 * small]])), tensor([[-half, half]]))
    mixed = scaled(tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert torch.equal(mixed[0], torch.zeros(2)) and mixed.isfinite().all() and mixed[1, 1] > 0


def test_decoupled_with_eps_of_zero():
    weights, nan, half = torch.ones(2), math.nan, 1 / math.sqrt(2)
    bare = partial(grouped, Decoupled(eps=0.0))
    opposed = tensor([[0.1, 0.7, 0.3]])  # two rewards whose sum is rounding alone
    for parts in (
        torch.ones(2, 2, 3),
        torch.stack([opposed, 1 - opposed]),
        tensor([[[nan, nan, nan]], [[nan, 1.0, nan]]]),
    ):
        assert torch.equal(bare(parts[0], parts=parts, weights=weights), torch.zeros_like(parts[0]))
    parts = tensor([[[1e-30, 2e-30, nan]], [[5.0, 5.0, 5.0]]])  # z = (-1, 1, 0) / sqrt 2, over its deviation 1 / sqrt 2
    total = parts.nan_to_num().sum(0)  # the second reward applies to all three
    assert_close(bare(total, parts=parts, weights=weights), tensor([[-1.0, 1.0, 0.0]]) * half / half)
    assert torch.equal(bare(parts[0], parts=parts, weights=torch.zeros(2)), torch.zeros(1, 3))


def test_unknown_scaling_is_an_error():
    with pytest.raises(ValueError, match="scale_rewards='rows' must be"):
        GroupRelative(scale_rewards="rows")


def test_informative_groups():
    rewards = tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    assert has_unequal(rewards) == [False, True, True]
    assert has_unequal(tensor([[1.0]])) == [False]


def test_decoupled_by_hand():
    """Two prompts, two completions, two rewards of 0 or 1. In the first group only reward 1 tells them apart, in the
    second both do: z = 1/sqrt 2 for each that does, s = (-a, a) and (-2a, 2a) with a = 1/sqrt 2, whose sample variance
    is 10 a^2 / 3 = 5/3; so A = +-a sqrt(3/5) = +-sqrt(0.3), and twice that. The sum's own normalization sees no more in
    the second group than in the first."""
    parts = tensor([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])
    unit = math.sqrt(0.3)
    expected = tensor([[-unit, unit], [-2 * unit, 2 * unit]])
    assert_close(grouped(Decoupled(eps=1e-12), parts.sum(0), parts=parts, weights=torch.ones(2)), expected)
    alone = grouped(GroupRelative(eps=0.0), parts.sum(0))
    assert_close(alone[0], alone[1])


def test_decoupled_weighs_what_is_normalized():
    """A reward of another scale counts by its weight alone: reward 2 is a thousand times as large, and weighs a third.
    s = z_1 + z_2 / 3 with z_1 = (-a, a), z_2 = (a, -a) in one group: 2/3 (-a, a), of sample standard deviation 2/3."""
    parts = tensor([[[0.0, 1.0]], [[1000.0, 0.0]]])
    found = grouped(Decoupled(eps=1e-12), parts.sum(0), parts=parts, weights=tensor([1.0, 1 / 3]))
    assert_close(found, tensor([[-1.0, 1.0]]) / math.sqrt(2))


def test_decoupled_takes_sample_deviations_of_as_many_as_there_are():
    """Rewards (0, 1, none) and (-1, 0, 1) of one group: z = (-a, a, 0), a = 1/sqrt 2, and (-1, 0, 1)."""
    parts, a = tensor([[[0.0, 1.0, float("nan")]], [[-1.0, 0.0, 1.0]]]), 1 / math.sqrt(2)
    total = tensor([[-1 - a, a, 1.0]])
    expected = total / math.sqrt(((1 + a) ** 2 + a**2 + 1) / 2)
    assert_close(grouped(Decoupled(eps=1e-12), total, parts=parts, weights=torch.ones(2)), expected)


def test_decoupled_leaves_out_what_does_not_apply_and_what_is_equal():
    nan = float("nan")
    parts = tensor([[[0.0, 1.0, nan], [0.1, 0.1, 0.1]], [[nan, nan, nan], [0.7, nan, nan]]])
    found = grouped(Decoupled(eps=1e-12), parts.nan_to_num().sum(0), parts=parts, weights=torch.ones(2))
    # One pair in six places: +-1/sqrt 2 over the sample standard deviation sqrt((1/2 + 1/2) / 5).
    assert_close(found, tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]) * math.sqrt(5 / 2))
    assert (found[1] == 0).all()


@pytest.mark.parametrize(
    ("rewards", "differ"),
    [
        ([0.3, 0.1 + 0.2], False),  # a weighted sum, added up in another order
        ([0.9, 0.7 + 0.1 + 0.1], False),
        ([-1e6 - 0.01, -1e6 - 0.02], True),  # equal in fp32
        ([1e-30, 2e-30], True),
        ([0.0, -0.0], False),
        ([torch.nan, torch.nan], False),
    ],
)
def test_rewards_in_fp64_are_equal_up_to_rounding(rewards, differ):
    rewards, group = torch.tensor(rewards, dtype=torch.float64), torch.tensor([0, 0])
    assert has_unequal_rewards(rewards, group).tolist() == [differ]
    advantages = GroupRelative(eps=0)(rewards, group)
    assert advantages.dtype == torch.float64 and bool(advantages.any()) == differ


def test_a_group_is_informative_where_any_reward_tells_completions_apart():
    same_sum = tensor(
        [[[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], [[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]]
    )  # value, and two rewards
    assert has_unequal(same_sum) == [True, False] and has_unequal(same_sum[..., 0]) == [False, False]


def test_nan_is_never_taken_for_a_number():
    """A reward that does not apply tells nothing apart from those that do, and has no advantage."""
    nan = float("nan")
    parts = tensor([[[1.0, nan], [1.0, 0.5], [1.0, 0.5]], [[1.0, nan], [1.0, 0.5], [1.0, 0.2]]])
    assert has_unequal(parts) == [False, True]
    assert has_unequal(tensor([[nan, 1.0, 1.0], [nan, nan, nan]])) == [False, False]
    for function in (GroupRelative(), LeaveOneOut()):
        assert not function(tensor([nan, 1.0, 1.0]), torch.zeros(3).long()).any()
        assert not function(tensor([nan, nan]), torch.zeros(2).long()).any()


def test_a_class_that_says_so_takes_each_reward_separately():
    class Separate(Advantages):
        takes_component_rewards = True

        def __call__(self, rewards, group, *, parts, weights):
            return (weights[:, None] * parts).sum(0)

    class Total(Advantages):
        def __call__(self, rewards, group):
            return rewards

    def takes_components(advantages):
        return fit("advantages", Advantages, advantages).takes_component_rewards

    assert takes_components(Separate()) and takes_components(Decoupled(eps=0.1))
    assert not takes_components(Total()) and not takes_components(GroupRelative())
    assert not takes_components(torch.zeros_like) and not takes_components(partial(Total()))


NAN = math.nan
ADVANTAGES = [GroupRelative(), GroupRelative(scale_rewards="none"), GroupRelative(eps=0.0)]


@pytest.mark.parametrize("advantages", [*ADVANTAGES, LeaveOneOut()])
@pytest.mark.parametrize(
    "row", [[1.0, NAN, 5.0, 9.0], [NAN, NAN, 0.1, 0.2], [-3e30, 1e30, NAN], [NAN, 2.0, 2.0], [NAN, 7]]
)
def test_a_completion_without_a_reward_is_as_if_it_had_not_been_sampled(advantages, row):
    rewards, group = tensor(row), torch.zeros(len(row)).long()
    has_reward = ~rewards.isnan()
    found = advantages(rewards, group)
    assert_close(found[has_reward], advantages(rewards[has_reward], group[has_reward]), rtol=1e-6, atol=0)
    assert not found[~has_reward].any()


def test_a_group_without_rewards_has_no_advantage_and_changes_no_other():
    rewards = torch.cat([REWARDS, tensor([[NAN, NAN, NAN]])])
    for advantages in (*ADVANTAGES, LeaveOneOut(), GroupRelative(scale_rewards="batch")):
        found = grouped(advantages, rewards)
        assert_close(found[:2], grouped(advantages, REWARDS), rtol=1e-6, atol=0)
        assert not found[2].any()


def test_the_batchs_deviation_is_that_of_the_rewards_that_there_are():
    """1, 3 and 1, 9, 5 with mean 3.8: squares 7.84, 0.64, 7.84, 27.04, 1.44 are 44.8, and 44.8 / 4 = 11.2."""
    found = grouped(GroupRelative(scale_rewards="batch"), tensor([[1.0, NAN, 3.0], [1.0, 9.0, 5.0]]))
    assert_close(found, tensor([[-1.0, 0.0, 1.0], [-4.0, 4.0, 0.0]]) / (math.sqrt(11.2) + 1e-4), rtol=1e-6, atol=0)


def test_each_reward_may_be_missing_for_a_completion():
    parts = tensor([[[1.0, NAN, 3.0]], [[2.0, NAN, 6.0]]])
    found = grouped(Decoupled(), tensor([[3.0, NAN, 9.0]]), parts=parts, weights=torch.ones(2))
    assert found[0, 1] == 0 and found[0, 0] == -found[0, 2] != 0


@pytest.mark.parametrize("missing", [[[NAN] * 4, [NAN] * 4], [[0.5, 9.0, 2.0, 2.0], [NAN, 1.0, NAN, NAN]]])
def test_completions_without_a_reward_are_in_no_deviation(missing):
    """Two of three groups as if they were all: whatever the third one's rewards are, it has no total."""
    parts = tensor([[[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]], [[0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.1, 0.1]]])
    alone = grouped(Decoupled(), parts.sum(0), parts=parts, weights=torch.ones(2))
    more = torch.cat([parts, tensor(missing)[:, None]], dim=1)
    total = torch.cat([parts.sum(0), torch.full((1, 4), NAN)])
    found = grouped(Decoupled(), total, parts=more, weights=torch.ones(2))
    assert_close(found, torch.cat([alone, torch.zeros(1, 4)]))


def test_groups_of_different_sizes():
    """Each group's advantages are those that it has alone; group numbers say only which rows belong together."""
    rewards, group = tensor([1.0, 2.0, 3.0, 4.0, 1.0, 5.0]), tensor([7, 7, 7, 2, 9, 9])
    assert_close(GroupRelative(scale_rewards="none")(rewards, group), tensor([-1.0, 0.0, 1.0, 0.0, -2.0, 2.0]))
    assert_close(LeaveOneOut()(rewards, group), tensor([-1.5, 0.0, 1.5, 0.0, -4.0, 4.0]))
    std = math.sqrt(8) + 1e-4
    expected = tensor([-1 / 1.0001, 0.0, 1 / 1.0001, 0.0, -2 / std, 2 / std])
    assert_close(GroupRelative()(rewards, group), expected)
    # Mean 8/3; squares 25/9, 4/9, 1/9, 16/9, 25/9, 49/9 are 120/9, over 5.
    by_batch = GroupRelative(scale_rewards="batch")(rewards, group)
    assert_close(by_batch, tensor([-1.0, 0.0, 1.0, 0.0, -2.0, 2.0]) / (math.sqrt(120 / 45) + 1e-4))
    # z = (-1, 0, 1), 0 and (-a, a) with a = 1/sqrt 2: a sum of squares of 3, over 5.
    half = 1 / math.sqrt(2)
    decoupled = Decoupled(eps=1e-12)(rewards, group, parts=rewards[None], weights=torch.ones(1))
    assert_close(decoupled, tensor([-1.0, 0.0, 1.0, 0.0, -half, half]) / math.sqrt(3 / 5))
    assert has_unequal_rewards(rewards, group).tolist() == [True, False, True]
    matrix = to_groups(rewards, group)
    assert_close(matrix, tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN], [1.0, 5.0, NAN]]), equal_nan=True)
    assert torch.equal(to_rows(matrix, group), rewards)
