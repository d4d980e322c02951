"""The value head in training: what it begins as, what it sees, what it learns, and how it is saved."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from run_outputs import metrics_of
from tiny_recipe import ONE_PUZZLE, SIZES, tiny_recipe

from dllm_rl import Prompts, Unmask, tiny_masked_lm
from dllm_rl.algorithms.correctors import TBPO
from dllm_rl.algorithms.losses import GSPO
from dllm_rl.algorithms.values import ValueModel
from dllm_rl.likelihoods.estimators import Coupled, Trajectory
from dllm_rl.models.tensor_bytes import serialize
from dllm_rl.models.tiny import tiny_diffusion_gemma
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for
from dllm_rl.step.samples import Samples
from dllm_rl.step.value_head import ValueHead, rate_scale
from dllm_rl.training.policies import check_value_model
from dllm_rl.training.saving import load_states, state_file
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def rollout_of(policy, *, rows=6, temperature=1.0):
    prompts = Prompts.from_ids([[1, 2], [3]], pad_id=policy.pad_id, num_generations=rows // 2)
    return Unmask(max_new_tokens=8, diffusion_steps=4, temperature=temperature)(policy, prompts, generator_for(0))


def views_of(rollout, num_segments=None):
    return Trajectory(num_segments=num_segments).draw_views(rollout, generator_for(1))


class Context:
    """What a feature reads of a step's context. The accelerator is made anew: other tests reset accelerate's state."""

    accelerator = property(lambda self: Accelerator(cpu=True))


CONTEXT = Context()
OPTIMIZER = None  # the head has its own


def advantages_of(head, policy, rollout, views, target, micro_batch_size=None):
    """The rows' advantages given."""
    settings = SimpleNamespace(micro_batch_size=micro_batch_size)
    context = SimpleNamespace(accelerator=CONTEXT.accelerator, policy=policy, settings=settings)
    samples = Samples(rollout, rollout.group, target, target, target, (len(target),))
    return head.token_advantages(context, samples, views)


def test_a_run_begins_as_grpo(tmp_path):
    """Values are 0 before the first update, so that with lambda 1 its loss and gradient are those without values."""
    changes = {"num_steps": 1, "likelihood": Trajectory(include_order=False), **ONE_PUZZLE}
    train(tiny_recipe(tmp_path / "plain", **changes))
    train(tiny_recipe(tmp_path / "values", value_model=ValueModel(gae_lambda=1.0), **changes))
    (plain,), (row,) = (metrics_of(tmp_path / name) for name in ("plain", "values"))
    assert row["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5) and plain["grad_norm"] > 0
    assert row["loss"] == pytest.approx(plain["loss"], rel=1e-5, abs=1e-7)
    assert row["value/explained_variance"] == pytest.approx(0, abs=1e-12)


def test_a_completion_without_a_reward_has_no_advantage_and_teaches_nothing():
    """With and without its row the head learns the same, and the others' tokens have the same advantages."""
    policy = tiny_masked_lm(**SIZES)
    rollout = rollout_of(policy)
    target = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 0.0])
    context = SimpleNamespace(
        accelerator=CONTEXT.accelerator, policy=policy, settings=SimpleNamespace(micro_batch_size=None)
    )

    def after_three_steps(rows, rewards):  # after the first, the values of the zero-initialized head are not 0
        head, part = ValueHead(ValueModel(), seed=0), rollout.rows(rows)
        views = views_of(part)
        samples = Samples(part, part.group, rewards[rows], target[rows], target[rows], (len(rows),))
        found = []
        for _ in range(3):
            found.append(head.token_advantages(context, samples, views))
            head.learn(CONTEXT, OPTIMIZER)
        return found[2], head.sums["value/loss"]

    rewards = target.clone()
    rewards[[2, 5]] = torch.nan
    found, (loss, count) = after_three_steps(torch.arange(6), rewards)
    others, (others_loss, others_count) = after_three_steps(torch.tensor([0, 1, 3, 4]), rewards)
    assert not found[[2, 5]].any() and found[[0, 1, 3, 4]].abs().max() > 0
    torch.testing.assert_close(found[[0, 1, 3, 4]], others)
    torch.testing.assert_close(loss, others_loss)
    assert count == others_count


def test_the_head_steps_along_the_gradient_of_the_mean_error(monkeypatch):
    policy = tiny_masked_lm(**SIZES)
    rollout = rollout_of(policy)
    head = ValueHead(ValueModel(), seed=0)
    advantages_of(head, policy, rollout, views_of(rollout), torch.linspace(-1, 1, 6))
    summed, stepped = [parameter.grad.clone() for parameter in head.layers.parameters()], []
    record = lambda: stepped.extend(parameter.grad.clone() for parameter in head.layers.parameters())  # noqa: E731
    monkeypatch.setattr(head.optimizer, "step", record)
    head.learn(CONTEXT, OPTIMIZER)
    assert any(gradient.any() for gradient in summed)
    torch.testing.assert_close(stepped, [gradient / 24 for gradient in summed])  # six rows of four steps


def test_tokens_get_the_advantage_of_their_step():
    """After some learning, tokens of one step of a row share an advantage, and with lambda 1 it is A less the value."""
    policy = tiny_masked_lm(**SIZES)
    rollout = rollout_of(policy)
    views = views_of(rollout)
    head = ValueHead(ValueModel(gae_lambda=1.0), seed=0)
    target = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5, 2.0])
    for _ in range(5):
        found = advantages_of(head, policy, rollout, views, target)
        head.learn(CONTEXT, OPTIMIZER)
    values = torch.where(rollout.completion_mask, target[:, None] - found, 0)
    for row in range(6):
        for step in range(4):
            at = rollout.completion_mask[row] & (rollout.unmask_step[row] == step)
            assert len(values[row][at].unique()) == 1
    assert values.abs().max() > 0 and not found[~rollout.completion_mask].any()


def test_a_value_does_not_depend_on_what_its_step_draws():
    """Else it would bias the gradient: other tokens at the positions that a view hides leave its values as they are."""
    policy = tiny_masked_lm(**SIZES)
    rollout = rollout_of(policy)
    views = views_of(rollout)
    head = ValueHead(ValueModel(gae_lambda=1.0), seed=0)
    target = torch.linspace(-1, 1, 6)
    advantages_of(head, policy, rollout, views, target)
    head.learn(CONTEXT, OPTIMIZER)
    before = advantages_of(head, policy, rollout, views, target)
    last = rollout.unmask_step == 3
    changed = replace(rollout, tokens=torch.where(last, (rollout.tokens + 1) % 4, rollout.tokens))
    after = advantages_of(head, policy, changed, views, target)
    assert torch.equal(before, after)
    first = rollout.unmask_step == 0
    changed = replace(rollout, tokens=torch.where(first, (rollout.tokens + 1) % 4, rollout.tokens))
    after = advantages_of(head, policy, changed, views, target)
    torch.testing.assert_close(before[first], after[first], rtol=0, atol=1e-6)  # V_1 is added, and subtracted again
    assert (before[last] - after[last]).abs().max() > 1e-4


@pytest.mark.slow
def test_it_learns_what_the_states_tell():
    """A target that is a function of the tokens of the first steps: nothing is explained of step 0, most of step 3."""
    policy = tiny_masked_lm(**SIZES)
    rollout = rollout_of(policy, rows=32)
    views = views_of(rollout)
    early = rollout.completion_mask & (rollout.unmask_step < 2)
    target = torch.where(early, rollout.tokens % 2 == 0, False).float().sum(-1)
    target = (target - target.mean()) / target.std()
    head = ValueHead(ValueModel(), seed=0)
    for _ in range(120):
        advantages_of(head, policy, rollout, views, target)
        head.learn(CONTEXT, OPTIMIZER)
    found = head.metrics(CONTEXT)
    assert 0.2 < found["value/explained_variance"] < 1
    assert found["value/loss"] < 0.8


def test_micro_batches_change_nothing():
    policy = tiny_masked_lm(**SIZES)
    rollout = rollout_of(policy)
    views, target = views_of(rollout, 2), torch.linspace(-1, 1, 6)
    found = []
    for micro_batch_size in (None, 3):
        head = ValueHead(ValueModel(), seed=0)
        for _ in range(3):
            advantages = advantages_of(head, policy, rollout, views, target, micro_batch_size)
            head.learn(CONTEXT, OPTIMIZER)
        found.append(advantages)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_its_gradient_is_that_of_the_mean_squared_error():
    """Against autograd on all values at once, and it does not reach the learner."""
    policy = tiny_masked_lm(**SIZES)
    rollout = rollout_of(policy)
    views, target = views_of(rollout), torch.linspace(-1, 1, 6)
    head = ValueHead(ValueModel(), seed=0)
    advantages_of(head, policy, rollout, views, target)
    head.learn(CONTEXT, OPTIMIZER)  # so that the last layer is not 0
    advantages_of(head, policy, rollout, views, target)
    found = [parameter.grad.clone() for parameter in head.layers.parameters()]
    head.layers.zero_grad()
    total = torch.zeros(())
    for masked in views.masked:
        tokens = rollout.tokens.masked_fill(masked, policy.spec.mask_id)
        states = policy.hidden(tokens, rollout.attention_mask).detach()
        at = rollout.completion_mask
        values = (head.layers(states)[..., 0] * at).sum(-1) / at.sum(-1)
        total = total + (values - target).square().sum()
    total.backward()
    for ours, parameter in zip(found, head.layers.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in policy.module.parameters())


def test_one_rate_fits_every_width():
    """Layers of n inputs take 64 / n of the rate: a wide model's head is as stable as a narrow one's."""
    assert rate_scale(torch.empty(8, 64)) == 1 and rate_scale(torch.empty(8, 4096)) == 1 / 64
    assert rate_scale(torch.empty(64)) == 1
    for width in (64, 1024):
        head = ValueHead(ValueModel(), seed=0)
        layers = head.build(width, torch.device("cpu"))
        states = torch.randn(64, width, generator=generator_for(width))
        target = states[:, 0].sign()
        for _ in range(40):
            head.optimizer.zero_grad()
            loss = (layers(states)[:, 0] - target).square().mean()
            loss.backward()
            head.optimizer.step()
        assert loss < 0.1


def test_a_resumed_run_continues_with_the_same_bits(tmp_path):
    """Two steps after the first: the last value shows the moments that the head's update before it began with."""
    changes = {"likelihood": Trajectory(num_segments=2), "value_model": ValueModel(), "num_steps": 3, **ONE_PUZZLE}
    train(recipe := tiny_recipe(tmp_path, save_steps=1, save_total_limit=9, **changes))
    whole = metrics_of(tmp_path)
    train(replace(recipe, resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000001")))
    parts = metrics_of(tmp_path)
    for name in ("value/loss", "value/explained_variance", "loss", "grad_norm"):
        assert [row[name] for row in whole] == [row[name] for row in parts]


def test_a_damaged_file_is_named(tmp_path):
    head = ValueHead(ValueModel(), 0)
    path = tmp_path / state_file(head)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{path.name} cannot be loaded: not a safetensors file"):
        load_states([head], tmp_path)
    path.write_bytes(serialize({"weights.0.bias": torch.zeros(2)}, {}))
    with pytest.raises(ValueError, match=f"{path.name} cannot be loaded: it has no weights"):
        load_states([head], tmp_path)


@pytest.mark.slow
def test_a_resume_with_another_size_is_refused_before_it_samples(tmp_path):
    changes = {"likelihood": Trajectory(include_order=False), "num_steps": 1, "lr_schedule_steps": 2}
    train(tiny_recipe(tmp_path, value_model=ValueModel(hidden_size=16), **changes))
    resumed = changes | {"num_steps": 2, "resume_from_checkpoint": "latest", "allow_changed": "value_model"}
    with pytest.raises(ValueError, match=r"value_model.hidden_size=8 is not the 16 of .*; resume with hidden_size=16"):
        train(tiny_recipe(tmp_path, value_model=ValueModel(hidden_size=8), **resumed))
    rates = ValueModel(hidden_size=16, learning_rate=1e-2)
    train(tiny_recipe(tmp_path, value_model=rates, **resumed))
    assert len(metrics_of(tmp_path)) == 2


def test_a_model_that_rewrites_every_token_is_refused_before_it_samples(tmp_path):
    policy = tiny_diffusion_gemma(characters="1234.=")
    with pytest.raises(ValueError, match="'diffusion_gemma' writes every token at every step; use value_model=None"):
        check_value_model(ValueModel(), policy)


def test_settings_that_cannot_be_combined(tmp_path):
    plain = tiny_recipe(tmp_path)
    for changes, message in [
        ({"likelihood": Coupled()}, "likelihood whose views are the sampler's steps"),
        ({"likelihood": Trajectory(block_size=4)}, r"use Trajectory\(num_segments=None, block_size=None\)"),
        ({"loss": GSPO()}, r"loss=GSPO\("),
        ({"loss": None, "corrector": TBPO()}, r"loss=TrustBand\("),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(plain, **{"likelihood": Trajectory(), "value_model": ValueModel()} | changes)
    with pytest.raises(ValueError, match="scored at several steps"):  # the rank is `confidence`
        train(replace(plain, likelihood=Trajectory(), value_model=ValueModel()))
    assert isinstance(replace(plain, likelihood=Trajectory(), value_model=ValueModel(gae_lambda=0.5)), Recipe)
