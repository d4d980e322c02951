"""Advantages by GAE over denoising steps: hand-worked numbers, a second formula, and its limits."""

import pytest
import torch

from dllm_rl.algorithms import losses
from dllm_rl.algorithms.losses import is_per_token
from dllm_rl.algorithms.values import ValueModel, generalized_advantages

ALL = torch.ones(3, 1, dtype=torch.bool)


def test_hand_worked():
    """A = 1 after three steps with values 0.2, 0.5, 0.4 and lambda 1/2."""
    values = torch.tensor([[0.2], [0.5], [0.4]])
    found = generalized_advantages(torch.tensor([1.0]), values, ALL, gae_lambda=0.5)
    # deltas: 0.5 - 0.2 = 0.3; 0.4 - 0.5 = -0.1; 1 - 0.4 = 0.6
    torch.testing.assert_close(found, torch.tensor([[0.3 - 0.05 + 0.15], [-0.1 + 0.3], [0.6]]))


def test_steps_that_a_row_lacks_are_skipped():
    """A row that ends early, or has no token in a segment, has the advantages of its own steps."""
    values = torch.tensor([[0.2, 0.2], [0.5, 9.0], [0.4, 0.5], [9.0, 0.4]])
    is_step = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
    found = generalized_advantages(torch.tensor([1.0, 1.0]), values, is_step, gae_lambda=0.5)
    rows = [found[:, row][is_step[:, row]] for row in (0, 1)]
    torch.testing.assert_close(rows[0], rows[1])
    assert not found[~is_step].any()


@pytest.mark.parametrize("gae_lambda", [0.0, 0.3, 0.95, 1.0])
def test_equals_the_sum_of_discounted_deltas(gae_lambda):
    generator = torch.Generator().manual_seed(0)
    advantages, values = torch.randn(5, generator=generator), torch.randn(4, 5, generator=generator)
    found = generalized_advantages(advantages, values, torch.ones(4, 5, dtype=torch.bool), gae_lambda=gae_lambda)
    deltas = torch.cat([values[1:], advantages[None]]) - values
    for n in range(4):
        expected = sum(gae_lambda**k * deltas[n + k] for k in range(4 - n))
        torch.testing.assert_close(found[n], expected)


def test_limits():
    """Lambda 1 subtracts the value; values of 0 with lambda 1 leave the row's advantage, bit for bit."""
    generator = torch.Generator().manual_seed(1)
    advantages, values = torch.randn(5, generator=generator), torch.randn(4, 5, generator=generator)
    everywhere = torch.ones(4, 5, dtype=torch.bool)
    torch.testing.assert_close(
        generalized_advantages(advantages, values, everywhere, gae_lambda=1.0), advantages - values
    )
    zeros = generalized_advantages(advantages, torch.zeros(4, 5), everywhere, gae_lambda=1.0)
    assert torch.equal(zeros, advantages.expand(4, 5))


@pytest.mark.parametrize(
    ("surrogate", "expected"),
    [
        (losses.PPOClip(), True),
        (losses.CISPO(), True),
        (losses.Reinforce(), True),
        (losses.GSPO(), False),
        (losses.TrustBand(), False),
        (losses.VESPO(), False),
        (lambda log_ratio, advantages, mask, *, old_logprobs: old_logprobs * advantages[:, None] * log_ratio, True),
        (lambda log_ratio, advantages, mask, *, log_mismatch: log_mismatch.sum(-1, keepdim=True) * log_ratio, False),
        # A mean over the batch has the same tokens, whatever the rows are.
        (lambda log_ratio, advantages, mask: log_ratio - (log_ratio * advantages[:, None]).mean(), True),
    ],
)
def test_which_surrogates_treat_each_token_by_itself(surrogate, expected):
    assert is_per_token(surrogate) is expected


@pytest.mark.parametrize(
    "keyword", [{"gae_lambda": 1.1}, {"gae_lambda": -0.1}, {"hidden_size": 0}, {"learning_rate": 0.0}]
)
def test_arguments_out_of_range(keyword):
    with pytest.raises(ValueError, match=next(iter(keyword))):
        ValueModel(**keyword)
