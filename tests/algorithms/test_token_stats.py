"""Correctors that read more than log-ratios: TRIAGE, and any corrector per denoising step."""

import math

import pytest
import torch
from run_outputs import metrics_of
from tiny_recipe import tiny_recipe
from torch import tensor
from torch.testing import assert_close

from dllm_rl.algorithms import correctors as c
from dllm_rl.likelihoods.estimators import Trajectory
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.samplers.rules import Confidence, PlackettLuce, RandomOrder
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.score import token_entropy
from dllm_rl.testing import make_stats
from dllm_rl.training.trainer import train
from dllm_rl.types import Prompts

EVERY = torch.ones(2, 4, dtype=torch.bool)


def test_triage_damps_unlikely_tokens_of_bad_answers_where_the_gate_is_open():
    """Windows of two tokens: |d| has means 0.3 and 0.05. Only the negative row's first window, and there only d < 0."""
    d = tensor([[-0.5, 0.1, -0.1, 0.0], [-0.5, 0.1, -0.1, 0.0]])
    weights, keep, metrics = c.Triage(gate=0.2, window=2).weights(make_stats(d, tensor([1.0, -1.0]), EVERY))
    assert_close(weights, tensor([[1.0] * 4, [math.exp(-0.5), 1.0, 1.0, 1.0]]))
    assert keep.all() and metrics["triage/open_fraction"] == 0.5 and metrics["triage/damped_fraction"] == 1 / 8
    open_everywhere = c.Triage(gate=0.0, window=64).weights(make_stats(d, tensor([1.0, -1.0]), EVERY))
    assert_close(open_everywhere[0][1], tensor([math.exp(-0.5), 1.0, math.exp(-0.1), 1.0]))
    # A window counts corrected tokens: without the second, the first two are d = -0.5 and -0.1, of mean 0.3.
    fewer = tensor([[True, False, True, True]]).expand(2, 4)
    weights = c.Triage(gate=0.2, window=2).weights(make_stats(d, tensor([1.0, -1.0]), fewer))[0]
    assert_close(weights[1], tensor([math.exp(-0.5), 1.0, math.exp(-0.1), 1.0]))


def test_by_step_takes_the_statistics_of_each_step():
    """Steps 0 and 1: the row's ratio is a product over its tokens of the step alone."""
    d = tensor([[2.0, 3.0, 0.5, 1.5], [1.0, 4.0, 1.0, 1.0]]).log()
    steps = tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    stats = make_stats(d, torch.ones(2), EVERY, unmask_step=steps)
    weights, keep, metrics = c.ByStep(corrector=c.TIS(cap=4.2, level="sequence")).weights(stats)
    assert_close(weights, tensor([[1.0, 4.2, 1.0, 4.2], [4.0, 4.0, 1.0, 1.0]]))
    assert keep.all() and metrics["tis/capped_fraction"] == pytest.approx(2 / 8)  # of 4.5, in two of eight tokens
    for corrector in (c.TIS(), c.IcePop(outside="drop"), c.NoCorrection()):
        for ours, plain in zip(c.ByStep(corrector=corrector).weights(stats), corrector.weights(stats), strict=True):
            same = ours == pytest.approx(plain) if isinstance(ours, dict) else torch.equal(ours, plain)
            assert same, "what has no statistics of more than a token is the same"
    lambdas = [c.AIS().weights(stats.among(steps == step))[2]["ais/lambda"] for step in (0, 1)]
    assert c.ByStep().weights(stats)[2]["ais/lambda"] == pytest.approx(sum(lambdas) / 2) and lambdas[0] != lambdas[1]


def test_a_corrector_is_told_of_steps_log_probs_and_the_entropy_that_it_asks_for(tmp_path):
    seen = []

    def look(stats):
        seen.append(stats)
        return c.NoCorrection().weights(stats)

    asking = c.Compose(parts=(c.FunctionCorrector(function=look, needs_entropy=True), c.NoCorrection()))
    drawn = Unmask(max_new_tokens=16, diffusion_steps=3, temperature=1.0, rank=RandomOrder())  # no order by the draw
    train(tiny_recipe(tmp_path, num_steps=1, sampler=drawn, corrector=asking))
    asked = seen[-1]
    train(tiny_recipe(tmp_path / "plain", num_steps=1, sampler=drawn, corrector=c.FunctionCorrector(function=look)))
    plain = seen[-1]
    mask = asked.mask
    assert plain.entropy is None and torch.equal(plain.log_mismatch, asked.log_mismatch)
    assert set(asked.unmask_step[mask].tolist()) == {0, 1, 2}
    assert_close(asked.log_mismatch[mask], (asked.old_logprobs - asked.rollout_logprobs)[mask])
    entropy = asked.entropy[mask]
    assert (entropy > 0).all() and (entropy < math.log(9)).all()  # of 6 characters and few special tokens
    # In expectation over draws entropy is the mean of -log p.
    assert entropy.mean().item() == pytest.approx(-asked.old_logprobs[mask].mean().item(), rel=0.15)
    assert metrics_of(tmp_path)[0]["rollout_corr/kl"] == metrics_of(tmp_path / "plain")[0]["rollout_corr/kl"]


@pytest.mark.parametrize("rank", [Confidence(), PlackettLuce(temperature=1.0)])
def test_views_that_score_that_a_position_stays_masked_do_not_count_in_its_entropy(rank):
    policy = tiny_masked_lm(characters="1234.=", head_std=1.0)
    prompts = Prompts.from_ids([[3, 4, 5], [6]], pad_id=policy.pad_id, num_generations=2, seeds=range(4))
    rollout = Unmask(max_new_tokens=4, temperature=1.0, rank=rank)(policy, prompts, torch.Generator())
    ordered, plain = (
        Trajectory(include_order=is_ordered).draw_views(rollout, torch.Generator()) for is_ordered in (True, False)
    )
    assert (ordered.coefficients != 0).sum() > (plain.coefficients != 0).sum()
    for micro_batch_size in (None, 2):
        entropies = [token_entropy(policy, rollout, views, micro_batch_size) for views in (ordered, plain)]
        assert_close(*entropies)
        assert (entropies[1][rollout.completion_mask] > 0).all()


def test_by_step_of_a_corrector_without_metrics():
    """One weight for all tokens that it is given, e^-2 and e^-0.1 by step."""

    def share(stats):
        mean = stats.log_mismatch[stats.mask].exp().mean()
        return c.TokenWeights(torch.where(stats.mask, mean, 1.0), stats.mask, {})

    d = tensor([[-2.0, -2.0, -0.1, -0.1]]).expand(2, 4)
    stats = make_stats(d, torch.ones(2), EVERY, unmask_step=tensor([[0, 0, 1, 1]]).expand(2, 4))
    weights = c.ByStep(corrector=c.FunctionCorrector(function=share)).weights(stats).importance_weights
    assert_close(weights, d.exp())
