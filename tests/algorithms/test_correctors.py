"""The correctors: their defaults, and what joins them."""

import math
from dataclasses import replace

import pytest
import torch
from ratio_example import LN2, MASK, A, X, close, weigh
from refusals import refuses
from torch import tensor
from torch.testing import assert_close

from dllm_rl.algorithms import correctors as c
from dllm_rl.algorithms import correctors as weighing
from dllm_rl.algorithms.losses import GSPO, SequenceMean, TokenMean, TrustBand
from dllm_rl.step.correct import Rows, apply_corrector
from dllm_rl.testing import loss_of, make_batch, make_stats
from recipes.sudoku_unique import recipe as main_job


def test_none():
    weights, keep, metrics = weigh(c.NoCorrection())
    assert torch.equal(weights, MASK.double()) and torch.equal(keep, MASK)
    assert metrics == {"rollout_corr/nonfinite_fraction": 0.0}


def test_defaults():
    # rho up to 8 under a cap of 2; the band [1/2, 2] of mis, [1/2, 5] of the bare weights and of icepop.
    capped, banded = [[1, 2, 2, 0.5], [0.25, 1, 2, 0], [1, 1, 0, 0]], [[1, 2, 4, 0.5], [0, 1, 0, 0], [1, 1, 0, 0]]
    close(weigh(c.TIS())[0], capped)
    close(weigh(c.FunctionCorrector(function=c.TIS().weights))[0], capped)
    close(weigh(c.FunctionCorrector(function=c.IcePop().weights))[0], banded)
    assert c.MIS() == c.MIS(min_ratio=0.5, max_ratio=2.0, level="token", pool="product", outside="zero")
    surrogate = main_job.resolved_loss(tensor([[0.5, -0.5]]), tensor([1.0]), tensor([[True, True]]))
    assert_close(surrogate, tensor([[1.2, math.exp(-0.5)]]))  # clipped at 1 + 0.2


def test_tokens_outside_the_range_count_in_the_denominator_or_leave_it():
    zeroed, all_kept, metrics = weigh(c.IcePop())
    for corrector in (c.IcePop(outside="drop"), c.MIS(max_ratio=5.0, outside="drop")):
        weights, keep, same = weigh(corrector)
        assert torch.equal(weights, zeroed) and torch.equal(all_kept, MASK) and same == metrics
        assert torch.equal(keep, MASK & (zeroed > 0))
    refuses("outside='mask'", lambda: c.MIS(outside="mask"))


def test_qarl_is_tbpo_with_an_aligned_forward():
    ours, plain = c.QaRL(eps_high=0.01), c.TBPO(eps_high=0.01)
    assert ours.align_forward and not plain.align_forward and c.Aligned().align_forward
    assert ours.loss == plain.loss == TrustBand(eps_high=0.01, neg_low=3e-4, neg_high=7e-4)
    assert ours.max_weight == plain.max_weight == 2.0
    for ours_weights, plain_weights in zip(weigh(ours)[:2], weigh(plain)[:2], strict=True):
        assert torch.equal(ours_weights, plain_weights)
    assert c.Compose(parts=(c.TBPO(), c.Aligned())).align_forward


def test_compose_multiplies_weights_and_intersects_masks_in_any_order():
    weights, keep, metrics = weigh(c.Compose(parts=(c.TIS(cap=3.0), c.Reject(threshold=1.0))))
    close(weights, [[1, 2, 3, 0.5], [0, 0, 0, 0], [1, 1, 0, 0]])
    assert keep.any(-1).tolist() == [True, False, True]
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(3 / 9)
    assert metrics["tis/capped_fraction"] == pytest.approx(2 / 9), "of the whole mask, whatever else is rejected"
    other = weigh(c.Compose(parts=(c.Reject(threshold=1.0), c.TIS(cap=3.0))))
    assert torch.equal(other[0], weights) and torch.equal(other[1], keep) and other[2] == metrics
    squared, _, metrics = weigh(c.Compose(parts=(c.TIS(cap=3.0), c.TIS(cap=5.0))))
    close(squared[0], [1, 4, 12, 0.25])
    assert metrics["tis/capped_fraction"] == pytest.approx(2 / 9)
    assert metrics["tis/capped_fraction_2"] == pytest.approx(1 / 9)
    # The number is the part's place among all of them, and not among those with weights.
    metrics = weigh(c.Compose(parts=(c.TIS(cap=3.0), c.Aligned(), c.TIS(cap=5.0))))[2]
    assert metrics["tis/capped_fraction_3"] == pytest.approx(1 / 9) and "tis/capped_fraction_2" not in metrics


def test_tbpo_alone_is_the_papers_mean_over_sequences():
    """Rows of 1 and 3 tokens with A = 1 and -2, on-policy but for the rollout, weights w = 2^(1/1) and 1.3 (capped)."""
    mask = tensor([[True, False, False], [True, True, True]])
    mismatch = tensor([[math.log(1.2), 9.0, 9.0], [math.log(4.0)] * 3])
    advantages, corrector = tensor([1.0, -2.0]), c.TBPO(max_weight=1.3)
    weights, keep, _ = corrector.weights(make_stats(mismatch, advantages, mask))
    batch = make_batch(mask, advantages, importance_weights=weights, loss_mask=keep)
    recipe = replace(main_job, corrector=corrector)
    loss, _, gradient = recipe.policy_loss(batch.old_logprobs, batch)
    assert loss.item() == pytest.approx(-(1.2 * 1 - 1.3 * 2) / 2)
    assert_close(gradient, tensor([[-1.2 / 2, 0, 0], [1.3 * 2 / 2 / 3] * 3]))
    by_token, _, _ = replace(recipe, loss_reduction=TokenMean()).policy_loss(batch.old_logprobs, batch)
    assert by_token.item() == pytest.approx(-(1.2 * 1 - 3 * 1.3 * 2) / 4)


def test_compose_takes_the_aggregation_of_the_part_whose_surrogate_it_takes():
    assert c.Compose(parts=(c.TBPO(), c.Reject())).loss_reduction == SequenceMean()
    assert c.Compose(parts=(c.TIS(), c.Reject())).loss_reduction is None


def test_compose_takes_the_one_surrogate_that_is_brought():
    mine = GSPO(epsilon=0.1)
    assert c.Compose(parts=(c.TIS(), c.FunctionCorrector(loss=mine))).loss is mine
    assert c.Compose(parts=(c.TIS().weights, c.Reject().weights)).loss is None
    assert not c.Compose(parts=()).has_weights
    refuses("2 parts have a loss", lambda: c.Compose(parts=(c.TBPO(), c.FunctionCorrector(loss=mine))))


def test_token_tis():
    weights, keep, metrics = weigh(c.TIS(cap=3.0))
    close(weights, [[1, 2, 3, 0.5], [0.25, 1, 3, 0], [1, 1, 0, 0]])
    assert torch.equal(keep, MASK)
    assert metrics["tis/capped_fraction"] == pytest.approx(2 / 9)


def test_sequence_tis_by_product_and_by_geometric_mean():
    close(weigh(c.TIS(level="sequence", cap=3.0))[0], [[3, 3, 3, 3], [2, 2, 2, 0], [1, 1, 0, 0]])
    root2, cube2 = math.sqrt(2), 2 ** (1 / 3)
    weights = weigh(c.TIS(level="sequence", pool="geometric", cap=1.3))[0]
    close(weights, [[1.3] * 4, [cube2, cube2, cube2, 0], [1, 1, 0, 0]])
    close(weigh(c.TIS(level="sequence", pool="geometric"))[0][0], [root2] * 4)


def test_mis_and_icepop_zero_what_is_outside_but_keep_it_in_the_mask():
    weights, keep, metrics = weigh(c.MIS(min_ratio=0.4, max_ratio=5.0))
    close(weights, [[1, 2, 4, 0.5], [0, 1, 0, 0], [1, 1, 0, 0]])
    assert torch.equal(keep, MASK)
    assert metrics["rollout_corr/rollout_is_oob_ratio"] == pytest.approx(2 / 9)
    close(weigh(c.IcePop(min_ratio=0.4))[0], weights)
    close(weigh(c.MIS(min_ratio=0.5, max_ratio=3.0, level="sequence"))[0], [[0] * 4, [2, 2, 2, 0], [1, 1, 0, 0]])
    assert c.IcePop() == c.IcePop(min_ratio=0.5, max_ratio=5.0, level="token", pool="product", outside="zero")


# k3 = rho - 1 - ln rho: 0, 1 - ln 2, 3 - 2 ln 2, -1/2 + ln 2 in row 0; -3/4 + 2 ln 2, 0, 7 - 3 ln 2 in row 1.
# Row sums: 3.5 - 2 ln 2 = 2.1137 and 6.25 - ln 2 = 5.5569; means 0.5284 and 1.8523; maxima 1.6137 and 4.9206.
@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ({"level": "token", "statistic": "k3", "threshold": 1.0}, [(0, 2), (1, 2)]),
        ({"level": "token", "statistic": "k1", "threshold": 1.3}, [(0, 2), (1, 0), (1, 2)]),  # |ln rho|: 2 ln 2 = 1.386
        ({"level": "token", "statistic": "k2", "threshold": 1.0}, [(1, 2)]),  # (3 ln 2)^2/2 = 2.16, (2 ln 2)^2/2 = 0.96
        ({"statistic": "k3", "threshold": 1.0}, [(1, 0), (1, 1), (1, 2)]),
        ({"statistic": "k3", "threshold": 1.5}, [(1, 0), (1, 1), (1, 2)]),  # a mean over three tokens, not four columns
        ({"statistic": "k3", "pool": "sum", "threshold": 2.1}, [(r, t) for r in (0, 1) for t in range(4 - r)]),
        ({"statistic": "k3", "pool": "max", "threshold": 1.62}, [(1, 0), (1, 1), (1, 2)]),
        # Signed before the absolute value: row means of -ln rho are -(2/4) ln 2 = -0.347 and -(1/3) ln 2 = -0.231.
        ({"statistic": "k1", "threshold": 0.3}, [(0, t) for t in range(4)]),
        # The largest |ln rho|: 2 ln 2 = 1.386 in row 0, 3 ln 2 = 2.079 in row 1, where -ln rho is 1.386 at most.
        ({"statistic": "k1", "pool": "max", "threshold": 1.5}, [(1, 0), (1, 1), (1, 2)]),
    ],
)
def test_rejection_leaves_the_mask(options, dropped):
    weights, keep, metrics = weigh(c.Reject(**options))
    expected = MASK.clone()
    for row, position in dropped:
        expected[row, position] = False
    assert torch.equal(keep, expected)
    assert torch.equal(weights, expected.double()), "rejection does not weigh"
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(len(dropped) / 9)
    rows = len({row for row, _ in dropped})
    assert metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == pytest.approx(rows / 3)


@pytest.mark.parametrize(("pool", "statistic"), [("sum", 4.0), ("mean", 1.0), ("max", 20.0)])
def test_rejection_counts_a_log_ratio_of_at_most_twenty(pool, statistic):
    """Log-ratios of 900, -12, -2 and -2: the first counts 20. The sum is 4, the mean 1, and the largest 20."""
    log_ratios, mask = torch.tensor([[900.0, -12.0, -2.0, -2.0]]), torch.ones(1, 4, dtype=torch.bool)
    for bound, is_kept in ((statistic, True), (statistic - 0.01, False)):
        corrector = c.Reject(statistic="k1", pool=pool, threshold=bound)
        assert corrector.weights(make_stats(log_ratios, torch.ones(1), mask))[1].all().item() == is_kept


def test_edges_belong_to_what_is_kept():
    zeros = torch.zeros_like(X)
    for corrector in (
        c.MIS(min_ratio=1.0, max_ratio=1.0),
        c.Reject(threshold=0.0),
        c.Reject(level="token", threshold=0.0),
    ):
        weights, keep, metrics = corrector.weights(make_stats(zeros, A, MASK))
        assert torch.equal(keep, MASK) and (weights[MASK] == 1).all()
        assert set(metrics.values()) == {0.0}
    assert c.TIS(cap=1.0).weights(make_stats(zeros, A, MASK))[2]["tis/capped_fraction"] == 0
    assert c.TBPO(max_weight=1.0).weights(make_stats(zeros, A, MASK))[2]["tbpo/capped_fraction"] == 0


def test_rows_without_tokens_and_tokens_without_a_ratio_count_nowhere():
    """Row 2 has no token, and one of row 1's four has no finite ratio: the numbers are those of the two rows' seven."""
    x, mask = X.clone(), MASK.clone()
    x[1, 3], mask[1, 3], mask[2] = math.nan, True, False
    metrics = c.Reject(threshold=1.0).weights(make_stats(x, A, mask))[2]
    assert metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == pytest.approx(1 / 2)
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(3 / 7)
    assert metrics["rollout_corr/nonfinite_fraction"] == pytest.approx(1 / 8)
    # Products 4 and 2: (4 + 2)^2 / (2 * 20); geometric mean of row 1 over its three tokens.
    assert c.AIS().weights(make_stats(x, A, mask))[2]["ais/ess"] == pytest.approx(36 / 40)
    close(c.TBPO(max_weight=9.0).weights(make_stats(x, A, mask))[0][1, :3], [2 ** (1 / 3)] * 3)


# AIS. Sequence weights (products) 4, 2, 1: rho = 7^2 / (3 * 21) = 7/9. D = ln 2 (0+1+2+1 + 2+0+3 + 0+0)/9 = ln 2.
# Token weights sum to 18.75, mean 25/12; squares sum to 88.3125: variance 88.3125/9 - (25/12)^2.
CV = math.sqrt(88.3125 / 9 - (25 / 12) ** 2) / (25 / 12)
ALARM = 1 - (7 / 9) * (0.05 / (LN2 + 0.05)) / (1 + CV)


def test_ais():
    weights, _, metrics = weigh(c.AIS(cap=3.0))
    assert metrics["ais/ess"] == pytest.approx(7 / 9, rel=1e-12)
    assert metrics["ais/D"] == pytest.approx(LN2, rel=1e-12)
    assert metrics["ais/CV"] == pytest.approx(CV, rel=1e-12)
    assert metrics["ais/lambda"] == pytest.approx(ALARM, rel=1e-12)
    mixed = lambda w: 1 + ALARM * (w - 1)  # noqa: E731
    expected = [[1, mixed(2), mixed(3), mixed(0.5)], [mixed(0.25), 1, mixed(3), 0], [1, 1, 0, 0]]
    assert_close(weights, tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)


def test_ais_geometric_reliability():
    # Sequence weights sqrt 2, 2^(1/3), 1.
    rows = [math.sqrt(2), 2 ** (1 / 3), 1.0]
    expected = sum(rows) ** 2 / (3 * sum(w * w for w in rows))
    assert weigh(c.AIS(pool="geometric"))[2]["ais/ess"] == pytest.approx(expected, rel=1e-12)


def test_ais_reliability_of_extreme_sequences_is_a_number():
    # Row sums 1600 and 0, of which the first counts as 20: (e^20 + 1)^2 / (2 (e^40 + 1)) is 1/2 and e^-20.
    mismatch = tensor([[800.0, 800.0], [0.0, 0.0]], dtype=torch.float64)
    metrics = c.AIS().weights(make_stats(mismatch, A[:2], torch.ones(2, 2, dtype=torch.bool)))[2]
    assert metrics["ais/ess"] == pytest.approx(0.5 + math.exp(-20), rel=1e-12)


def test_alarm_grows_with_each_signal():
    base = weighing.ais_lambda(0.8, 0.1, 0.3, tau=0.05)
    assert base < weighing.ais_lambda(0.7, 0.1, 0.3, tau=0.05)
    assert base < weighing.ais_lambda(0.8, 0.2, 0.3, tau=0.05)
    assert base < weighing.ais_lambda(0.8, 0.1, 0.4, tau=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_lambda_zero_is_none_and_lambda_one_is_tis_bit_for_bit(seed):
    generator = torch.Generator().manual_seed(seed)
    mismatch = torch.randn(16, 33, generator=generator)
    mask, advantages = torch.rand(16, 33, generator=generator) < 0.7, torch.randn(16, generator=generator)
    logps = -1 + 0.1 * torch.randn(16, 33, generator=generator)
    for lam, other in ((0.0, c.NoCorrection()), (1.0, c.TIS(cap=1.7))):
        ours = c.AIS(cap=1.7, lambda_fn=lambda rho, divergence, variation, *, tau, lam=lam: lam)
        w, _, _ = ours.weights(make_stats(mismatch, advantages, mask))
        w0, _, _ = other.weights(make_stats(mismatch, advantages, mask))
        assert torch.equal(w, w0)
        (loss, _, gradient), (loss0, _, gradient0) = (
            loss_of(corrector, make_batch(mask, advantages, importance_weights=weights), logps)
            for corrector, weights in ((ours, w), (other, w0))
        )
        assert torch.equal(loss, loss0) and torch.equal(gradient, gradient0)


def test_a_lambda_outside_the_unit_interval_is_brought_back():
    for value, lam in ((3.0, 1.0), (-2.0, 0.0)):
        ours = c.AIS(lambda_fn=lambda rho, divergence, variation, *, tau, value=value: value)
        assert weigh(ours)[2]["ais/lambda"] == lam


def test_tbpo_weight_is_the_geometric_ratio_kept_in_a_two_sided_band():
    # Row logs: (1/2) ln 2, (1/3) ln 2, 0; c = 1.3 has log 0.2624, between the two. Mirrored, the bound is 1/1.3.
    weights, keep, metrics = weigh(c.TBPO(max_weight=1.3))
    close(weights, [[1.3] * 4, [2 ** (1 / 3)] * 3 + [0], [1, 1, 0, 0]])
    assert torch.equal(keep, MASK)
    assert metrics["tbpo/capped_fraction"] == pytest.approx(4 / 9)
    mirrored = c.TBPO(max_weight=1.3).weights(make_stats(-X, A, MASK))[0]
    close(mirrored[0], [1 / 1.3] * 4)
    close(mirrored[1, :3], [2 ** (-1 / 3)] * 3)


def test_values_that_cannot_be_are_errors():
    for wrong, message in (
        (lambda: c.TIS(level="row"), "level='row' must be"),
        (lambda: c.TIS(level="sequence", pool="mean"), "pool='mean' must be"),
        (lambda: c.Reject(statistic="k4"), "statistic='k4' must be"),
        (lambda: c.Reject(pool="median"), "pool='median' must be"),
        (lambda: c.Reject(level="row"), "level='row' must be"),
        (lambda: weigh(c.AIS(tau=0.0)), "tau=0.0 must be above 0"),
        (lambda: weigh(c.TBPO(max_weight=0.5)), "max_weight=0.5 must be at least 1"),
        (lambda: c.MIS(min_ratio=1.5), r"min_ratio=1.5 must lie in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def in_front(x, value):
    """Two columns of padding and prompt before the example."""
    return torch.cat([torch.full((len(x), 2), value, dtype=x.dtype), x], dim=1)


def test_means_over_a_row_are_over_its_finite_tokens_behind_a_prompt():
    """Row 0 without its 4, row 1 without its 1, two columns of padding and prompt before them.

    What is left: 1, 2, -, 1/2 (product 1, mean of logs 0), 1/4, -, 8 (product 2, geometric mean sqrt 2), 1, 1.
    """
    x, mask = in_front(X, 7.0), in_front(MASK, False)
    x[0, 4], x[1, 3] = math.inf, math.nan
    left = mask.clone()
    left[0, 4] = left[1, 3] = False
    weights, keep, metrics = c.TIS(level="sequence", pool="geometric").weights(make_stats(x, A, mask))
    assert torch.equal(keep, left)
    close(weights, [[1] * 6, [1, 1, math.sqrt(2), 1, math.sqrt(2), 1], [1] * 6])
    assert metrics["rollout_corr/nonfinite_fraction"] == pytest.approx(2 / 9)
    close(c.TIS(level="sequence").weights(make_stats(x, A, mask))[0], [[1] * 6, [1, 1, 2, 1, 2, 1], [1] * 6])

    # k3: row 0 has 0, 1 - ln 2, -1/2 + ln 2: mean .5/3 = .1667 over three tokens (.125 over four);
    # row 1 has -3/4 + 2 ln 2 and 7 - 3 ln 2: mean (6.25 - ln 2)/2 = 2.778 over two (1.852 over three).
    for bound, rows in ((0.15, [2]), (0.18, [0, 2]), (2.5, [0, 2]), (2.8, [0, 1, 2])):
        weights, keep, metrics = c.Reject(statistic="k3", threshold=bound).weights(make_stats(x, A, mask))
        assert keep.any(-1).nonzero()[:, 0].tolist() == rows
        assert torch.equal(keep, left & keep.any(-1, keepdim=True)) and torch.equal(weights, torch.ones_like(x))
        lost = sum((3, 2, 2)[row] for row in range(3) if row not in rows)
        assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(lost / 7)
        assert metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == pytest.approx((3 - len(rows)) / 3)

    # AIS: products 1, 2, 1: rho = 4^2 / (3 * 6); D = ln 2 (0 + 1 + 1 + 2 + 3 + 0 + 0) / 7; weights sum to 13.75.
    _, keep, metrics = c.AIS().weights(make_stats(x, A, mask))
    assert torch.equal(keep, left)
    assert metrics["ais/ess"] == pytest.approx(16 / 18, rel=1e-12)
    assert metrics["ais/D"] == pytest.approx(LN2, rel=1e-12)
    mean = 13.75 / 7
    assert metrics["ais/CV"] == pytest.approx(math.sqrt(71.3125 / 7 - mean**2) / mean, rel=1e-12)


def test_ais_mixes_weights_of_sequences_where_told():
    mixed = c.AIS(level="sequence", cap=3.0, lambda_fn=lambda *signals, tau: 0.5)
    close(weigh(mixed)[0], [[2, 2, 2, 2], [1.5, 1.5, 1.5, 0], [1, 1, 0, 0]])


def test_alarm_depends_on_the_length_and_not_with_geometric_means():
    """The numbers of `adaptive_weights`: D = 0.020 nats a token, Gaussian, independent, E w = 1."""
    spread, generator = 0.020 * math.sqrt(math.pi / 2), torch.Generator().manual_seed(0)
    for length, product in ((16, 0.31), (1024, 0.63)):
        x = torch.randn(1024, length, generator=generator, dtype=torch.float64) * spread - spread**2 / 2
        exact = 1 - math.exp(-length * spread**2) * (0.05 / 0.07) / (1 + math.sqrt(math.expm1(spread**2)))
        assert exact == pytest.approx(product, abs=0.005)
        for pool, expected in (("product", product), ("geometric", 0.30)):
            found = c.AIS(pool=pool).weights(make_stats(x, torch.ones(1024), torch.ones_like(x, dtype=torch.bool)))[2]
            assert found["ais/lambda"] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.importance_weights,
        tuple,
        lambda weights: None,
        lambda weights: weights._replace(importance_weights=weights.importance_weights.mean()),
        lambda weights: weights._replace(loss_mask=weights.loss_mask.float()),
        lambda weights: weights._replace(loss_mask=weights.loss_mask[:, 0]),
    ],
)
def test_what_is_not_weights_and_a_mask_for_each_token_is_refused_by_name(change):
    mask = torch.ones(2, 3, dtype=torch.bool)
    stats = make_stats(torch.zeros(2, 3), torch.ones(2), mask)
    corrector = c.FunctionCorrector(function=lambda given: change(c.TIS().weights(given)))
    c.check_weights(c.TIS(), c.TIS().weights(stats), mask)
    said = r"^corrector=FunctionCorrector.* returned .*; return TokenWeights\("
    refuses(said, lambda: c.check_weights(corrector, corrector.weights(stats), mask))
    refuses(said, lambda: c.Compose(parts=(corrector, c.Reject())).weights(stats))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w._replace(loss_mask=torch.ones_like(w.loss_mask)), "tokens that are not in stats.mask"),
        (lambda w: w._replace(importance_weights=w.importance_weights * math.nan), "the weight nan; weights must be"),
        (lambda w: w._replace(importance_weights=w.importance_weights / 0), "the weight inf; weights must be finite"),
        (lambda w: w._replace(importance_weights=-w.importance_weights), "the weight -1.0; weights must be finite"),
    ],
)
def test_values_that_would_train_something_else_are_refused(change, said):
    mask = tensor([[True, True, False]])
    stats = make_stats(torch.zeros(1, 3), torch.ones(1), mask)
    corrector = c.FunctionCorrector(function=lambda given: change(c.TIS().weights(given)))
    with pytest.raises(ValueError, match=f"^corrector=FunctionCorrector.* {said}"):
        c.check_weights(corrector, corrector.weights(stats), mask)
    outside = c.TIS().weights(stats)
    outside.importance_weights[0, 2] = math.nan  # which nothing reads
    c.check_weights(corrector, outside, mask)


class Careless(c.Corrector):
    """Weights of 1, and zeros over all that it was given."""

    def weights(self, stats):
        result = super().weights(stats)
        for values in vars(stats).values():
            if isinstance(values, torch.Tensor):
                values.zero_()
        return result


def test_a_corrector_that_writes_into_what_it_gets_changes_nothing():
    mask = tensor([[True, True, False]])
    stats = make_stats(tensor([[0.5, -0.5, 0.0]]), torch.ones(1), mask)
    rows = Rows(stats, mask, torch.ones(1, 3, dtype=torch.long), tensor([True]), torch.ones(1), stats.advantages)
    before = {name: values.clone() for name, values in vars(stats).items() if isinstance(values, torch.Tensor)}
    found, metrics = apply_corrector(Careless(), rows)
    assert torch.equal(found.loss_mask, mask) and metrics == apply_corrector(c.NoCorrection(), rows)[1]
    assert all(torch.equal(vars(stats)[name], values) for name, values in before.items())
    both = apply_corrector(c.Compose(parts=(Careless(), c.TIS(cap=1.5))), rows)[0]
    assert torch.equal(both.importance_weights, apply_corrector(c.TIS(cap=1.5), rows)[0].importance_weights)


def test_drawn_tokens_count_by_their_weight():
    """d = ln 2 and ln 8, of which the first stands for three tokens: mean d 1.5 ln 2, a quarter of them capped."""
    x, mask, weights = tensor([[2.0, 8.0, 1.0]]).log(), tensor([[True, True, False]]), tensor([[3.0, 1.0, 0.0]])
    stats = replace(make_stats(x, torch.ones(1), mask), inverse_chances=weights)
    found = c.TIS(cap=4.0).weights(stats)
    torch.testing.assert_close(found.importance_weights, tensor([[2.0, 4.0, 1.0]]))
    assert found.metrics["tis/capped_fraction"] == pytest.approx(1 / 4)
    pooled = c.TIS(cap=9.0, level="sequence", pool="geometric").weights(stats).importance_weights
    torch.testing.assert_close(pooled[:, :2], tensor([[2**1.5] * 2]))
    torch.testing.assert_close(c.TBPO(max_weight=9.0).weights(stats).importance_weights[:, :2], tensor([[2**1.5] * 2]))
    assert c.MIS(max_ratio=4.0).weights(stats).metrics["rollout_corr/rollout_is_oob_ratio"] == pytest.approx(1 / 4)
    told = c.AIS(pool="geometric").weights(stats).metrics
    mean, second = (3 * 2 + 8) / 4, (3 * 4 + 64) / 4
    assert told["ais/D"] == pytest.approx(1.5 * math.log(2))
    assert told["ais/CV"] == pytest.approx(math.sqrt(second - mean**2) / mean)
