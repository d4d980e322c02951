"""The records that flow, by hand: padding on either side, rows that are taken, replaced and not scored."""

from dataclasses import dataclass, replace

import pytest
import torch
from jaxtyping import Float
from refusals import refuses
from torch import Tensor

from dllm_rl.types.groups import any_in_group, equal_groups, group_numbers, group_sizes, starts_group
from dllm_rl.types.rollouts import Order, Prompts, Rollout, SamplingParams, pack_groups
from dllm_rl.types.scoring import Views, ViewTensors


def rollout(tokens: list[list[int]], *, forwards: int = 1) -> Rollout:
    """The last two columns are the completion; log-probs are the tokens, negated."""
    ids = torch.tensor(tokens)
    completion = torch.zeros_like(ids, dtype=torch.bool)
    completion[:, -2:] = True
    return Rollout(
        tokens=ids,
        attention_mask=torch.ones_like(completion),
        completion_mask=completion,
        unmask_step=torch.where(completion, 0, -1),
        logprobs=torch.where(completion, -ids, 0).float(),
        group=torch.arange(len(ids)),
        forwards=forwards,
    )


def test_prompts_are_padded_on_the_left():
    prompts = Prompts.from_ids([[3, 4, 5], [6], [7, 8]], pad_id=9)
    assert prompts.tokens.tolist() == [[3, 4, 5], [9, 9, 6], [9, 7, 8]]
    assert prompts.attention_mask.tolist() == [[True, True, True], [False, False, True], [False, True, True]]


@pytest.mark.parametrize(("right", "tokens"), [(False, [[9, 9, 3, 4, 5]]), (True, [[3, 4, 5, 9, 9]])])
def test_a_rollout_is_padded_on_the_side_that_is_asked_for(right, tokens):
    wide = rollout([[3, 4, 5]]).padded(2, pad_id=9, right=right)
    there = torch.tensor(tokens) != 9
    assert wide.tokens.tolist() == tokens and torch.equal(wide.attention_mask, there)
    assert wide.completion_mask.sum() == 2 and wide.unmask_step[~there].tolist() == [-1, -1]
    assert torch.equal(wide.logprobs, torch.where(wide.completion_mask, -wide.tokens, 0).float())


def test_rows_are_replaced_by_those_of_another_in_their_order():
    old, new = rollout([[1, 2], [3, 4], [5, 6]], forwards=3), rollout([[0, 7, 8], [0, 9, 10]], forwards=4)
    both = old.replace_rows(torch.tensor([2, 0]), new, pad_id=0)
    assert both.tokens.tolist() == [[0, 9, 10], [0, 3, 4], [0, 7, 8]]
    assert both.logprobs.tolist() == [[0, -9, -10], [0, -3, -4], [0, -7, -8]]
    assert both.attention_mask.tolist() == [[True] * 3, [False, True, True], [True] * 3] and both.forwards == 7


def test_groups_of_rows():
    """The rows of a group are adjacent; its number says nothing else."""
    group = torch.tensor([4, 4, 4, 0, 7, 7])
    assert starts_group(group).tolist() == [True, False, False, True, True, False]
    assert group_numbers(group).tolist() == [0, 0, 0, 1, 2, 2] and group_sizes(group) == [3, 1, 2]
    assert equal_groups(2, 3).tolist() == [0, 0, 0, 1, 1, 1]
    flags = torch.tensor([False, False, True, True, False, False])
    assert any_in_group(flags, group).tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize(
    ("size", "packed"),
    [
        (None, [[0, 1, 2, 3, 4, 5]]),
        (6, [[0, 1, 2, 3, 4, 5]]),
        (4, [[0, 1, 2, 3], [4, 5]]),
        (3, [[0, 1, 2], [3, 4, 5]]),
        (2, [[0, 1], [2, 3], [4, 5]]),  # only a group that is larger is split
        (1, [[0], [1], [2], [3], [4], [5]]),
    ],
)
def test_batches_hold_whole_groups(size, packed):
    found = pack_groups(torch.arange(6), torch.tensor([4, 4, 4, 0, 7, 7]), size)
    assert [batch.tolist() for batch in found] == packed
    assert pack_groups(torch.arange(0), torch.arange(0), size) == []


def test_prompts_have_a_row_for_each_completion():
    """As many of each prompt as it says, and a row's seed stays its own in a batch."""
    prompts = Prompts.from_ids([[3, 4], [5], [6, 7]], pad_id=9, num_generations=[3, 1, 2], seeds=range(6))
    assert prompts.tokens.tolist() == [[3, 4]] * 3 + [[9, 5]] + [[6, 7]] * 2
    assert prompts.group.tolist() == [0, 0, 0, 1, 2, 2] and prompts.lengths == [2, 2, 2, 1, 2, 2]
    batches = prompts.split(4)
    assert [batch.seeds.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    assert [batch.group.tolist() for batch in batches] == [[0, 0, 0, 1], [2, 2]]
    refuses("rows=4: every row needs a seed", lambda: Prompts.from_ids([[3]], pad_id=9).split(4))
    for wrong in (0, [1, 2], [1, 0, 2]):
        with pytest.raises(ValueError, match="must be at least 1, for each of 3 prompts"):
            Prompts.from_ids([[3], [4], [5]], pad_id=9, num_generations=wrong)
    with pytest.raises(ValueError, match="seeds has 3 entries; 4 rows of 2 prompts need one each"):
        Prompts.from_ids([[3], [4]], pad_id=9, num_generations=2, seeds=range(3))


def test_groups_of_rollouts_stay_apart_when_they_are_put_together():
    first, second = rollout([[1, 2], [3, 4], [5, 6]]), rollout([[7, 8], [9, 10]])
    first, second = replace(first, group=torch.tensor([5, 5, 2])), replace(second, group=torch.tensor([2, 2]))
    assert Rollout.concatenate([first, second], pad_id=0).group.tolist() == [0, 0, 1, 2, 2]
    assert first.replace_rows(torch.tensor([2, 0]), second, pad_id=0).group.tolist() == [5, 5, 2]


def test_rollouts_of_different_settings_are_not_put_together():
    """Scoring would take the first one's temperature, steps or rank for all rows."""
    zeros = torch.zeros(2, 2, dtype=torch.long)
    plain = replace(rollout([[1, 2], [3, 4]]), order=Order(zeros, rank_name="MaxProb"))
    older = replace(plain, weights_version=plain.weights_version - 1, forwards=3)
    assert Rollout.concatenate([plain, older], pad_id=0).weights_version == older.weights_version
    for other, message in (
        (replace(plain, sampling_params=SamplingParams(temperature=0.5)), "^Rollout.sampling_params is "),
        (replace(plain, order=Order(zeros, rank_name="Entropy")), "Order.rank_name is MaxProb in some rows"),
    ):
        with pytest.raises(ValueError, match=message):
            Rollout.concatenate([plain, plain, other], pad_id=0)
        with pytest.raises(ValueError, match=message):
            plain.replace_rows(torch.tensor([0, 1]), other, pad_id=0)


@dataclass(frozen=True)
class PerRow(ViewTensors):
    values: Float[Tensor, " B"]


def test_masks_of_rows_and_rows_that_are_not_scored():
    """Two views of three rows; no view scores the last."""
    weight = torch.tensor([[[0.0, 2.0], [0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, 0.0], [0.0, 0.0]]])
    noise = Views(weight != 0, weight, features=(PerRow(torch.tensor([0.25, 0.5, 0.75])),))
    assert noise.scored(torch.ones(3, 2, dtype=torch.bool)).tolist() == [[True, True], [True, True], [False, False]]
    taken = noise.rows(torch.tensor([1, 0]))
    assert taken.coefficients.tolist() == [[[0, 0], [0, 2]], [[3, 0], [0, 0]]]
    assert torch.equal(taken.masked, taken.coefficients != 0) and taken.features[0].values.tolist() == [0.5, 0.25]
    only = noise.restrict_to_rows(torch.tensor([True, False, True]))
    assert only.coefficients.tolist() == [[[0, 2], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]]]
    assert torch.equal(only.masked, noise.masked) and only.features == noise.features


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.5, float("nan")])
def test_a_top_p_that_keeps_nothing_or_more_than_all_is_refused(top_p):
    SamplingParams(top_p=1.0)
    refuses(r"must lie in \(0, 1\]", lambda: SamplingParams(top_p=top_p))


def test_open_positions_of_prompts():
    """By an id, or by bools; none is None. Padding is not open, and rows take theirs along."""
    ids = [[3, 1, 5], [6], [8, 1]]
    opened = [[False, True, False], [False, False, False], [False, False, True]]
    prompts = Prompts.from_ids(ids, pad_id=1, num_generations=2, seeds=range(6), mask_id=1)
    assert prompts.infill_mask[::2].tolist() == prompts.infill_mask[1::2].tolist() == opened
    assert prompts.seeds.tolist() == list(range(6))
    bools = [[False, True, False], [False], [False, True]]
    assert Prompts.from_ids(ids, pad_id=1, open_positions=bools).infill_mask.tolist() == opened
    assert (
        Prompts.from_ids(ids, pad_id=1).infill_mask is None
        and Prompts.from_ids(ids, pad_id=0, mask_id=9).infill_mask is None
    )
    assert [part.infill_mask[::2].tolist() for part in prompts.split(4)] == [opened[:2], opened[2:]]
    refuses("give one of them", lambda: Prompts.from_ids(ids, pad_id=1, mask_id=1, open_positions=bools))
    with pytest.raises(ValueError, match="one bool for each token id of each prompt"):
        Prompts.from_ids(ids, pad_id=1, open_positions=bools[:2])
    with pytest.raises(ValueError, match="one bool for each token id of each prompt"):
        Prompts.from_ids(ids, pad_id=1, open_positions=[[True], *bools[1:]])
