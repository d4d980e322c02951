"""The learner's parts, where a setting alone changes what is computed."""

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from emulated import int3_emulated
from run_outputs import metrics_of
from tiny_recipe import ONE_PUZZLE, SIZES, tiny_recipe

from dllm_rl import Confidence, MaxProb, Prompts, Unmask, tiny_masked_lm
from dllm_rl.algorithms.correctors import Aligned, NoCorrection
from dllm_rl.likelihoods.estimators import Coupled, Trajectory
from dllm_rl.models.base import trainable_parameters
from dllm_rl.step import update
from dllm_rl.step.update import update_direction
from dllm_rl.training.trainer import train
from dllm_rl.types.scoring import Batch
from recipes.examples.bounds import EUBO, Sandwich

pytestmark = pytest.mark.usefixtures("no_rehearsal")


@pytest.mark.slow
def test_under_autocast_a_later_inner_iteration_sees_the_weights_that_moved(tmp_path, monkeypatch):
    """As far from the step's start as without autocast's cache, which holds bf16 copies of the weights."""
    changes = {"bf16": True, "num_iterations": 2, "num_steps": 1, "max_retained_graphs": 0, "learning_rate": 0.01}
    train(tiny_recipe(tmp_path / "cached", **changes))
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: autocast(*a, **k | {"cache_enabled": False}))
    train(tiny_recipe(tmp_path / "not", **changes))
    cached, plain = (metrics_of(tmp_path / name)[0]["off_policy/old/m2/iteration_1"] for name in ("cached", "not"))
    assert cached == pytest.approx(plain, rel=0.02) and plain > 0


def test_with_ratios_against_the_rollout_the_steps_start_is_still_reported_as_such(tmp_path):
    changes = {"old_logprobs": "rollout", "corrector": NoCorrection(), "rollout_quantization": int3_emulated}
    train(tiny_recipe(tmp_path, num_steps=1, **ONE_PUZZLE, **changes))
    row = metrics_of(tmp_path)[0]
    assert row["off_policy/old/m2"] < 1e-8 < 1e-6 < row["off_policy/rollout/m2"]


def test_an_update_makes_weights_of_the_next_version(tmp_path):
    """One more a step, however many inner updates it has: what late and aligned rollouts are told apart by."""
    summary = train(tiny_recipe(tmp_path, num_iterations=2, save_steps=1, save_total_limit=9, **ONE_PUZZLE))
    assert summary.policy.weights_version == 2
    states = sorted((tmp_path / "checkpoints").glob("step-*/state.json"))
    assert [json.loads(path.read_text())["version"] for path in states] == [0, 1, 2]


class Uncounted(torch.optim.SGD):
    """SGD that changes weights as bitsandbytes does: autograd's version counters do not count it."""

    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            if weight.grad is not None:
                weight.data.add_(weight.grad, alpha=-self.param_groups[0]["lr"])


def test_an_aligned_forward_sees_every_update_also_of_an_optimizer_that_autograd_does_not_count(tmp_path):
    rows = []
    for optimizer in (torch.optim.SGD, Uncounted):

        def optim(parameters, lr, optimizer=optimizer):
            return optimizer(parameters, lr=lr)

        changes = {"optim": optim, "corrector": Aligned(), "rollout_quantization": int3_emulated, "num_iterations": 3}
        changes |= {"train_batch_size": 2, **ONE_PUZZLE}
        train(tiny_recipe(tmp_path / optimizer.__name__, learning_rate=0.5, num_steps=1, **changes))
        rows += metrics_of(tmp_path / optimizer.__name__)
    counted, uncounted = rows
    for name in ("off_policy/old/m2/iteration_2", "quantization/codes_changed", "grad_norm"):
        assert uncounted[name] == pytest.approx(counted[name], rel=1e-4) and counted[name] > 0


def test_logits_that_are_not_finite_are_named(tmp_path):
    """Not as an index behind the vocabulary, which is where a search among NaN ends."""
    for name, changes in {"sampled": {}, "later update": {"num_iterations": 3, "learning_rate": 1e30}}.items():
        with pytest.raises(FloatingPointError, match="logits are not finite"):
            train(
                tiny_recipe(
                    tmp_path / name,
                    rollout_quantization=None,
                    **{"learning_rate": 1e9, "num_steps": 3, **ONE_PUZZLE} | changes,
                )
            )


class Suppressed(Unmask):
    """As an engine that draws a token which the recipe suppresses: the last one of the first completion."""

    def __call__(self, policy, prompts, generator, **options):
        rollout = super().__call__(policy, prompts, generator, **options)
        tokens = rollout.tokens.clone()
        tokens[0, -1] = rollout.sampling_params.suppress[0]
        return replace(rollout, tokens=tokens)


@pytest.mark.parametrize("likelihood", [Trajectory(), Trajectory(include_order=False), Coupled(), EUBO(), Sandwich()])
@pytest.mark.repeated(first_only=True)
def test_a_token_that_training_drops_does_not_end_the_run(tmp_path, monkeypatch, likelihood):
    """Its log-prob is -inf before and after the update, whose direction is measured in each step here."""
    monkeypatch.setattr("dllm_rl.step.settings.MEASURE_STEPS", 1)
    sampler = Suppressed(max_new_tokens=6, diffusion_steps=3, temperature=1.0, rank=Confidence(), suppress=(0, 2))
    changes = {"sampler": sampler, "corrector": NoCorrection(), "rollout_quantization": None}
    train(tiny_recipe(tmp_path, likelihood=likelihood, num_steps=2, **ONE_PUZZLE, **changes))
    rows = metrics_of(tmp_path)
    assert all(math.isfinite(row["update/direction"]) and row["grad_norm"] > 0 for row in rows)
    assert any(row["rollout_corr/nonfinite_fraction"] > 0 for row in rows)


def test_with_advantages_of_tokens_the_direction_is_that_of_the_tokens_advantages():
    """The cosine over tokens, after a step along the gradient of the log-probs weighted by each token's advantage."""
    estimator, policy = Trajectory(), tiny_masked_lm(**SIZES, head_std=0.3)
    prompts = Prompts.from_ids([[4, 5], [6, 7, 8]], pad_id=policy.pad_id)
    rollout = Unmask(max_new_tokens=3, rank=MaxProb())(policy, prompts, torch.Generator().manual_seed(0))
    views = estimator.draw_views(rollout, torch.Generator().manual_seed(0))
    scores = estimator.view_logprobs(policy, rollout, views, retain_graphs=True)
    mask = rollout.completion_mask
    advantages = torch.where(mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)), 0.0)
    (scores * advantages).sum().backward()
    with torch.no_grad():
        for parameter in trainable_parameters(policy.module):
            if parameter.grad is not None:
                parameter += 1e-4 * parameter.grad
    ones = torch.ones_like(advantages)
    batch = Batch(rollout, views, advantages, scores[0], scores.detach(), ones, mask, None, 1, 1)
    measured = update_direction(policy, batch, Accelerator(cpu=True), estimator)["update/direction"]
    change = (estimator.view_logprobs(policy, rollout, views) - scores.detach()).double().sum(0)
    cosine = torch.cosine_similarity(advantages[mask].double(), change[mask], dim=0)
    assert measured == pytest.approx(cosine.item(), rel=1e-6) and measured > 0.1


@pytest.mark.parametrize("estimator", [Trajectory(), Coupled()])
def test_the_direction_of_an_update_by_hand(monkeypatch, estimator):
    """The cosine of advantages and changes, from two scorings; it is positive after a step along the gradient of the
    log-probs weighted by advantages, and negative after one against it."""
    policy = tiny_masked_lm(**SIZES, head_std=0.3)
    prompts = Prompts.from_ids([[4, 5], [6, 7, 8]], pad_id=policy.pad_id, num_generations=2)
    rollout = Unmask(max_new_tokens=6, temperature=1.0, rank=MaxProb())(
        policy, prompts, torch.Generator().manual_seed(0)
    )
    views = estimator.draw_views(rollout, torch.Generator().manual_seed(0))
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    scores = estimator.view_logprobs(policy, rollout, views, retain_graphs=True)
    mask = rollout.completion_mask
    batch = Batch(rollout, views, advantages, scores[0], scores, torch.ones_like(scores[0]), mask, None, 1, 1)
    (scores * advantages[:, None]).sum().backward()
    found = []
    for sign in (1, -2):  # forward; back beyond the start
        with torch.no_grad():
            for parameter in trainable_parameters(policy.module):
                if parameter.grad is not None:
                    parameter += sign * 1e-3 * parameter.grad
        measured = update_direction(policy, batch, Accelerator(cpu=True), estimator)
        found.append(measured["update/direction"])
        some = (views.coefficients != 0).sum((1, 2)).topk(min(4, len(scores))).indices
        change = (estimator.view_logprobs(policy, rollout, views) - scores.detach())[some].double().sum((0, 2))
        cosine = torch.cosine_similarity(advantages.double(), change, dim=0)
        assert found[-1] == pytest.approx(cosine.item(), rel=1e-6)
    assert found[0] > 0.1 > -0.1 > found[1]
    monkeypatch.setattr(update, "MEASURED_ROWS", 2)  # of more rows, those of the highest and the lowest advantage
    measured = update_direction(policy, batch, Accelerator(cpu=True), estimator)["update/direction"]
    rows = views.restrict_to_rows(torch.tensor([True, True, False, False]))
    some = (rows.coefficients != 0).sum((1, 2)).topk(min(4, len(scores))).indices
    now = estimator.view_logprobs(policy, rollout, views)
    change = torch.where(rows.coefficients != 0, now - scores.detach(), 0)[some].double().sum((0, 2))[:2]
    assert measured == pytest.approx(torch.cosine_similarity(advantages[:2].double(), change, dim=0).item(), rel=1e-6)
    assert update_direction(policy, replace(batch, advantages=advantages * 0), Accelerator(cpu=True), estimator) == {}
