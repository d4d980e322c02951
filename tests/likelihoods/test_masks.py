"""Ranks, strata and choices that masks are made of."""

import torch
from likelihood_toys import TablePolicy

from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.masks import ranks, uniform_index, uniforms_per_row


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


def test_the_strata_of_blocks_say_nothing_of_how_much_of_each_is_hidden():
    """Block and number hidden are independent: with both in strata of the same sample, an early block would always have
    few hidden, and a late one many."""
    rollout = TablePolicy(length=4, words=2, seed=0).rollout(torch.tensor([[0, 1, 0, 1]]))
    estimator, seen = lik.block_elbo(block_size=2, num_samples=2), [set(), set()]
    for seed in range(40):
        noise = estimator.draw_views(rollout, seeded(seed))
        for sample, weight in enumerate(noise.coefficients[:, 0]):
            scored = (weight != 0).nonzero()[:, 0] - 1  # after one prompt token
            seen[sample].add((int(scored[0]) // 2, len(scored)))
    assert seen == [{(0, 1), (0, 2)}, {(1, 1), (1, 2)}]
