"""What correctors may read beyond log-ratios."""

import math

import pytest
import torch
from run_outputs import metrics_of
from tiny_recipe import SIZES, tiny_recipe
from torch.testing import assert_close

from dllm_rl.algorithms import correctors as c
from dllm_rl.likelihoods.estimators import Trajectory
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.samplers.rules import Confidence, PlackettLuce, RandomOrder
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.score import token_entropy
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.trainer import train
from dllm_rl.types.rollouts import Prompts

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def test_a_corrector_is_told_of_steps_log_probs_and_the_entropy_that_it_asks_for(tmp_path):
    seen = []

    def look(stats):
        seen.append(stats)
        return c.NoCorrection().weights(stats)

    asking = c.Compose(parts=(c.FunctionCorrector(function=look, needs_entropy=True), c.NoCorrection()))
    drawn = Unmask(max_new_tokens=16, diffusion_steps=3, temperature=1.0, rank=RandomOrder())  # no order by the draw
    few = {"num_steps": 1, "eval_task": Sudoku(split="test", size=1)}
    few["validation_task"] = Sudoku(split="validation", size=1)
    train(tiny_recipe(tmp_path, sampler=drawn, corrector=asking, **few))
    asked = seen[-1]
    train(tiny_recipe(tmp_path / "plain", sampler=drawn, corrector=c.FunctionCorrector(function=look), **few))
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
    policy = tiny_masked_lm(**SIZES, head_std=1.0)
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


def test_the_entropy_is_of_the_distribution_that_the_sampler_drew_from():
    """Divided by a temperature of 10,000, all logits are equal; a top-k of 2 leaves two tokens."""
    policy = tiny_masked_lm(**SIZES, head_std=1.0)
    prompts = Prompts.from_ids([[3, 4, 5]], pad_id=policy.pad_id, num_generations=2, seeds=range(2))
    found = []
    for settings in ({"temperature": 1e4}, {"temperature": 1.0, "top_k": 2}, {"temperature": 1e4, "top_k": 2}):
        rollout = Unmask(max_new_tokens=4, **settings)(policy, prompts, torch.Generator())
        views = Trajectory().draw_views(rollout, torch.Generator())
        found.append(token_entropy(policy, rollout, views, None)[rollout.completion_mask])
    uniform, two, uniform_of_two = found
    assert (uniform > math.log(6) - 1e-3).all() and (two < math.log(2)).all()
    assert_close(uniform_of_two, torch.full_like(uniform_of_two, math.log(2)), atol=1e-3, rtol=0)
