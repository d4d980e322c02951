"""Objectives, KL terms, aggregations and the loss that joins them: values AND gradients, worked by hand."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from dllm_rl.algorithms import losses
from dllm_rl.algorithms.correctors import FunctionCorrector
from dllm_rl.algorithms.losses import (
    CISPO,
    GSPO,
    K1,
    K2,
    K3,
    SAPO,
    VESPO,
    FixedLengthMean,
    FunctionLoss,
    OffPolicyMask,
    PPOClip,
    Reinforce,
    SequenceMean,
    TokenMean,
    TrustBand,
    bias_corrected_kl,
    entropy_bonus,
    policy_loss,
)
from dllm_rl.testing import make_batch


def value_and_gradient(surrogate, ratios, advantages, mask=None):
    """J and dJ/dlog_ratio of the sum, at the given ratios r = exp(log_ratio)."""
    log_ratio = tensor(ratios, dtype=torch.float64).log().requires_grad_()
    mask = torch.ones(log_ratio.shape, dtype=torch.bool) if mask is None else tensor(mask)
    objective = surrogate(log_ratio, tensor(advantages, dtype=torch.float64), mask)
    (gradient,) = torch.autograd.grad(objective.sum(), log_ratio)
    return objective.detach(), gradient


def close(actual, expected):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=1e-15)


def test_ppo_clip_in_and_out_of_the_range_for_both_signs():
    # eps 0.2. A = 2: min(2r, 2 clip(r)): below the range and in it r counts, above it is flat at 2.4.
    # A = -2: min picks the more negative: below the range flat at -1.6, in it and above it r counts.
    ratios = [[0.5, 0.9, 1.1, 1.5], [0.5, 0.9, 1.1, 1.5]]
    value, gradient = value_and_gradient(PPOClip(epsilon=0.2), ratios, [2.0, -2.0])
    close(value, [[1.0, 1.8, 2.2, 2.4], [-1.6, -1.8, -2.2, -3.0]])
    # d(r A)/d log r = r A where r counts, 0 where it is clipped.
    close(gradient, [[1.0, 1.8, 2.2, 0.0], [0.0, -1.8, -2.2, -3.0]])


def test_sapo_worked_by_hand():
    """4 / tau sigmoid(tau (r - 1)) A: at r = 1 it is 2 A / tau with the slope A; tau is that of A's sign."""
    value, gradient = value_and_gradient(SAPO(temperature_pos=2.0, temperature_neg=4.0), [[1.0, 1.5]] * 2, [3.0, -3.0])
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    close(value, [[3.0, 6.0 * sigmoid(1.0)], [-1.5, -3.0 * sigmoid(2.0)]])
    close(gradient[:, 0], [3.0, -3.0])
    close(gradient[:, 1], [sign * 18 * sigmoid(x) * sigmoid(-x) for sign, x in ((1, 1.0), (-1, 2.0))])


def test_ppo_clip_with_its_own_upper_bound_and_with_delta():
    # DAPO: the range is [0.8, 1.28].
    value, gradient = value_and_gradient(PPOClip(epsilon=0.2, epsilon_high=0.28), [[1.25, 1.3]], [1.0])
    close(value, [[1.25, 1.28]])
    close(gradient, [[1.25, 0.0]])
    # delta 4 bounds the negative side's loss: -1 * min(r, 4).
    value, gradient = value_and_gradient(PPOClip(epsilon=0.2, delta=4.0), [[3.0, 5.0]], [-1.0])
    close(value, [[-3.0, -4.0]])
    close(gradient, [[-3.0, 0.0]])


@pytest.mark.parametrize(
    "keywords",
    [
        {"delta": 1.1},
        {"epsilon": 0.3, "delta": 1.2},
        {"epsilon": 0.2, "epsilon_high": 0.28, "delta": 1.2},
        {"delta": 1},
    ],
)
def test_a_delta_that_would_clip_positive_advantages_is_refused(keywords):
    with pytest.raises(ValueError, match="delta="):
        PPOClip(**keywords)(torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="delta="):  # before a run, where a recipe binds it
        FunctionCorrector(loss=PPOClip(**keywords))
    for fine in ({"epsilon": 0.2, "delta": 1.2}, {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1 + 0.1 + 0.2}):
        FunctionCorrector(loss=PPOClip(**fine))


def test_gspo_clips_the_rows_geometric_ratio():
    # Row ratio sqrt(1.21 * 1) = 1.1 over the two marked tokens; the third token is not the row's.
    value, gradient = value_and_gradient(
        GSPO(epsilon=0.2, epsilon_high=0.2), [[1.21, 1.0, 9.0]], [2.0], [[True, True, False]]
    )
    close(value[:, :2], [[2.2, 2.2]])
    # Sum of two equal objectives, each 1.1 * 2, of a mean of two logs: 2 * 2.2 / 2 = 2.2 each.
    close(gradient, [[2.2, 2.2, 0.0]])
    value, gradient = value_and_gradient(GSPO(epsilon=0.05, epsilon_high=0.05), [[1.21, 1.0]], [2.0])
    close(value, [[2.1, 2.1]])
    close(gradient, [[0.0, 0.0]])


@pytest.mark.parametrize("make", [GSPO, TrustBand, OffPolicyMask])
def test_means_over_a_row_weight_drawn_tokens(make):
    """log r 0.3 and 0.1, of which the second stands for four tokens and the first for one: the mean is 0.7 / 5."""
    log_ratio = tensor([[0.3, 0.1, 9.0]], dtype=torch.float64)
    mask, weights = tensor([[True, True, False]]), tensor([[1.0, 4.0, 0.0]], dtype=torch.float64)
    if make is OffPolicyMask:
        for threshold, kept in ((0.13, False), (0.15, True)):  # without weights 0.2
            loss = OffPolicyMask(loss=Reinforce(), threshold=threshold, since="old")
            value = loss(-log_ratio, -torch.ones(1), mask, inverse_chances=weights)
            assert bool((value[:, :2] != 0).any()) == kept
        return
    wide = {"epsilon": 0.9, "epsilon_high": 0.9} if make is GSPO else {"eps_high": 0.9}
    value = make(**wide)(log_ratio, torch.ones(1), mask, inverse_chances=weights)
    close(value[:, :2], [[math.exp(0.14)] * 2])


@pytest.mark.parametrize(
    ("ratio", "advantage", "clamped", "inside"),
    [
        (0.5, 2.0, 0.5, True),  # A >= 0 has no lower edge
        (1.0, 2.0, 1.0, True),
        (1.05, 2.0, 1.05, True),
        (1.2, 2.0, 1.1, False),
        (0.85, -2.0, 0.95, False),
        (0.97, -2.0, 0.97, True),
        (1.01, -2.0, 1.01, True),
        (1.5, -2.0, 1.02, False),  # the branch that PPO's minimum would leave open
    ],
)
def test_trust_band_in_and_out_of_each_band(ratio, advantage, clamped, inside):
    band = TrustBand(eps_high=0.1, neg_low=0.05, neg_high=0.02)
    # Two tokens with ratios ratio * 1.3 and ratio / 1.3: the row's geometric ratio is `ratio`.
    value, gradient = value_and_gradient(band, [[ratio * 1.3, ratio / 1.3]], [advantage])
    close(value, [[clamped * advantage] * 2])
    if inside:
        close(gradient, [[ratio * advantage] * 2])
    else:
        assert torch.equal(gradient, torch.zeros(1, 2, dtype=torch.float64)), "exactly zero outside the band"


def test_trust_band_defaults_are_the_digested_constants():
    value, _ = value_and_gradient(TrustBand(), [[2.0], [0.5], [2.0]], [1.0, -1.0, -1.0])
    close(value, [[1.0004], [-0.9997], [-1.0007]])


def test_gspo_defaults_are_the_papers():
    value, _ = value_and_gradient(GSPO(), [[2.0], [0.5]], [1.0, -1.0])
    close(value, [[1.0004], [-0.9997]])


def test_cispo_weights_grad_log_p_by_the_capped_ratio():
    value, gradient = value_and_gradient(CISPO(max_ratio=2.0), [[0.5, 1.0, 3.0]], [-2.0])
    close(gradient, [[-1.0, -2.0, -4.0]])
    close(value, [[-1.0 * math.log(0.5), 0.0, -4.0 * math.log(3.0)]])


def test_vespo_weighs_a_row_by_phi_of_its_product():
    # w = 2 * 0.25 = 0.5, the last token off the mask. A >= 0: phi = e^3 w^2 e^(-3 w); A < 0: phi = e^2 w^3 e^(-2 w).
    for advantage, phi in ((2.0, 0.25 * math.exp(1.5)), (-2.0, 0.125 * math.exp(1.0))):
        value, gradient = value_and_gradient(VESPO(), [[2.0, 0.25, 9.0]], [advantage], [[True, True, False]])
        close(gradient[:, :2], [[advantage * phi] * 2])
        close(value[:, :2], [[advantage * phi * math.log(2.0), advantage * phi * math.log(0.25)]])
    _, gradient = value_and_gradient(VESPO(), [[1.0, 1.0], [1.0, 1.0]], [3.0, -0.5])
    assert gradient.tolist() == [[3.0, 3.0], [-0.5, -0.5]], "phi(1) is exactly 1"
    _, gradient = value_and_gradient(VESPO(k_pos=1.0, lam_pos=0.5), [[4.0]], [1.0])
    close(gradient, [[4.0 * math.exp(0.5 - 2.0)]])


def test_reinforce_is_the_plain_policy_gradient():
    value, gradient = value_and_gradient(Reinforce(), [[0.5, 7.0]], [3.0])
    close(gradient, [[3.0, 3.0]])
    close(value, [[3.0 * math.log(0.5), 3.0 * math.log(7.0)]])


@pytest.mark.parametrize("surrogate", [PPOClip(), GSPO(), TrustBand(), CISPO(), VESPO()])
def test_extreme_ratios_stay_finite(surrogate):
    log_ratio = tensor([[90.0, -90.0], [200.0, 1.0]], requires_grad=True)
    objective = surrogate(log_ratio, tensor([1.0, -1.0]), torch.ones(2, 2, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(objective.sum(), log_ratio)
    assert objective.isfinite().all() and gradient.isfinite().all()


def test_kl_terms():
    # d = log p_ref - log p: k1 = -d, k2 = d^2/2, k3 = e^d - 1 - d, at d = ln 2 and -ln 2; dk/dd = -1, d, e^d - 1.
    d = tensor([[math.log(2.0), -math.log(2.0)]], dtype=torch.float64, requires_grad=True)
    ln2 = math.log(2.0)
    for k, expected, slope in (
        (K1(), [[-ln2, ln2]], [[-1.0, -1.0]]),
        (K2(), [[ln2**2 / 2, ln2**2 / 2]], [[ln2, -ln2]]),
        (K3(), [[1 - ln2, -0.5 + ln2]], [[1.0, -0.5]]),
    ):
        close(k(d).detach(), expected)
        close(torch.autograd.grad(k(d).sum(), d)[0], slope)


def test_a_log_ratio_of_fifteen_is_not_clamped():
    assert K3()(tensor([[15.0]], dtype=torch.float64)).item() == pytest.approx(math.exp(15) - 16)


MASK = tensor([[True, True, True, False], [True, False, False, False], [False, False, False, False]])


def test_aggregations():
    # 4 tokens in 3 sequences of 3, 1 and 0 tokens.
    counts = {"num_tokens": 4, "num_sequences": 3}
    assert_close(TokenMean()(MASK, **counts), MASK / 4)
    expected = tensor([[1 / 9, 1 / 9, 1 / 9, 0], [1 / 3, 0, 0, 0], [0, 0, 0, 0]])
    assert_close(SequenceMean()(MASK, **counts), expected)
    assert_close(FixedLengthMean(length=8)(MASK, **counts), MASK / 24)
    # Of a global batch of 10 tokens in 5 sequences this is a share: the denominators are those that are given.
    counts = {"num_tokens": 10, "num_sequences": 5}
    assert_close(TokenMean()(MASK, **counts), MASK / 10)
    assert_close(SequenceMean()(MASK, **counts), expected * 3 / 5)
    assert_close(FixedLengthMean(length=8)(MASK, **counts), MASK / 40)


def test_an_empty_batch_has_coefficients_of_zero():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for aggregate in (TokenMean(), SequenceMean(), FixedLengthMean(length=3)):
        assert torch.equal(aggregate(nothing, num_tokens=0, num_sequences=0), torch.zeros(2, 3))


# The (B=3, T=4) example. old = -1 everywhere. Ratios, advantages, weights:
#   row 0, A = 1    r = 1.1, 1.5 (clipped to 1.2), 0.5, -      w = 1, 2, 1, -
#   row 1, A = -2   r = 0.5 (clipped to 0.8), -, -, -          w = 0.5
#   row 2           no token
RATIO = [[1.1, 1.5, 0.5, 9.0], [0.5, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]]
WEIGHTS = [[1.0, 2.0, 1.0, 7.0], [0.5, 7.0, 7.0, 7.0], [7.0, 7.0, 7.0, 7.0]]


def example(**changes):
    old = torch.full((3, 4), -1.0, dtype=torch.float64)
    weights = tensor(WEIGHTS, dtype=torch.float64)
    batch = make_batch(
        MASK, tensor([1.0, -2.0, 1.0], dtype=torch.float64), importance_weights=weights, old_logprobs=old, **changes
    )
    return old + tensor(RATIO, dtype=torch.float64).log(), batch


def loss_of(logps, batch, *, loss_reduction=TokenMean(), beta=0.0, kl=K2(), surrogate=PPOClip()):
    return policy_loss(logps, batch, surrogate=surrogate, loss_reduction=loss_reduction, beta=beta, kl=kl)


def test_policy_loss_of_the_worked_example():
    # w J: 1.1, 2 * 1.2 = 2.4, 0.5; 0.5 * (-2 * 0.8) = -0.8. Sum 3.2 over 4 tokens: loss -0.8.
    loss, metrics, gradient = loss_of(*example())
    close(loss, -0.8)
    # -(1/4) w r A where unclipped: -1.1/4, 0, -0.5/4; clipped: 0.
    close(gradient, [[-0.275, 0, -0.125, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    share = {name: (float(total), float(count)) for name, (total, count) in metrics.items()}
    assert share["clip_ratio/region_mean"] == (2, 4)
    assert share["clip_ratio/high_mean"] == (1, 4)
    assert share["clip_ratio/low_mean"] == (1, 4)
    assert share["band/positive"] == (2, 3)
    assert share["band/negative"] == (0, 1)
    assert share["ratio/mean"] == (pytest.approx(3.6), 4)
    assert share["loss"] == (pytest.approx(-0.8), 1)
    # Per sequence: (1.1 + 2.4 + 0.5)/3 and -0.8/1 over three sequences: -(4/3 - 0.8)/3.
    loss = loss_of(*example(), loss_reduction=SequenceMean())[0]
    assert float(loss) == pytest.approx(-(4 / 3 - 0.8) / 3, rel=1e-7)  # coefficients such as 1/9 are fp32


def test_under_gspo_a_weight_is_that_of_its_own_tokens_gradient():
    # Row ratio sqrt(1.21 * 1) = 1.1, A = 2, w = 1 and 2, one row of two tokens: -w 2.2 / 2 each. Their mean is -1.65.
    old = torch.full((1, 2), -1.0, dtype=torch.float64)
    both = torch.ones(1, 2, dtype=torch.bool)
    weights = tensor([[1.0, 2.0]], dtype=torch.float64)
    batch = make_batch(both, tensor([2.0], dtype=torch.float64), importance_weights=weights, old_logprobs=old)
    logps = old + tensor([[1.21, 1.0]], dtype=torch.float64).log()
    surrogate = GSPO(epsilon=0.2, epsilon_high=0.2)
    loss, _, gradient = loss_of(logps, batch, surrogate=surrogate, loss_reduction=SequenceMean())
    close(loss, -3.3)
    close(gradient, [[-1.1, -2.2]])


def test_clipped_shares_are_told_apart_by_sign():
    # A = 1: 1.5 and 1.3 are clipped, 1 is not; A = -1: 0.5 is clipped, 1 and 1.3 are not; A = 0 counts nowhere.
    ratio = tensor([[1.5, 1.3, 1.0], [0.5, 1.0, 1.3], [1.5, 0.5, 1.0]], dtype=torch.float64)
    old = torch.full((3, 3), -1.0, dtype=torch.float64)
    batch = make_batch(
        torch.ones(3, 3, dtype=torch.bool), tensor([1.0, -1.0, 0.0], dtype=torch.float64), old_logprobs=old
    )
    _, metrics, _ = loss_of(old + ratio.log(), batch)
    share = {name: (float(total), float(count)) for name, (total, count) in metrics.items()}
    assert share["clip_ratio/high_mean"] == (2, 6) and share["clip_ratio/low_mean"] == (1, 6)
    assert share["clip_ratio/region_mean"] == (3, 6)
    assert share["band/positive"] == (1, 3) and share["band/negative"] == (2, 3)


def test_kl_is_added_after_the_weights():
    # d = ref - logp with ref = -1: d = -log r. k2 = d^2/2 over the four tokens, beta 0.1, divided by 4; no weight.
    logps, batch = example(reference_logprobs=torch.full((3, 4), -1.0, dtype=torch.float64))
    logs = [math.log(r) for r in (1.1, 1.5, 0.5, 0.5)]
    loss, metrics, gradient = loss_of(logps, batch, beta=0.1)
    close(loss, -0.8 + 0.1 * sum(x * x / 2 for x in logs) / 4)
    # d k2 / d logp = -d = log r.
    extra = [0.1 * x / 4 for x in logs]
    close(gradient, [[-0.275 + extra[0], extra[1], -0.125 + extra[2], 0], [extra[3], 0, 0, 0], [0, 0, 0, 0]])
    total, count = metrics["kl"]
    assert (float(total), int(count)) == (pytest.approx(sum(x * x / 2 for x in logs)), 4)
    # k3 knows the direction: with e^d = 1/r it is 1/r - 1 + log r.
    total = loss_of(logps, batch, beta=0.1, kl=losses.K3())[1]["kl"][0]
    assert float(total) == pytest.approx(sum(math.exp(-x) - 1 + x for x in logs))


def test_kl_and_policy_term_share_the_aggregations_coefficients():
    # Rows of 3 and 1 tokens among three: coefficients 1/9 and 1/3; d = -log r, k2 = d^2/2.
    logps, batch = example(reference_logprobs=torch.full((3, 4), -1.0, dtype=torch.float64))
    k = [math.log(r) ** 2 / 2 for r in (1.1, 1.5, 0.5, 0.5)]
    loss, _, _ = loss_of(logps, batch, beta=0.1, loss_reduction=SequenceMean())
    expected = -(4 / 3 - 0.8) / 3 + 0.1 * (sum(k[:3]) / 9 + k[3] / 3)
    assert float(loss) == pytest.approx(expected, rel=1e-7)


def test_a_rejected_token_leaves_its_rows_mean():
    # Without the clipped token row 0 is the mean of 1.1 and 0.5: -(0.8 - 0.8) / 3.
    keep = MASK.clone()
    keep[0, 1] = False
    assert float(loss_of(*example(loss_mask=keep), loss_reduction=SequenceMean())[0]) == pytest.approx(0, abs=1e-8)


def test_a_token_of_weight_zero_is_not_a_clipped_one():
    logps, batch = example()
    batch.importance_weights[0, 0] = 0
    _, metrics, _ = loss_of(logps, batch)
    assert [int(x) for x in metrics["clip_ratio/region_mean"]] == [2, 3]
    assert [int(x) for x in metrics["band/positive"]] == [1, 2]


def test_entropy_bonus_is_the_gradient_of_the_entropy_in_expectation():
    # Over all four tokens of p = softmax(z), sum_y p(y) (-log p(y)) d log p(y)/dz = dH/dz.
    z = tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    logp = z.log_softmax(-1)
    one = torch.ones(1, 4, dtype=torch.bool)
    mean = (logp.exp().detach() * losses.entropy_bonus(logp[None], one, group=torch.zeros(1).long())[0]).sum()
    (estimate,) = torch.autograd.grad(mean, z, retain_graph=True)
    (exact,) = torch.autograd.grad(-(logp.exp() * logp).sum(), z, retain_graph=True)
    assert_close(estimate, exact, rtol=1e-12, atol=1e-15)
    # And over all sixteen pairs of completions, each of which is the other's baseline.
    total = 0
    for pair in itertools.product(range(4), repeat=2):
        bonus = losses.entropy_bonus(
            logp[list(pair)][:, None], torch.ones(2, 1, dtype=torch.bool), group=torch.zeros(2).long()
        )
        total = total + logp[list(pair)].sum().exp().detach() * bonus.mean()
    assert_close(torch.autograd.grad(total, z)[0], exact, rtol=1e-12, atol=1e-15)


def test_entropy_bonus_by_hand():
    # Means of -log p of the other completion: 1.5 for row 0 (two tokens), 4 for row 1 (one token); row 2, 3: no token.
    logps = tensor([[-4.0, 9.0], [-1.0, -2.0], [7.0, 7.0], [-3.0, 7.0]], requires_grad=True)
    mask = tensor([[True, False], [True, True], [False, False], [True, False]])
    losses.entropy_bonus(logps, mask, group=tensor([0, 0, 1, 1])).sum().backward()
    assert logps.grad.tolist() == [[2.5, 0], [-3.0, -2.0], [0, 0], [3.0, 0]]


def test_the_weight_of_a_token_is_that_of_all_terms_of_the_loss():
    """A weight of 1/2 halves a token's policy term, KL and entropy; with 0 it has no gradient and is not counted."""
    logps, batch = example(reference_logprobs=torch.full((3, 4), -1.5, dtype=torch.float64))
    weights = tensor([[1.0, 0.5, 0.0, 3.0], [0.5, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    weighted = replace(batch, rollout=replace(batch.rollout, loss_weights=weights))
    settings = {"surrogate": PPOClip(), "loss_reduction": TokenMean(), "beta": 0.3, "kl": K2(), "entropy": 0.2}
    _, metrics, plain = policy_loss(logps, batch, **settings)
    _, weighted_metrics, gradient = policy_loss(logps, weighted, **settings)
    assert_close(gradient, plain * weights)
    assert plain[0, 2] != 0 == gradient[0, 2]
    count = "clip_ratio/region_mean"
    assert int(weighted_metrics[count][1]) == int(metrics[count][1]) - 1
    assert weighted_metrics["kl"] == metrics["kl"] and weighted_metrics["entropy"] == metrics["entropy"]


def test_entropy_enters_the_gradient_with_its_coefficient():
    logps, batch = example()
    _, _, plain = loss_of(logps, batch)
    loss, metrics, gradient = policy_loss(
        logps, batch, surrogate=PPOClip(), loss_reduction=TokenMean(), beta=0.0, kl=K2(), entropy=0.1
    )
    # -c * 0.1 * (-log p) per kept token, c = 1/4.
    close(gradient - plain, torch.where(MASK, 0.1 / 4 * logps, 0))
    close(loss, -0.8)
    kept = [-1 + math.log(r) for r in (1.1, 1.5, 0.5, 0.5)]
    assert float(metrics["entropy"][0]) == pytest.approx(-sum(kept))


def test_what_stands_off_the_mask_may_be_infinite():
    logps, batch = example()
    logps[2], logps[0, 3] = -torch.inf, torch.nan
    loss, metrics, gradient = loss_of(logps, batch)
    close(loss, -0.8)
    # A surrogate without any clamp of its own meets log-ratio 0 there.
    bare = lambda log_ratio, advantages, mask: log_ratio.exp() * advantages[:, None]  # noqa: E731
    assert loss_of(logps, batch, surrogate=bare)[2].isfinite().all()
    options = {"surrogate": PPOClip(), "loss_reduction": TokenMean(), "beta": 0.0, "kl": K2(), "entropy": 0.1}
    assert policy_loss(logps, batch, **options)[2].isfinite().all()
    assert gradient.isfinite().all() and (gradient[~MASK] == 0).all()
    assert float(metrics["ratio/mean"][0]) == pytest.approx(3.6)


def test_rejected_tokens_leave_the_denominator_and_a_wholly_rejected_batch_is_still():
    keep = MASK.clone()
    keep[1] = False
    logps, batch = example(loss_mask=keep)
    # 1.1 + 2.4 + 0.5 over the three that stay; the coefficient 1/3 is fp32.
    assert float(loss_of(logps, batch)[0]) == pytest.approx(-4.0 / 3, rel=1e-7)
    logps, batch = example(loss_mask=torch.zeros_like(MASK))
    loss, metrics, gradient = loss_of(logps, batch)
    assert float(loss) == 0 and torch.equal(gradient, torch.zeros(3, 4, dtype=torch.float64))
    assert int(metrics["clip_ratio/region_mean"][1]) == 0


def test_weights_receive_no_gradient():
    logps, batch = example()
    batch.importance_weights.requires_grad_()
    loss, _, gradient = loss_of(logps, batch)
    assert not loss.requires_grad and not gradient.requires_grad and batch.importance_weights.grad is None


def test_a_surrogate_is_given_what_its_parameters_name():
    logps, batch = example()
    batch = replace(batch, rollout_logprobs=batch.old_logprobs - 0.5, sum_over_processes=lambda x: 2 * x)
    seen = {}

    def curious(log_ratio, advantages, mask, sum_over_processes, log_mismatch, old_logprobs, *, scale=1.0):
        seen.update(old=old_logprobs, log_mismatch=log_mismatch, sum=sum_over_processes(torch.ones(())))
        return scale * log_ratio

    loss_of(logps, batch, surrogate=partial(curious, scale=3.0))
    close(seen["old"], torch.where(MASK, -1.0, 0).double())
    close(seen["log_mismatch"], torch.where(MASK, 0.5, 0).double())
    assert seen["sum"] == 2
    with pytest.raises(
        ValueError, match=r"takes .rewards., which is not one of old_logprobs, log_mismatch, inverse_chances"
    ):
        FunctionLoss(function=lambda log_ratio, advantages, mask, rewards: log_ratio)
    assert FunctionLoss(function=partial(curious, old_logprobs=1)).inputs == {"sum_over_processes", "log_mismatch"}
    with pytest.raises(
        ValueError, match=r"the loss needs the rollout's log-probs, but batch\.rollout_logprobs is None"
    ):
        loss_of(logps, replace(batch, rollout_logprobs=None), surrogate=curious)


def test_an_unbiased_kl_has_the_kls_own_gradient_where_k3_has_another():
    """Over all four tokens, sampled with probability q: sum_y q(y) d (r k3) / dz = d KL(p || reference) / dz."""
    z = tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    q, ref = (torch.randn(4, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    logp, mask = z.log_softmax(-1)[:, None], torch.ones(4, 1, dtype=torch.bool)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref[:, None])).sum(), z, retain_graph=True)
    batch = make_batch(
        mask, torch.zeros(4, dtype=torch.float64), old_logprobs=q[:, None], reference_logprobs=ref[:, None]
    )
    options = {"surrogate": PPOClip(), "beta": 1.0}
    weighed = lambda mask, *, num_tokens, num_sequences: q.exp()[:, None]  # noqa: E731
    for corrected in (True, False):
        _, _, gradient = policy_loss(logp, batch, loss_reduction=weighed, kl=K3(bias_correction=corrected), **options)
        (found,) = torch.autograd.grad(logp, z, gradient, retain_graph=True)
        assert torch.allclose(found, exact, atol=1e-12) == corrected
    for kl in (torch.square, lambda log_ratio: log_ratio**2):  # torch's functions have no signature
        policy_loss(logp, batch, loss_reduction=weighed, kl=kl, **options)
    with pytest.raises(ValueError, match=r"kl\.bias_correction=True needs the rollout's log-probs"):
        batch = replace(batch, rollout_logprobs=None)
        policy_loss(logp, batch, loss_reduction=weighed, kl=K3(bias_correction=True), **options)


def pairs_of_tokens(z):
    """Log-probs (9, 2) of every row of two out of three tokens: three logits, and three for each first token."""
    rows = torch.tensor(list(itertools.product(range(3), repeat=2)))
    first, second = z[:3].log_softmax(-1), z[3:].view(3, 3).log_softmax(-1)
    return torch.stack([first[rows[:, 0]], second[rows[:, 0], rows[:, 1]]], 1)


def test_the_gradient_of_a_term_is_that_of_each_token_given_those_before_it():
    """Over all rows of two tokens. The numbers of a docstring are recomputed. The ratio of the whole row
    would have the exact gradient, and an enormous variance on long rows."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(3)]
    z = logits[0].requires_grad_()
    current, reference, rollout = map(pairs_of_tokens, logits)
    p, q, on_policy = current.sum(-1).exp(), rollout.sum(-1).exp(), current.detach()

    def gradient(value):
        return torch.autograd.grad(value, z, retain_graph=True)[0]

    def of_a_token(chance, term):
        """The gradient of the sum of each token's expected term, with the first token's chance held fixed."""
        second = (current[:, 1].exp() * term[:, 1]).view(3, 3).sum(-1)
        first = chance.view(3, 3).sum(-1).detach()
        return gradient((current[:, 0].exp() * term[:, 0] / 3).sum() + (first * second).sum())

    d = reference - current
    row_kl = gradient((p * -d.sum(-1)).sum())
    off = []
    for chance, drawn in ((p.detach(), on_policy), (q, rollout)):
        term = bias_corrected_kl(d, kl=K3(), rollout_log_ratio=current - drawn)
        found = gradient((chance[:, None] * term).sum())
        torch.testing.assert_close(found, of_a_token(chance, -d))
        off.append(float((found - row_kl).norm() / row_kl.norm()))
        whole = K3()(d) * (current - drawn).sum(-1, keepdim=True).exp()
        torch.testing.assert_close(gradient((chance[:, None] * whole).sum()), row_kl)
    docstring = " ".join(bias_corrected_kl.__doc__.split())
    assert f"by {off[0]:.2f} of its norm on-policy and by {off[1]:.2f} off-policy" in docstring

    chance = p.detach()
    k2 = gradient((chance[:, None] * K2()(d)).sum())
    torch.testing.assert_close(k2, of_a_token(chance, -d))
    bonus = gradient(
        (chance[:, None] * entropy_bonus(current, torch.ones(9, 2, dtype=torch.bool), group=torch.arange(9))).sum()
    )
    torch.testing.assert_close(bonus, of_a_token(chance, -current))
    assert not torch.allclose(bonus, gradient((p * -current.sum(-1)).sum()), atol=0.01)
    k3 = gradient((chance[:, None] * K3()(d)).sum())
    first, second = chance.view(3, 3).sum(-1), (reference[:, 1].exp() * d[:, 1]).view(3, 3).sum(-1)
    torch.testing.assert_close(k3, gradient((reference[:, 0].exp() * d[:, 0] / 3).sum() + (first * second).sum()))
    k1 = gradient((chance[:, None] * K1()(d)).sum())
    torch.testing.assert_close(k1, torch.zeros_like(k1))
    for kl in (K1(), K3()):  # of the row
        torch.testing.assert_close((chance[:, None] * kl(d)).sum(), (p * -d.sum(-1)).sum())


def test_a_subclass_with_an_objective_of_its_own_reads_the_ratio():
    class Same(losses.Reinforce):
        pass

    class Ratio(losses.Reinforce):
        def __call__(self, log_ratio, advantages, mask):
            return log_ratio.exp() * advantages[:, None]

    class Plain(losses.Reinforce):
        reads_ratio = False

        def __call__(self, log_ratio, advantages, mask):
            return 2 * log_ratio * advantages[:, None]

    read = [each.reads_ratio for each in (losses.Reinforce, Same, Ratio, Plain, losses.PPOClip)]
    assert read == [False, False, True, False, True]


WRONG_SHAPES = {
    "the mean": lambda *given: given[0].mean(),
    "one number per row, which two rows of two would spread over columns": lambda *given: given[0].sum(-1),
    "a number": lambda *given: 1.0,
    "one number per column": lambda *given: given[0].sum(0, keepdim=True),
}


@pytest.mark.parametrize("wrong", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
@pytest.mark.parametrize("setting", ["loss", "loss_reduction", "kl"])
def test_what_is_not_one_value_per_token_is_refused_by_name(setting, wrong):
    mask = torch.ones(2, 2, dtype=torch.bool)
    batch = make_batch(mask, tensor([1.0, -1.0]), reference_logprobs=torch.full((2, 2), -2.0))
    options = {"surrogate": PPOClip(), "loss_reduction": TokenMean(), "beta": 0.1, "kl": K3()}
    name = "surrogate" if setting == "loss" else setting
    function = (lambda given, **counts: wrong(given * 1.0)) if setting == "loss_reduction" else wrong
    with pytest.raises(ValueError, match=rf"^{setting}=.* returned .*; return one value per token, of shape \(B, T\)"):
        policy_loss(batch.old_logprobs, batch, **options | {name: function})


def careless_loss(log_ratio, advantages, mask):
    """Reinforce, which writes into all that it is given."""
    mask.zero_()
    advantages.mul_(2)
    return log_ratio.div_(2) * advantages[:, None]


def careless_mean(mask, **counts):
    coefficients = TokenMean()(mask, **counts)
    mask.zero_()
    return coefficients


@pytest.mark.parametrize("given", [tensor([1.0, -1.0]), tensor([[1.0, 0.5], [-1.0, -2.0]])], ids=["row", "token"])
def test_a_loss_that_writes_into_what_it_gets_changes_nothing(given):
    """Neither this update nor the next one of the same batch."""
    mask = tensor([[True, True], [True, False]])
    batch = make_batch(mask, given.clone(), reference_logprobs=torch.full((2, 2), -2.0))
    logps = batch.old_logprobs + tensor([[0.1, -0.2], [0.3, 0.0]])
    rest = {"beta": 0.1, "kl": K3()}
    expected = policy_loss(logps, batch, surrogate=losses.Reinforce(), loss_reduction=TokenMean(), **rest)
    for _ in range(2):
        loss, metrics, gradient = policy_loss(
            logps, batch, surrogate=careless_loss, loss_reduction=careless_mean, **rest
        )
        assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[2])
        assert metrics.keys() == expected[1].keys()
        assert all(torch.equal(a, b) for name in metrics for a, b in zip(metrics[name], expected[1][name], strict=True))
    assert torch.equal(batch.loss_mask, mask) and torch.equal(batch.advantages, given)


def test_bad_completions_that_have_drifted_from_the_sampler_are_left_out():
    """The mean of log p_rollout - log p_current: 0.6 nats with the mismatch in rows 0 and 2, -0.6 in row 1."""
    log_ratio, mask = torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool)
    log_mismatch = tensor([[-1.0, -0.2], [1.0, 0.2], [-1.0, -0.2]])
    advantages = tensor([-1.0, -1.0, 1.0])
    objective = OffPolicyMask(threshold=0.5)(log_ratio, advantages, mask, log_mismatch=log_mismatch)
    assert objective.tolist() == [[0.0, 0.0], [-1.0, -1.0], [1.0, 1.0]]
    since_old = OffPolicyMask(threshold=0.5, since="old")(log_mismatch, advantages, mask)
    assert (since_old == 0).all(-1).tolist() == [True, False, False]
