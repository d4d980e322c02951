"""The mismatch metrics against numbers worked by hand, on the (B=3, T=4) example of the correctors' tests."""

import math
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from torch import tensor

from dllm_rl.algorithms.mismatch import (
    mismatch_metrics,
    off_policy_metrics,
    repeated_trigrams,
    step_metrics,
    symptom_metrics,
)
from dllm_rl.testing import make_batch

RHO = tensor([[1, 2, 4, 0.5], [0.25, 1, 8, 100], [1, 1, 100, 100]], dtype=torch.float64)
MASK = tensor([[True] * 4, [True, True, True, False], [True, True, False, False]])
X = RHO.log()
LN2 = math.log(2)


def metrics(**options):
    values = mismatch_metrics(X, MASK, **options)
    return {name.removeprefix("rollout_corr/"): value for name, value in values.items()}


def test_divergences():
    # ln rho / ln 2: 0 1 2 -1 | -2 0 3 | 0 0. Sum 3; absolute sum 9; sum of rho - 1: 18.75 - 9 = 9.75.
    m = metrics()
    assert m["kl"] == pytest.approx(-3 * LN2 / 9)
    assert m["k3_kl"] == pytest.approx((9.75 - 3 * LN2) / 9)
    assert m["abs_log_ratio_mean"] == pytest.approx(LN2)
    assert m["abs_log_ratio_max"] == pytest.approx(3 * LN2)
    # Row means of -ln rho: -1/2, -1/3, 0 times ln 2.
    assert m["log_ppl_diff"] == pytest.approx(-(1 / 2 + 1 / 3) / 3 * LN2)
    assert m["log_ppl_abs_diff"] == pytest.approx((1 / 2 + 1 / 3) / 3 * LN2)
    assert m["log_ppl_diff_max"] == pytest.approx(0, abs=1e-15)
    assert m["log_ppl_diff_min"] == pytest.approx(-LN2 / 2)
    assert m["ppl_ratio"] == pytest.approx((2**-0.5 + 2 ** (-1 / 3) + 1) / 3)
    # Squares of rho sum to 88.3125; products 4, 2, 1 have squares 16, 4, 1.
    assert m["chi2_token"] == pytest.approx(88.3125 / 9 - 1)
    assert m["chi2_seq"] == pytest.approx(21 / 3 - 1)
    assert m["ess"] == pytest.approx(18.75**2 / (9 * 88.3125))
    assert m["rho_max"] == pytest.approx(8)
    assert m["nonfinite_fraction"] == 0


def test_each_denoising_step_has_its_largest_ratio_and_its_percentile():
    # |ln rho| / ln 2: 0 1 2 1 | 2 0 3 | 0 0.
    steps = tensor([[0, 0, 1, 1], [0, 0, 1, -1], [0, 0, 0, 0]])
    names = [f"rollout_corr/abs_log_ratio_{kind}/step_{step}" for step in (0, 1) for kind in ("max", "p99")]
    found = step_metrics(X, MASK, steps)
    assert found == pytest.approx(dict(zip(names, [2 * LN2, 2 * LN2, 3 * LN2, 3 * LN2], strict=True)))
    assert step_metrics(X, ~MASK & (steps < 0), steps) == {}
    # Ten steps of 100 tokens are eight groups; steps 0 and 1 are the first one, with 199 finite tokens.
    values, written = torch.zeros(1, 1000), torch.arange(1000)[None] // 100
    values[0, :3] = tensor([-7.0, 5.0, torch.inf])
    found = step_metrics(values, torch.ones_like(written, dtype=torch.bool), written)
    assert {name.rpartition("_")[2] for name in found} == set("01234567")
    assert found["rollout_corr/abs_log_ratio_max/step_0"] == 7
    assert found["rollout_corr/abs_log_ratio_p99/step_0"] == 5  # the 198th of 199


def test_weight_metrics_are_those_of_the_truncated_weights():
    # min(rho, 3): 1 2 3 .5 | .25 1 3 | 1 1: sum 12.75, squares 1+4+9+.25+.0625+1+9+1+1 = 26.3125.
    m = metrics(high=3.0)
    mean = 12.75 / 9
    assert m["rollout_is_mean"] == pytest.approx(mean)
    assert m["rollout_is_std"] == pytest.approx(math.sqrt(26.3125 / 9 - mean**2))
    assert m["rollout_is_eff_sample_size"] == pytest.approx(12.75**2 / (9 * 26.3125))
    assert (m["rollout_is_min"], m["rollout_is_max"]) == (pytest.approx(0.25), 3)
    assert m["rollout_is_ratio_fraction_high"] == pytest.approx(2 / 9)
    assert m["rollout_is_ratio_fraction_low"] == pytest.approx(1 / 9)
    # Row means of the weights: 6.5/4, 4.25/3, 1.
    rows = [1.625, 4.25 / 3, 1.0]
    assert m["rollout_is_seq_mean"] == pytest.approx(sum(rows) / 3)
    center = sum(rows) / 3
    assert m["rollout_is_seq_std"] == pytest.approx(math.sqrt(sum((r - center) ** 2 for r in rows) / 2))
    assert (m["rollout_is_seq_min"], m["rollout_is_seq_max"]) == (pytest.approx(1), pytest.approx(1.625))
    assert m["rollout_is_seq_max_deviation"] == pytest.approx(0.625)
    # Raw row means 7.5/4 = 1.875, 9.25/3 = 3.083, 1.
    assert m["rollout_is_seq_fraction_high"] == pytest.approx(1 / 3)
    assert m["rollout_is_seq_fraction_low"] == 0


def test_perplexities_need_the_learners_log_probs():
    # -1 everywhere under the learner: ppl e. The rollout's row mean is -1 - mean ln rho.
    m = metrics(old=torch.full((3, 4), -1.0, dtype=torch.float64))
    assert m["training_ppl"] == pytest.approx(math.e)
    assert m["training_log_ppl"] == pytest.approx(1)
    logs = [1 + LN2 / 2, 1 + LN2 / 3, 1]
    assert m["rollout_log_ppl"] == pytest.approx(sum(logs) / 3)
    assert m["rollout_ppl"] == pytest.approx(sum(math.exp(x) for x in logs) / 3)
    assert "training_ppl" not in metrics()


def test_contributions_by_sign_of_the_advantage():
    # -(rho - 1) A: row 0, A = 1: -(0 + 1 + 3 - 0.5) = -3.5; row 1, A = -2: 2 (-0.75 + 0 + 7) = 12.5; over 9 tokens.
    m = metrics(advantages=tensor([1.0, -2.0, 0.0], dtype=torch.float64))
    assert m["contribution_positive"] == pytest.approx(-3.5 / 9)
    assert m["contribution_negative"] == pytest.approx(12.5 / 9)


def test_agreement_is_exactly_neutral():
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.7
    old = torch.full((5, 7), -0.3)
    values = mismatch_metrics(torch.zeros(5, 7), mask, old=old, advantages=torch.ones(5))
    ones = {"rollout_is_mean", "rollout_is_min", "rollout_is_max", "rollout_is_eff_sample_size", "rollout_is_seq_mean"}
    ones |= {"rollout_is_seq_min", "rollout_is_seq_max", "ess", "rho_max", "ppl_ratio"}
    for name, value in values.items():
        short = name.removeprefix("rollout_corr/")
        if (short != "rows" and "_ppl" not in short) or "diff" in short:
            assert value == (1.0 if short in ones else 0.0), name
            assert math.copysign(1, value) == 1, f"{name} is -0.0"


def test_rows_without_tokens_are_no_sequences_and_nonfinite_ratios_are_counted():
    plain = mismatch_metrics(X[:2], MASK[:2])
    mask = MASK.clone()
    mask[2] = False
    assert mismatch_metrics(X, mask) == plain
    x, mask = X.clone(), MASK.clone()
    x[2, 0], x[2, 1] = -math.inf, math.nan
    m = mismatch_metrics(x, mask)
    assert m.pop("rollout_corr/nonfinite_fraction") == pytest.approx(2 / 9)
    assert m == {name: value for name, value in plain.items() if name != "rollout_corr/nonfinite_fraction"}
    with pytest.raises(ValueError, match="no token with a finite log_mismatch"):
        mismatch_metrics(X, torch.zeros_like(MASK))


def test_a_row_of_which_some_tokens_are_not_finite_counts_those_that_are():
    """Two columns of prompt stand in front, and one token of row 1 has no finite ratio: that row is 1/4, 8."""
    x, mask = (torch.nn.functional.pad(tensor, (2, 0), value=value) for tensor, value in ((X, 3.0), (MASK, False)))
    x, mask = x[:2].clone(), mask[:2]
    x[1, 3] = math.inf
    old = torch.full(x.shape, -1.0, dtype=torch.float64)
    old[1, 3], old[:, :2] = -math.inf, -7.0
    m = mismatch_metrics(x, mask, old=old, advantages=tensor([1.0, -2.0], dtype=torch.float64), high=3.0)
    m = {name.removeprefix("rollout_corr/"): value for name, value in m.items()}
    assert m["nonfinite_fraction"] == pytest.approx(1 / 7)
    # Row sums of ln rho: 2 ln 2 over four tokens, ln 2 over two.
    assert m["log_ppl_diff"] == pytest.approx(-LN2 / 2)
    assert m["chi2_seq"] == pytest.approx((16 + 4) / 2 - 1)
    assert m["training_ppl"] == pytest.approx(math.e)
    assert m["rollout_log_ppl"] == pytest.approx(1 + LN2 / 2)
    # -(rho - 1) A: -3.5 as above; 2 (-3/4 + 7) = 12.5; over six tokens.
    assert m["contribution_positive"] == pytest.approx(-3.5 / 6)
    assert m["contribution_negative"] == pytest.approx(12.5 / 6)
    # min(rho, 3): row means 6.5 / 4 and 3.25 / 2, both 1.625.
    assert m["rollout_is_mean"] == pytest.approx(9.75 / 6)
    assert (m["rollout_is_seq_min"], m["rollout_is_seq_max"]) == (pytest.approx(1.625), pytest.approx(1.625))
    # Symptoms: the token whose log-prob is -inf is an error, prompts are not.
    found = symptom_metrics(torch.arange(12).view(2, 6), mask, tensor([1.0, -1.0]), old=old)
    assert (found["symptoms/error_tokens_positive"], found["symptoms/error_tokens_negative"]) == (0, 1 / 3)


def test_bounds_and_their_edges():
    # The bound is 2 unless told otherwise: min(rho, 2) sums to 1+2+2+.5 + .25+1+2 + 1+1 = 10.75; rho > 2 twice.
    m = metrics()
    assert m["rollout_is_mean"] == pytest.approx(10.75 / 9)
    assert m["rollout_is_ratio_fraction_high"] == pytest.approx(2 / 9)
    # A ratio on the bound is within it.
    ones = mismatch_metrics(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), high=1.0)
    assert ones["rollout_corr/rollout_is_mean"] == 1
    edges = ("ratio_fraction_high", "ratio_fraction_low", "seq_fraction_high", "seq_fraction_low")
    assert [ones[f"rollout_corr/rollout_is_{name}"] for name in edges] == [0, 0, 0, 0]
    # The largest deviation of a row's mean from 1 may lie below it: means 1/4 and 1.
    low = mismatch_metrics(tensor([[-2 * LN2], [0.0]]), torch.ones(2, 1, dtype=torch.bool))
    assert low["rollout_corr/rollout_is_seq_max_deviation"] == pytest.approx(0.75)


def test_extreme_ratios_are_clamped_before_exp():
    m = mismatch_metrics(tensor([[80.0, -80.0]]), torch.ones(1, 2, dtype=torch.bool), high=math.inf)
    assert m["rollout_corr/rollout_is_max"] == pytest.approx(math.exp(20))
    assert m["rollout_corr/rollout_is_min"] == pytest.approx(math.exp(-20))
    assert m["rollout_corr/chi2_token"] == pytest.approx((math.exp(40) + math.exp(-40)) / 2 - 1)
    assert m["rollout_corr/abs_log_ratio_max"] == 80


def test_chi2_of_sequences_clamps_the_sum_before_doubling_it():
    m = mismatch_metrics(tensor([[15.0, 15.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert m["rollout_corr/chi2_seq"] == pytest.approx(math.exp(40))


@pytest.mark.parametrize("live", [(0, 3), ()])
def test_every_mean_is_unbiased_for_all_rows_over_all_samples_of_the_groups_without_advantage(live):
    """Six groups of two rows of unequal lengths; two of the others are scored: average over all C(4, 2) or C(6, 2)."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, old, advantages = 0.7 * draw(12, 5), -1 - draw(12, 5).abs(), torch.zeros(12, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 2, 1, 4, 3, 5, 1, 1, 2, 0, 4, 5])[:, None]  # one row without tokens
    for group in live:
        advantages[2 * group : 2 * group + 2] = tensor([1.0, -0.5])
    measure = lambda weights: mismatch_metrics(x, mask, old=old, advantages=advantages, row_weights=weights)  # noqa: E731
    every = measure(torch.ones(12))
    assert every == mismatch_metrics(x, mask, old=old, advantages=advantages)
    others = [group for group in range(6) if group not in live]
    samples = []
    for pair in combinations(others, 2):
        weights = torch.zeros(6, dtype=torch.float64)
        weights[list(live)], weights[list(pair)] = 1.0, len(others) / 2
        hidden = torch.where(weights.repeat_interleave(2)[:, None] > 0, x, math.nan)  # what is not scored is not read
        found = mismatch_metrics(hidden, mask, old=old, advantages=advantages, row_weights=weights.repeat_interleave(2))
        assert found == pytest.approx(measure(weights.repeat_interleave(2)))
        samples.append({name.removeprefix("rollout_corr/"): value for name, value in found.items()})
    every = {name.removeprefix("rollout_corr/"): value for name, value in every.items()}
    ratios = {"ess", "rollout_is_std", "rollout_is_eff_sample_size", "rollout_is_seq_std", "rows"}
    extremes = {name for name in every if name.endswith(("max", "min", "max_deviation"))}
    for name in every.keys() - ratios - extremes:
        mean = sum(sample[name] for sample in samples) / len(samples)
        assert mean == pytest.approx(every[name], rel=1e-9, abs=1e-12), name
    assert len({sample["k3_kl"] for sample in samples}) == len(samples), "the sample must matter"
    for sample in samples:
        assert 0 < sample["ess"] <= 1 and 0 < sample["rollout_is_eff_sample_size"] <= 1
        assert sample["rho_max"] <= every["rho_max"]
        if live:  # advantage 0 contributes nothing: these have no sampling error at all
            assert sample["contribution_positive"] == pytest.approx(every["contribution_positive"])
    assert max(sample["rho_max"] for sample in samples) == every["rho_max"]


def test_metrics_of_tokens_are_unbiased_over_all_draws_of_steps():
    """Four steps of two tokens in two rows, each drawn with its own chance: the sum over all 16 draws."""
    generator = torch.Generator().manual_seed(3)
    x = 0.7 * torch.randn(2, 4, generator=generator, dtype=torch.float64)
    mask, advantages = torch.ones(2, 4, dtype=torch.bool), tensor([1.0, -0.5], dtype=torch.float64)
    chances = tensor([[0.3, 0.3, 0.5, 0.5], [1.0, 1.0, 0.8, 0.8]], dtype=torch.float64)
    every = mismatch_metrics(x, mask, advantages=advantages)
    mean = dict.fromkeys(every, 0.0)
    for drawn in product((True, False), repeat=3):
        flags = tensor([drawn[0], drawn[0], drawn[1], drawn[1], True, True, drawn[2], drawn[2]]).view(2, 4)
        likely = torch.where(flags, chances, 1 - chances)[:, ::2].prod()
        hidden = torch.where(flags, x, math.nan)  # what is not scored is not read
        found = mismatch_metrics(hidden, mask, advantages=advantages, inverse_chances=flags / chances)
        for name, value in found.items():
            mean[name] += float(likely * value)
    names = ("kl", "k3_kl", "abs_log_ratio_mean", "chi2_token", "rollout_is_mean", "contribution_positive")
    for name in (f"rollout_corr/{name}" for name in (*names, "contribution_negative", "rollout_is_ratio_fraction_low")):
        assert mean[name] == pytest.approx(every[name], rel=1e-9), name
    left_out = {name.removeprefix("rollout_corr/") for name in every.keys() - found.keys()}
    assert left_out == {name for name in metrics() if "seq" in name or "ppl" in name}


def test_drawn_tokens_count_by_their_weight_in_percentiles_and_shares():
    """One step: |ln rho| 0.1 and 3, of which the second stands for 20 tokens, and the first for 2,000 or 1,000."""
    x, mask, steps = tensor([[0.1, -3.0]]), tensor([[True, True]]), tensor([[0, 0]])
    for weight, percentile in ((2000.0, 0.1), (1000.0, 3.0)):
        found = step_metrics(x, mask, steps, tensor([[weight, 20.0]]))
        assert found["rollout_corr/abs_log_ratio_p99/step_0"] == pytest.approx(percentile)
    old = tensor([[-1.0, -20.0, -30.0]])
    found = symptom_metrics(
        tensor([[5, 6, 7]]), tensor([[True] * 3]), torch.ones(1), old=old, inverse_chances=tensor([[2.0, 6.0, 0.0]])
    )
    assert found["symptoms/error_tokens_positive"] == pytest.approx(6 / 8)


def test_a_sample_of_rows_that_agree_is_exactly_neutral():
    mask = torch.arange(4) < torch.tensor([4, 1, 3, 2, 2, 4])[:, None]
    x, weights = torch.zeros(6, 4), tensor([1.0, 1.0, 2.0, 2.0, 0.0, 0.0])
    x[4:] = 9.0  # not scored: must not be read
    exact = {"ess": 1, "rollout_is_mean": 1, "rollout_is_std": 0, "rollout_is_seq_mean": 1, "rollout_is_seq_std": 0}
    exact |= {"rollout_is_eff_sample_size": 1, "ppl_ratio": 1, "k3_kl": 0, "chi2_token": 0, "chi2_seq": 0, "rows": 4}
    found = mismatch_metrics(x, mask, row_weights=weights)
    assert {name: found[f"rollout_corr/{name}"] for name in exact} == exact


def test_nonfinite_ratios_in_a_sample_count_by_weight():
    # Rows of 2, 2, 2 tokens weigh 1, 2, 0: one bad token in the second is two of six, and four finite ones remain.
    x = tensor([[LN2, LN2], [math.inf, -LN2], [5.0, 5.0]], dtype=torch.float64)
    found = mismatch_metrics(x, torch.ones(3, 2, dtype=torch.bool), row_weights=tensor([1.0, 2.0, 0.0]))
    assert found["rollout_corr/nonfinite_fraction"] == pytest.approx(2 / 6)
    assert found["rollout_corr/kl"] == pytest.approx(-(2 * LN2 - 2 * LN2) / 4, abs=1e-15)
    assert found["rollout_corr/abs_log_ratio_mean"] == pytest.approx((2 * LN2 + 2 * LN2) / 4)
    assert found["rollout_corr/log_ppl_abs_diff"] == pytest.approx((LN2 + 2 * LN2) / 3)


def test_repeats():
    #          1 2 3 1 2 3 4 2 3: trigrams 123 231 312 123* 234 342 423; the starred stood at 0, so 3, 4, 5 are marked.
    tokens = tensor([[1, 2, 3, 1, 2, 3, 4, 2, 3], [5, 5, 5, 5, 6, 7, 8, 9, 9]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    # Row 1: 555 at 0 and again at 1: positions 1, 2, 3.
    expected = [[3, 4, 5], [1, 2, 3]]
    assert [row.nonzero()[:, 0].tolist() for row in repeated_trigrams(tokens, mask)] == expected
    # Only marked tokens make trigrams: without position 2, row 0 reads 1 2 1 2 3 4 2 3.
    mask[0, 2] = False
    assert repeated_trigrams(tokens, mask)[0].nonzero()[:, 0].tolist() == []
    # Marks stand at the tokens' own places: 7 8 9 | 7 8 9 with a hole in each and two columns of prompt in front.
    holed = tensor([[7, 8, 7, 8, 0, 9, 7, 0, 8, 9]])
    marked = tensor([[False, False, True, True, False, True, True, False, True, True]])
    assert repeated_trigrams(holed, marked)[0].nonzero()[:, 0].tolist() == [6, 8, 9]


def test_off_policy_metrics_by_hand():
    """Two rows of 2 and 3 tokens, A = 2 and -1; the second's last token is rejected. r = 1, 2 | 1/2, 4."""
    mask = tensor([[True, True, False], [True, True, True]])
    keep = tensor([[True, True, False], [True, True, False]])
    logps = tensor([[0.0, LN2, 7.0], [-LN2, 2 * LN2, math.nan]], dtype=torch.float64)
    advantages, zeros = tensor([2.0, -1.0]), torch.zeros(2, 3, dtype=torch.float64)
    batch = make_batch(mask, advantages, loss_mask=keep)
    found = off_policy_metrics(logps, replace(batch, rollout_logprobs=zeros + LN2), old=zeros)
    values = {name: float(total / count) for name, (total, count) in found.items()}
    assert values == pytest.approx(
        {
            "off_policy/old/contribution_positive": -2 * (0 + 1) / 5,
            "off_policy/old/contribution_negative": (-1 / 2 + 3) / 5,
            "off_policy/old/m2": (0 + 1 + 1 + 4) * LN2**2 / 4,
            "off_policy/old/max": (1 + 2) * LN2 / 2,
            # Against the rollout every ratio is half as large: 1/2, 1 | 1/4, 2.
            "off_policy/rollout/contribution_positive": -2 * (-1 / 2 + 0) / 5,
            "off_policy/rollout/contribution_negative": (-3 / 4 + 1) / 5,
            "off_policy/rollout/m2": (1 + 0 + 4 + 1) * LN2**2 / 4,
            "off_policy/rollout/max": (1 + 2) * LN2 / 2,
        }
    )
    unknown = replace(batch, rollout_logprobs=None)
    assert {name.split("/")[1] for name in off_policy_metrics(logps, unknown, old=zeros)} == {"old"}
    # A third row without advantage, of 3 tokens, is not in the loss: its tokens count, and it is no sequence.
    keep = torch.cat([keep, torch.zeros(1, 3, dtype=torch.bool)])
    batch = make_batch(mask[[0, 1, 1]], tensor([2.0, -1.0, 0.0]), loss_mask=keep)
    found = off_policy_metrics(logps[[0, 1, 1]], replace(batch, rollout_logprobs=None), old=zeros[[0, 1, 1]])
    values = {name.rpartition("/")[2]: float(total / count) for name, (total, count) in found.items()}
    assert values["contribution_positive"] == pytest.approx(-2 * (0 + 1) / 8)
    assert values["max"] == pytest.approx((1 + 2) * LN2 / 2)


def test_metrics_by_advantage_use_those_of_the_tokens_if_the_loss_does():
    """The rows have an advantage of 0, and their tokens +1 and -2: r - 1 is 0, 1 | -1/2, 3 (the last is rejected)."""
    mask = tensor([[True, True, False], [True, True, True]])
    keep = tensor([[True, True, False], [True, True, False]])
    logps = tensor([[0.0, LN2, 0.0], [-LN2, 2 * LN2, 0.0]], dtype=torch.float64)
    by_token = tensor([[1.0, -2.0, 0.0], [1.0, -2.0, 1.0]])
    batch = make_batch(mask, torch.zeros(2), loss_mask=keep)
    batch = replace(batch, advantages=by_token, rollout_logprobs=None)
    found = off_policy_metrics(logps, batch, old=torch.zeros_like(logps))
    values = {name.rpartition("/")[2]: float(total / count) for name, (total, count) in found.items()}
    assert values["contribution_positive"] == pytest.approx((0 + 1 / 2) / 5)
    assert values["contribution_negative"] == pytest.approx((2 + 6) / 5)
    metrics = mismatch_metrics(logps, keep, advantages=by_token)
    assert metrics["rollout_corr/contribution_positive"] == pytest.approx((0 + 1 / 2) / 4)
    assert metrics["rollout_corr/contribution_negative"] == pytest.approx((2 + 6) / 4)
    by_sign = symptom_metrics(torch.ones(2, 3).long(), keep, by_token, old=tensor([[-10.0, 0, 0], [0.0, -10.0, 0]]))
    assert by_sign["symptoms/error_tokens_positive"] == by_sign["symptoms/error_tokens_negative"] == 1 / 2


def test_symptoms_by_sign_of_the_advantage():
    tokens = tensor([[1, 1, 1, 1], [1, 2, 3, 4], [1, 1, 1, 1]])
    old = tensor([[-1.0, -9.0, -10.0, -1.0], [-11.0, -1.0, -1.0, -1.0], [-50.0, -50.0, -50.0, -50.0]])
    mask = tensor([[True] * 4, [True, True, True, False], [True] * 4])
    # p < 1e-4 is logp < -9.21: one of four with A > 0, one of three with A < 0; the row with A = 0 is in neither.
    m = symptom_metrics(tokens, mask, tensor([1.0, -1.0, 0.0]), old=old)
    assert m == pytest.approx(
        {
            "symptoms/error_tokens_positive": 1 / 4,
            "symptoms/error_tokens_negative": 1 / 3,
            "symptoms/repetition_positive": 3 / 4,
            "symptoms/repetition_negative": 0,
        }
    )
    m = symptom_metrics(tokens, mask, tensor([1.0, -1.0, 0.0]))
    assert m == pytest.approx({"symptoms/repetition_positive": 3 / 4, "symptoms/repetition_negative": 0})


def in_front(x, value):
    """Two columns of padding and prompt before the example."""
    return torch.cat([torch.full((len(x), 2), value, dtype=x.dtype), x], dim=1)


def with_losses():
    """The example behind two columns of padding and prompt, with one token of row 0 infinite and one of row 1 nan.

    rho, then: row 0: 1, 2, -, 1/2; row 1: 1/4, -, 8; row 2: 1, 1. Seven tokens of nine are left.
    """
    x, mask = in_front(X, 7.0), in_front(MASK, False)
    x[0, 4], x[1, 3] = math.inf, math.nan
    return x, mask


def test_rows_that_are_partly_finite_behind_a_prompt():
    x, mask = with_losses()
    old = torch.where(mask, torch.tensor(-1.0, dtype=torch.float64), -50.0)
    old[0, 4] = -math.inf
    found = mismatch_metrics(x, mask, old=old, advantages=tensor([1.0, -2.0, 0.0], dtype=torch.float64))
    m = {name.removeprefix("rollout_corr/"): value for name, value in found.items()}
    assert m["nonfinite_fraction"] == pytest.approx(2 / 9)
    # ln rho / ln 2: 0 1 -1 | -2 3 | 0 0: sum 1, absolute sum 7; rows 0/3, 1/2, 0/2.
    assert m["kl"] == pytest.approx(-LN2 / 7)
    assert m["abs_log_ratio_mean"] == pytest.approx(LN2)
    assert m["log_ppl_diff"] == pytest.approx(-LN2 / 2 / 3)
    assert m["log_ppl_diff_min"] == pytest.approx(-LN2 / 2)
    # rho sums to 13.75, its squares to 1 + 4 + 1/4 + 1/16 + 64 + 2 = 71.3125; products 1, 2, 1.
    assert m["ess"] == pytest.approx(13.75**2 / (7 * 71.3125))
    assert m["chi2_token"] == pytest.approx(71.3125 / 7 - 1)
    assert m["chi2_seq"] == pytest.approx((1 + 4 + 1) / 3 - 1)
    # -1 for every token that counts: perplexity e, whatever was lost.
    assert m["training_log_ppl"] == pytest.approx(1) and m["training_ppl"] == pytest.approx(math.e)
    assert m["rollout_log_ppl"] == pytest.approx(1 + LN2 / 2 / 3)
    # -(rho - 1) A: row 0: -(0 + 1 - 1/2); row 1: 2 (-3/4 + 7); over the seven.
    assert m["contribution_positive"] == pytest.approx(-0.5 / 7)
    assert m["contribution_negative"] == pytest.approx(12.5 / 7)


def test_weights_of_rows_that_are_partly_finite_behind_a_prompt():
    x, mask = with_losses()
    m = {n.removeprefix("rollout_corr/rollout_is_"): v for n, v in mismatch_metrics(x, mask, high=3.0).items()}
    # min(rho, 3): 1 2 .5 | .25 3 | 1 1: sum 8.75. Row means 3.5/3, 3.25/2, 1; raw 3.5/3, 8.25/2, 1.
    assert m["mean"] == pytest.approx(8.75 / 7)
    assert m["seq_mean"] == pytest.approx((3.5 / 3 + 3.25 / 2 + 1) / 3)
    assert (m["seq_min"], m["seq_max"]) == (pytest.approx(1), pytest.approx(1.625))
    assert m["seq_fraction_high"] == pytest.approx(1 / 3)
    assert m["ratio_fraction_high"] == pytest.approx(1 / 7) and m["ratio_fraction_low"] == pytest.approx(1 / 7)


def test_repetition_behind_a_prompt():
    """Marks stand where the tokens stand, not where they are counted from; the prompt's words make no n-gram."""
    tokens = tensor([[0, 1, 2, 3, 1, 2, 3, 9], [1, 2, 3, 1, 2, 3, 4, 5]])
    mask = tensor([[False] + [True] * 7, [False] * 3 + [True] * 5])
    assert [row.nonzero()[:, 0].tolist() for row in repeated_trigrams(tokens, mask)] == [[4, 5, 6], []]
    assert symptom_metrics(tokens, mask, tensor([1.0, -1.0]))["symptoms/repetition_positive"] == pytest.approx(3 / 7)


def trigrams_one_by_one(ids):
    """The places of a list's tokens in a trigram that the list has had before."""
    places, seen = set(), set()
    for start in range(len(ids) - 2):
        if ids[start : start + 3] in seen:
            places |= {start, start + 1, start + 2}
        seen.add(ids[start : start + 3])
    return places


@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 40, 2), (7, 30, 3), (50, 4, 2), (3, 2, 1), (0, 5, 2)])
def test_repeated_trigrams_are_those_found_one_by_one(rows, width, vocabulary):
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(vocabulary, (rows, width), generator=generator) * 126_463  # large ids
    mask = torch.rand(rows, width, generator=generator) < 0.8
    found = repeated_trigrams(tokens, mask)
    for row_tokens, row_mask, row_found in zip(tokens, mask, found, strict=True):
        columns = row_mask.nonzero()[:, 0].tolist()
        places = trigrams_one_by_one(tuple(row_tokens[row_mask].tolist()))
        assert row_found.nonzero()[:, 0].tolist() == sorted(columns[place] for place in places)
