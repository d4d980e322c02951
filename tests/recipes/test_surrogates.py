"""Surrogates of the studies, with values AND gradients worked by hand, and the promises that every corrector keeps."""

import math
from functools import partial

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from dllm_rl.algorithms import correctors as c
from dllm_rl.algorithms.losses import FixedLengthMean, SequenceMean, TokenMean
from dllm_rl.config import override
from dllm_rl.testing import check_corrector
from recipes.studies.likelihoods.league import WD1
from recipes.studies.likelihoods.surrogates import BGPO, DPPOTV, EBPO, GDSD, SequenceMasked, StableDRL
from recipes.sudoku_unique import recipe


def value_and_gradient(surrogate, ratios, advantages, mask=None):
    """J and dJ/dlog_ratio of the sum, at the given ratios r = exp(log_ratio)."""
    log_ratio = tensor(ratios, dtype=torch.float64).log().requires_grad_()
    mask = torch.ones(log_ratio.shape, dtype=torch.bool) if mask is None else tensor(mask)
    objective = surrogate(log_ratio, tensor(advantages, dtype=torch.float64), mask)
    (gradient,) = torch.autograd.grad(objective.sum(), log_ratio)
    return objective.detach(), gradient


def close(actual, expected):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=1e-15)


def stable_drl_alone(log_ratio, advantages, mask):
    return StableDRL()(log_ratio, advantages, mask, sum_over_processes=lambda x: x)


def test_wd1_weighs_by_two_softmaxes_of_each_group():
    # A = 1/2 and -1/2: softmax(A) - softmax(-A) = +-tanh(1/2), times two; equal rewards have no weight.
    rewards, group = tensor([1.0, 0.0, 3.0, 3.0, 3.0], dtype=torch.float64), tensor([0, 0, 1, 1, 1])
    weight = 2 * math.tanh(0.5)
    close(WD1()(rewards, group), [weight, -weight, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("surrogate", [BGPO(), EBPO(), GDSD(), stable_drl_alone])
def test_extreme_ratios_stay_finite(surrogate):
    log_ratio = tensor([[90.0, -90.0], [200.0, 1.0]], requires_grad=True)
    objective = surrogate(log_ratio, tensor([1.0, -1.0]), torch.ones(2, 2, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(objective.sum(), log_ratio)
    assert objective.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("surrogate", [DPPOTV(), BGPO(), StableDRL(), SequenceMasked(bound=0.1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_contract(surrogate, seed):
    check_corrector(c.FunctionCorrector(function=c.TIS().weights, loss=surrogate), seed=seed)


def test_dppo_tv_stops_what_has_moved_by_too_much_probability():
    # p_old = 0.5, 0.5, 0.01; p = 0.75 (+0.25), 0.3 (-0.2), 0.25 (+0.24): ratios 1.5, 0.6, 25. delta 0.2 and 0.245.
    old = tensor([[0.5, 0.5, 0.01]], dtype=torch.float64).log()
    ratios, surrogate = [[1.5, 0.6, 25.0]], partial(DPPOTV(delta=0.2 + 1e-9, delta_high=0.245), old_logprobs=old)
    value, gradient = value_and_gradient(surrogate, ratios, [2.0])
    close(gradient, [[0.0, 1.2, 40.0]])  # +0.25 is too far up; falling does not matter; a ratio of 25 counts as 20
    close(value, [[0.0, 1.2, 40.0]])
    _, gradient = value_and_gradient(surrogate, ratios, [-2.0])
    close(gradient, [[-3.0, -1.2, -40.0]])  # 0.2 down is still inside
    _, gradient = value_and_gradient(partial(DPPOTV(delta=0.19), old_logprobs=old), ratios, [-2.0])
    close(gradient, [[-3.0, 0.0, -40.0]])
    _, gradient = value_and_gradient(partial(DPPOTV(), old_logprobs=old), ratios, [2.0])
    close(gradient, [[0.0, 1.2, 0.0]])  # delta 0.2 both ways


def test_bgpo_bounds_the_rows_ratio_from_below():
    # Row D = (ln 1.21 + 0) / 2 = ln 1.1, the third token off the mask. A = 2: r = 1 + ln 1.1, slope 1; A = -2: r = 1.1.
    row, mask, d = [[1.21, 1.0, 9.0]], [[True, True, False]], math.log(1.1)
    value, gradient = value_and_gradient(BGPO(), row, [2.0], mask)
    close(value[:, :2], [[2 * (1 + d)] * 2])
    close(gradient, [[2.0, 2.0, 0.0]])
    value, gradient = value_and_gradient(BGPO(), row, [-2.0], mask)
    close(value[:, :2], [[-2.2, -2.2]])
    close(gradient, [[-2.2, -2.2, 0.0]])
    # Clipped at 1.05 where A > 0; at delta 3 where A < 0; below the range where A < 0.
    for ratio, advantage, expected in ((1.1, 1.0, 1.05), (4.0, -1.0, -3.0), (0.5, -1.0, -0.95)):
        value, gradient = value_and_gradient(BGPO(epsilon=0.05), [[ratio]], [advantage])
        close(value, [[expected]])
        close(gradient, [[0.0]])
    assert value_and_gradient(BGPO(), [[0.1]], [1.0])[0].item() == pytest.approx(1 + math.log(0.1)), (
        "below 0, and no NaN"
    )


def test_ebpo_clips_the_product_of_the_row():
    # 1.1 * 1.05 = 1.155 over the marked tokens; each of the two objectives has the gradient r A by both: 2 * 1.155 * 2.
    row, mask = [[1.1, 1.05, 9.0]], [[True, True, False]]
    value, gradient = value_and_gradient(EBPO(), row, [2.0], mask)
    close(value[:, :2], [[2.31, 2.31]])
    close(gradient, [[4.62, 4.62, 0.0]])
    value, gradient = value_and_gradient(EBPO(epsilon=0.3, epsilon_high=0.15), row, [2.0], mask)
    close(value[:, :2], [[2.3, 2.3]])
    close(gradient, [[0.0, 0.0, 0.0]])
    _, gradient = value_and_gradient(EBPO(epsilon=0.3, epsilon_high=0.15), [[0.8, 0.9]], [-1.0])
    close(gradient, [[-1.44, -1.44]])
    # By autograd of the ratio itself, under the aggregation that it is for.
    logs = tensor([[0.05, -0.1, 0.02]], dtype=torch.float64, requires_grad=True)
    whole = torch.ones(1, 3, dtype=torch.bool)
    ours = (EBPO()(logs, tensor([1.5]), whole) * SequenceMean()(whole, num_tokens=3, num_sequences=1).double()).sum()
    assert_close(torch.autograd.grad(ours, logs)[0], torch.autograd.grad(1.5 * logs.sum().exp(), logs)[0])


def test_gdsd_pulls_the_log_ratio_to_the_advantage():
    # Two tokens, D = ln 1.1, psi 0.1, A = 2: M = D / 2; J = -(M - 0.2)^2 / 0.2, dJ/dM = (0.2 - M) / 0.1 = 2 - 10 M.
    row, mask, m = [[1.1, 1.0, 9.0]], [[True, True, False]], math.log(1.1) / 2
    value, gradient = value_and_gradient(GDSD(psi=0.1), row, [2.0], mask)
    close(value[:, :2], [[-((m - 0.2) ** 2) / 0.2] * 2])
    close(gradient, [[2 - 10 * m, 2 - 10 * m, 0.0]])
    _, gradient = value_and_gradient(GDSD(), [[1.0, 1.0]], [-3.0])
    close(gradient, [[-3.0, -3.0]])  # on-policy: A grad log p
    # At rest where D = L psi A; outside [1 - 0.2, 1 + 0.3] nothing pulls, wherever the target is.
    _, gradient = value_and_gradient(GDSD(), [[math.exp(0.08), 1.0]], [1.0])
    assert gradient.abs().max() < 1e-12
    for ratio in (0.79, 1.31):
        assert not value_and_gradient(GDSD(epsilon_high=0.3), [[ratio, 1.0]], [1.0])[1].any()
    assert value_and_gradient(GDSD(epsilon_high=0.3), [[1.29]], [1.0])[1].any()


def test_stable_drl_weighs_a_row_by_its_share_of_all_clipped_ratios():
    # Rows' geometric ratios 2, 0.5, 8 (clipped to 4); the fourth has no token. Their mean is 6.5 / 3.
    ratios = [[4.0, 1.0], [0.5, 9.0], [8.0, 8.0], [7.0, 7.0]]
    mask = [[True, True], [True, False], [True, True], [False, False]]
    surrogate = partial(StableDRL(max_ratio=4.0), sum_over_processes=lambda x: x)
    value, gradient = value_and_gradient(surrogate, ratios, [1.0, -1.0, 2.0, 1.0], mask)
    weights = [2 * 3 / 6.5, 0.5 * 3 / 6.5, 4 * 3 / 6.5]
    expected = [[weights[0]] * 2, [-weights[1]] * 2, [2 * weights[2]] * 2]
    close(gradient[:3], expected)
    close(value[:3], expected)
    # Another process has 5 rows whose clipped ratios add up to 3.5: the mean is 10 / 8.
    other = tensor([3.5, 5.0], dtype=torch.float64)
    _, gradient = value_and_gradient(
        partial(surrogate, sum_over_processes=lambda x: x + other), ratios, [1.0] * 4, mask
    )
    close(gradient[:3, 0], [2 * 0.8, 0.5 * 0.8, 4 * 0.8])
    _, gradient = value_and_gradient(stable_drl_alone, [[2.0]], [1.0], [[False]])
    assert gradient.isfinite().all(), "a process without a row of its own"


def test_sequence_masked_drops_what_the_policy_has_left_behind():
    # Per token logp_rollout - logp = -(log_ratio + log_mismatch); ratio 0.5, mismatch -0.2, -0.4: ln 2 + 0.3 = 0.993.
    behind = tensor([[-0.2, -0.4, -9.0]], dtype=torch.float64)
    ratios, mask = [[0.5, 0.5, 0.5]], [[True, True, False]]
    for bound, advantage, kept in ((0.99, -1.0, False), (1.0, -1.0, True), (0.99, 1.0, True)):
        surrogate = partial(SequenceMasked(bound=bound, epsilon=0.6), log_mismatch=behind)
        value, gradient = value_and_gradient(surrogate, ratios, [advantage], mask)
        close(value[:, :2], [[0.5 * advantage * kept] * 2])
        close(gradient[:, :2], [[0.5 * advantage * kept] * 2])
    clipped = partial(SequenceMasked(bound=9.0, delta=1.5), log_mismatch=torch.zeros_like(behind))
    close(value_and_gradient(clipped, [[2.0, 1.0, 0.5]], [-1.0])[0], [[-1.5, -1.0, -0.8]])


@pytest.mark.parametrize("reduction", [SequenceMean, TokenMean, FixedLengthMean])
def test_the_command_line_names_a_class_and_its_settings(reduction):
    """Beside a surrogate, a reduction, which may have no settings."""
    text = f"--loss recipes.studies.likelihoods.surrogates.GDSD --loss.psi 0.5 --loss_reduction {reduction.__name__}"
    more = ["--loss_reduction.length", "16"] if reduction is FixedLengthMean else []
    made = override(recipe, [*text.split(), *more])
    assert made.loss == GDSD(psi=0.5) and type(made.loss_reduction) is reduction
