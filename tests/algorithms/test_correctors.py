"""The correctors: their defaults, and what joins them."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from ratio_example import MASK, close, weigh
from torch import tensor
from torch.testing import assert_close

from dllm_rl.algorithms import correctors as c
from dllm_rl.algorithms.losses import sequence, token
from dllm_rl.algorithms.surrogates import gspo
from dllm_rl.testing import make_batch
from recipes.sudoku_tiny import recipe as main_job


def test_none():
    weights, keep, metrics = weigh(c.none())
    assert torch.equal(weights, MASK.double()) and torch.equal(keep, MASK)
    assert metrics == {"rollout_corr/nonfinite_fraction": 0.0}


def test_defaults():
    # rho up to 8 under a cap of 2; the band [1/2, 2] of mis, [1/2, 5] of the bare weights and of icepop.
    capped, banded = [[1, 2, 2, 0.5], [0.25, 1, 2, 0], [1, 1, 0, 0]], [[1, 2, 4, 0.5], [0, 1, 0, 0], [1, 1, 0, 0]]
    close(weigh(c.tis())[0], capped)
    close(weigh(c.Corrector(weigh=c.weights.truncated_weights))[0], capped)
    close(weigh(c.Corrector(weigh=c.weights.masked_weights))[0], banded)
    assert c.mis().weigh.keywords == {"low": 0.5, "high": 2.0, "level": "token", "aggregate": "product"}
    surrogate = main_job.surrogate(tensor([[0.5, -0.5]]), tensor([1.0]), tensor([[True, True]]))
    assert_close(surrogate, tensor([[1.2, math.exp(-0.5)]]))  # clipped at 1 + 0.2


def test_qarl_is_tbpo_with_an_aligned_forward():
    ours, plain = c.qarl(eps_high=0.01), c.tbpo(eps_high=0.01)
    assert ours.align_forward and not plain.align_forward and c.aligned().align_forward
    assert ours.surrogate.keywords == plain.surrogate.keywords == {"eps_high": 0.01, "neg_low": 3e-4, "neg_high": 7e-4}
    assert ours.weigh.func is plain.weigh.func and ours.weigh.keywords == plain.weigh.keywords == {"c": 2.0}
    assert c.compose(c.tbpo(), c.aligned()).align_forward


def test_compose_multiplies_weights_and_intersects_masks_in_any_order():
    weights, keep, metrics = weigh(c.compose(c.tis(cap=3.0), c.reject(bound=1.0)))
    close(weights, [[1, 2, 3, 0.5], [0, 0, 0, 0], [1, 1, 0, 0]])
    assert keep.any(-1).tolist() == [True, False, True]
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(3 / 9)
    assert metrics["tis/capped_fraction"] == pytest.approx(2 / 9), "of the whole mask, whatever else is rejected"
    other = weigh(c.compose(c.reject(bound=1.0), c.tis(cap=3.0)))
    assert torch.equal(other[0], weights) and torch.equal(other[1], keep) and other[2] == metrics
    squared, _, metrics = weigh(c.compose(c.tis(cap=3.0), c.tis(cap=5.0)))
    close(squared[0], [1, 4, 12, 0.25])
    assert metrics["tis/capped_fraction"] == pytest.approx(2 / 9)
    assert metrics["tis/capped_fraction_2"] == pytest.approx(1 / 9)


def test_tbpo_alone_is_the_papers_mean_over_sequences():
    """Rows of 1 and 3 tokens with A = 1 and -2, on-policy but for the rollout, weights w = 2^(1/1) and 1.3 (capped)."""
    mask = tensor([[True, False, False], [True, True, True]])
    mismatch = tensor([[math.log(1.2), 9.0, 9.0], [math.log(4.0)] * 3])
    advantages, corrector = tensor([1.0, -2.0]), c.tbpo(c=1.3)
    weights, keep, _ = corrector.weigh(mismatch, advantages, mask)
    batch = make_batch(mask, advantages, weights=weights, keep=keep)
    recipe = replace(main_job, corrector=corrector)
    loss, _, gradient = recipe.policy_loss(batch.old, batch)
    assert loss.item() == pytest.approx(-(1.2 * 1 - 1.3 * 2) / 2)
    assert_close(gradient, tensor([[-1.2 / 2, 0, 0], [1.3 * 2 / 2 / 3] * 3]))
    by_token, _, _ = replace(recipe, aggregate=token).policy_loss(batch.old, batch)
    assert by_token.item() == pytest.approx(-(1.2 * 1 - 3 * 1.3 * 2) / 4)


def test_compose_takes_the_aggregation_of_the_part_whose_surrogate_it_takes():
    assert c.compose(c.tbpo(), c.reject()).aggregate is sequence
    assert c.compose(c.tis(), c.reject()).aggregate is None


def test_compose_takes_the_one_surrogate_that_is_brought():
    mine = partial(gspo, epsilon=0.1)
    assert c.compose(c.tis(), c.Corrector(surrogate=mine)).surrogate is mine
    assert c.compose(c.tis().weigh, c.reject().weigh).surrogate is None
    assert c.compose() == c.none()
    with pytest.raises(ValueError, match=r"2 parts bring an objective; keep one: replace\(part, surrogate=None\)"):
        c.compose(c.tbpo(), c.Corrector(surrogate=mine))
