"""Ranks, strata and choices that masks are made of."""

from dataclasses import replace

import torch

from dllm_rl.likelihoods.masks import (
    coupled_views,
    ranks,
    row_generators,
    uniform_index,
    uniforms_per_row,
)
from dllm_rl.types.rollouts import Rollout


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_ties_in_rank_go_left_to_right_and_strata_are_strata():
    assert ranks(torch.tensor([[0.5, 0.5, 0.1, torch.inf]])).tolist() == [[1, 2, 0, 3]]
    u = uniforms_per_row([seeded(0), seeded(1)], 4, stratified=True, device="cpu")
    assert (u[..., 0] * 4).long().tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_a_stratified_uniform_that_rounds_to_one_chooses_the_last():
    """(j + u) / N is 1 for the last stratum and the largest u below 1: there is no place beyond the last."""
    u = torch.tensor([[0.0], [0.5], [1.0], [1.0]], dtype=torch.float64)
    assert (1 + torch.tensor(1 - 2**-53, dtype=torch.float64)) / 2 == 1
    assert uniform_index(u, torch.tensor([[3], [3], [3], [0]])).tolist() == [[0], [1], [2], [0]]


def test_coupled_views_worked_by_hand():
    """Three tokens, one masked: weight (3 + 1) / (2 * 1) there, (3 + 1) / (2 * 2) on the two others."""
    inside = torch.tensor([[True, True, True, False]])
    (first, first_weight), (second, second_weight) = coupled_views(
        inside, torch.tensor([[0.7, 0.1, 0.4, 0.0]]), torch.tensor([[1]])
    )
    assert first.tolist() == [[False, True, False, False]] and second.tolist() == [[True, False, True, False]]
    assert first_weight.tolist() == [[0.0, 2.0, 0.0, 0.0]] and second_weight.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_the_draws_of_a_group_stay_those_of_its_first_row_in_whatever_order_its_rows_are():
    tokens = torch.zeros(5, 2, dtype=torch.long)
    group = torch.tensor([0, 0, 0, 1, 1])
    rollout = Rollout(tokens, tokens == 0, tokens == 0, tokens, tokens.float(), group)

    def drawn(order):
        moved = replace(rollout.rows(torch.tensor(order)), batch_row=torch.tensor(order))
        generators = row_generators(moved, seeded(0), per_group=True)
        return [int(torch.randint(1 << 30, (), generator=generator)) for generator in generators]

    first, second = (drawn([0, 1, 2, 3, 4])[place] for place in (0, 3))
    assert first != second and drawn([0, 1, 2, 3, 4]) == [first] * 3 + [second] * 2
    assert drawn([2, 1, 0, 4, 3]) == [first] * 3 + [second] * 2
    assert drawn([4, 3, 1, 0, 2]) == [second] * 2 + [first] * 3
