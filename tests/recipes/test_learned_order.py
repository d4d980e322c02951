"""A rank with weights of its own: its order's log-probability, its gradient, and its state in a checkpoint."""

from dataclasses import replace

import pytest
import torch
from tiny_recipe import with_changes

from dllm_rl import Prompts, Trajectory, Unmask, train
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.rng import generator_for
from recipes.examples import learned_order
from recipes.examples.learned_order import LearnOrder, head, rank, recipe


@pytest.fixture
def policy():
    """A model whose head of the order is not zero."""
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator_for("head")) / 4)
    yield tiny_masked_lm(characters="1234.=", head_std=0.5)
    torch.nn.init.zeros_(head.weight)


def sample(policy, diffusion_steps):
    prompts = Prompts.from_ids([[3, 4, 5]] * 4, pad_id=policy.pad_id, num_generations=2, seeds=list(range(8)))
    sampler = Unmask(max_new_tokens=6, diffusion_steps=diffusion_steps, temperature=1.0, rank=rank)
    return sampler(policy, prompts, generator_for(0))


def test_the_first_position_is_drawn_with_the_softmax_of_the_scores(policy):
    rollout = sample(policy, 6)
    masked = rollout.tokens.masked_fill(rollout.completion_mask, policy.spec.mask_id)
    with torch.no_grad():
        states = policy.hidden(masked, rollout.attention_mask)[:, -6:]
        logprobs = policy.head(states).log_softmax(-1)
        scores = logprobs.amax(-1) + (states @ head.weight.T)[..., 0]
    first = rollout.unmask_step[:, -6:] == 0
    expected = scores.log_softmax(-1)[first]
    torch.testing.assert_close(rollout.order.logprobs[:, -6:][first], expected, rtol=1e-4, atol=1e-4)
    assert (scores - logprobs.amax(-1)).std() > 0.5  # the head matters


@pytest.mark.parametrize("diffusion_steps", [2, 6])
def test_the_head_has_the_gradient_of_the_log_probability(policy, diffusion_steps):
    rollout, likelihood = sample(policy, diffusion_steps), Trajectory()
    views = likelihood.draw_views(rollout, generator_for(1))

    def total():
        return likelihood.logprobs(policy, rollout, views).double().sum()

    recorded = rollout.order.logprobs + rollout.logprobs
    torch.testing.assert_close(likelihood.logprobs(policy, rollout, views), recorded, rtol=1e-4, atol=1e-4)
    head.zero_grad()
    likelihood.backward(policy, rollout, views, (views.coefficients != 0).float())
    direction = torch.nn.functional.normalize(head.weight.grad)
    slope = (head.weight.grad * direction).sum().item()
    step = 0.02
    with torch.no_grad():
        head.weight += step * direction
        above = total()
        head.weight -= 2 * step * direction
        below = total()
    assert slope > 0.5
    assert ((above - below) / (2 * step)).item() == pytest.approx(slope, rel=0.01)


def weights_after(directory, stops):
    """The head after a run that ends and is resumed after these steps."""
    torch.nn.init.zeros_(head.weight)
    small = {"sft_warmup_steps": 0, "train_batch_size": 2, "report_to": None}
    small |= {
        "eval_task": replace(recipe.eval_task, size=8),
        "eval_steps": 0,
        "lr_schedule_steps": 4,
        "output_dir": directory,
        "save_steps": 1,
    }
    for stop in stops:
        feature = LearnOrder(learning_rate=1.0)
        train(with_changes(recipe, **small, num_steps=stop, resume_from_checkpoint="latest"), features=(feature,))
        final = head.weight.detach().clone()
        torch.nn.init.zeros_(head.weight)  # a new process begins with zeros
    return final


def test_training_changes_the_order_and_a_resumed_run_has_the_same_weights(tmp_path):
    whole = weights_after(tmp_path / "whole", [4])
    assert whole.norm() > 1e-4
    assert torch.equal(whole, weights_after(tmp_path / "resumed", [2, 4]))


def test_a_rank_that_reads_drawn_tokens_has_no_plackett_luce_order():
    class Drawn(learned_order.Rank):
        order = "unknown"

        def __call__(self, tokens, hidden):
            return hidden[:, 0]

    with pytest.raises(
        ValueError, match="base_rank=Drawn must take some of logits, normalizer and hidden and no other"
    ):
        rank.replace(base_rank=Drawn())
