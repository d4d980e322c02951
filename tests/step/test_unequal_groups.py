"""Groups of unequal size: the examples of unequal groups and replay, against enumeration and against other layouts."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import rows
import torch
from accelerate import Accelerator
from ranks import run_ranks
from repetitions import slow
from rows import MODEL, SIZES, gradients_of_shared_rows, unequal
from run_outputs import metrics_of
from tiny_recipe import tiny_recipe

from dllm_rl import LeaveOneOut, Prompts, Rollout, StepFeature, Trajectory, train
from dllm_rl.algorithms.losses import K3, Reinforce, SequenceMean, policy_loss
from dllm_rl.algorithms.prompt_sources import RewardHistory, UniformPrompts
from dllm_rl.decoding.prompts import encode
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.rng import generator_for
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.samples import Samples, rows_of_processes
from dllm_rl.types.groups import equal_groups, group_sizes
from dllm_rl.types.rollouts import pack_groups
from dllm_rl.types.scoring import Batch, Views
from recipes.examples.unequal_groups import EqualPrompts, MoreWhereMixed

pytestmark = pytest.mark.usefixtures("no_rehearsal")

REWARDS = torch.tensor([[0.0, 1.0, 0.5], [2.0, 0.0, -1.0]], dtype=torch.float64)  # of each prompt's three tokens
LOGITS = torch.tensor([[0.3, -0.2, 0.5], [1.0, 0.1, -0.4]], dtype=torch.float64)
GROUP = torch.tensor([0, 0, 1, 1, 1])


def update_gradient(start, tokens, *, weights):
    """The gradient that a step takes from these tokens (B,), one per row: advantages, weights and loss are the
    library's."""
    logits = start.clone().requires_grad_()
    logps = logits.log_softmax(-1)[GROUP, tokens][:, None]
    rewards = REWARDS[GROUP, tokens]
    mask = torch.ones(5, 1, dtype=torch.bool)
    zeros = torch.zeros(5, 1, dtype=torch.long)
    rollout = Rollout(tokens[:, None], mask, mask, zeros, logps.detach(), GROUP)
    advantages = LeaveOneOut()(rewards, GROUP)
    samples = Samples(rollout, GROUP, rewards, advantages, torch.ones(5), (5,))
    if weights:
        context = SimpleNamespace(accelerator=Accelerator(cpu=True))
        samples, _ = EqualPrompts().after_rollout(context, samples, 0)
    batch = Batch(
        samples.rollout, Views(mask[None], torch.ones(1, 5, 1)), advantages, logps.detach(), logps.detach()[None],
        torch.ones(5, 1), mask, None, num_tokens=5, num_sequences=5,
    )  # fmt: skip
    _, _, gradient = policy_loss(logps, batch, surrogate=Reinforce(), loss_reduction=SequenceMean(), beta=0.0, kl=K3())
    logps.backward(gradient)
    return logits.grad


@pytest.mark.parametrize(("weights", "count"), [(True, 2), slow(True, 3), slow(False, 3)])
def test_the_mean_gradient_is_that_of_the_mean_over_prompts(weights, count):
    """All 2^5 or 3^5 outcomes of two groups of 2 and 3. Without the weights, the larger group counts more."""
    start = LOGITS[:, :count]
    probabilities = start.softmax(-1)
    mean = torch.zeros_like(start)
    for outcome in itertools.product(range(count), repeat=5):
        tokens = torch.tensor(outcome)
        mean += probabilities[GROUP, tokens].prod() * update_gradient(start, tokens, weights=weights)
    logits = start.clone().requires_grad_()
    (-(logits.softmax(-1) * REWARDS[:, :count]).sum(-1).mean()).backward()
    assert torch.allclose(mean, logits.grad, atol=1e-7) == weights
    if not weights:  # rows count alike: 2 and 3 of 5 in place of a half each
        torch.testing.assert_close(mean, logits.grad * torch.tensor([[4 / 5], [6 / 5]]), atol=1e-7, rtol=0)


def test_prompts_with_equal_rewards_get_few_completions():
    history = RewardHistory(9)
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None]
    history.add(0, torch.tensor([4, 7]), rewards, torch.tensor([0, 0, 1, 1]))
    sizes = MoreWhereMixed(least=2).group_sizes(history, torch.tensor([4, 7, 1, 4]), 5, torch.Generator())
    assert sizes.tolist() == [2, 8, 8, 2]  # 7 had unequal rewards, and 1 was never drawn
    sizes = MoreWhereMixed(least=2).group_sizes(history, torch.tensor([4, 4]), 5, torch.Generator())
    assert sizes.tolist() == [5, 5]  # nothing else could use the rest


def test_rows_are_packed_in_whole_groups():
    group = torch.tensor([0, 0, 0, 5, 5, 2, 7, 7, 7, 7])
    sizes = [list(map(len, pack_groups(torch.arange(10), group, size))) for size in (4, 5, 2, 100)]
    assert sizes == [[3, 3, 4], [5, 5], [2, 1, 2, 1, 2, 2], [10]]
    assert rows_of_processes(torch.tensor([1, 5, 2, 6]), 2) == (6, 8) and group_sizes(group) == [3, 2, 1, 4]


@pytest.mark.repeated
@pytest.mark.parametrize("model", ["full", "cached", "causal"])
def test_a_row_does_not_depend_on_the_size_of_its_group(model):
    """Groups of 3, 1 and 2 beside the same rows as groups of one: the shared first forward changes nothing."""
    sizes = MODEL | {"characters": "123456", "num_layers": 2}
    policy = tiny_llama(causal=True, **sizes) if model == "causal" else tiny_masked_lm(**sizes, head_std=0.3)
    ids, counts, seeds = [[3, 4, 5], [6], [7, 8]], [3, 1, 2], list(range(6))
    sampler = Autoregress(max_new_tokens=6) if model == "causal" else Unmask(max_new_tokens=6, temperature=1.0)
    if model == "cached":
        from dllm_rl.samplers.cache import DualCache

        sampler = sampler.replace(cache=DualCache(), block_size=3)
    together = Prompts.from_ids(ids, pad_id=policy.pad_id, num_generations=counts, seeds=seeds)
    alone = replace(together, group=torch.arange(6))
    found, expected = (sampler(policy, prompts, generator_for(0)) for prompts in (together, alone))
    assert torch.equal(found.tokens, expected.tokens) and found.group.tolist() == [0, 0, 0, 1, 2, 2]
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-6, rtol=0)
    if model == "full":
        views = Trajectory(include_order=False).draw_views(found, generator_for(0))
        scores = [
            Trajectory(include_order=False).logprobs(policy, rollout, views, micro_batch_size=size)
            for rollout, size in ((found, None), (expected, None), (found, 2), (found, 4))
        ]
        for other in scores[1:]:
            torch.testing.assert_close(scores[0], other, atol=2e-6, rtol=0)
        torch.testing.assert_close(scores[0], found.logprobs, atol=2e-6, rtol=0)


class Seen(StepFeature):
    def __init__(self):
        self.samples = []

    def after_rollout(self, context, samples, step):
        self.samples.append(samples)
        return samples, {}


def test_a_run_has_the_groups_of_its_prompt_source(tmp_path):
    """Their order changes from step to step; batches of a rollout and of a forward split them, and change nothing."""
    seen = {}
    for name, size in (("whole", None), ("parts", 3)):
        seen[name] = Seen()
        changes = {"micro_batch_size": size, "rollout_batch_size": size, "num_steps": 2, "save_steps": 2}
        train(unequal(tmp_path / name, **changes), features=(seen[name],))
    for whole, parts in zip(seen["whole"].samples, seen["parts"].samples, strict=True):
        assert sorted(group_sizes(whole.group)) == sorted(SIZES) and whole.counts == (sum(SIZES),)
        assert torch.equal(whole.rollout.group, whole.group) and torch.equal(whole.group, parts.rollout.group)
        assert torch.equal(whole.rewards, parts.rewards)
        assert torch.equal(whole.advantages[whole.group.bincount()[whole.group] == 1], torch.zeros(1))
    assert len({tuple(group_sizes(samples.group)) for samples in seen["whole"].samples}) > 1
    for whole, parts in zip(*(metrics_of(tmp_path / name) for name in seen), strict=True):
        assert whole["loss"] == pytest.approx(parts["loss"], abs=1e-5)
        assert whole["grad_norm"] == pytest.approx(parts["grad_norm"], rel=1e-4)


def test_dynamic_sampling_keeps_the_sizes(tmp_path):
    seen = Seen()
    train(unequal(tmp_path, max_num_gen_batches=3, num_steps=1), features=(seen,))
    assert sorted(group_sizes(seen.samples[0].group)) == sorted(SIZES)
    (row,) = metrics_of(tmp_path)
    assert row["dynamic_sampling/draws"] == 3  # a group of one never has unequal rewards


class Wrong(UniformPrompts):
    def group_sizes(self, history, prompts, num_generations, generator):
        return torch.zeros_like(prompts)


def test_wrong_sizes_are_named(tmp_path, rehearsal):
    with pytest.raises(ValueError, match=r"group_sizes of prompt_source=.*Wrong\(\) must return .* from 1 on"):
        train(tiny_recipe(tmp_path, prompt_source=Wrong()))
    assert not (tmp_path / "metrics.jsonl").exists(), "before the first step"


@pytest.mark.slow
def test_a_replayed_run_continues_with_the_same_bits(tmp_path):
    train(unequal(tmp_path / "whole", num_steps=4), features=(rows.replay(),))
    train(unequal(tmp_path / "parts", num_steps=2, lr_schedule_steps=4), features=(rows.replay(),))
    resumed = unequal(tmp_path / "parts", num_steps=4, lr_schedule_steps=4, resume_from_checkpoint="latest")
    train(resumed, features=(rows.replay(),))
    whole, parts = (metrics_of(tmp_path / name) for name in ("whole", "parts"))
    for name in ("loss", "grad_norm", "replay/rows"):
        assert [row[name] for row in whole] == [row[name] for row in parts]
    assert [row["replay/rows"] for row in whole] == [0, *[min(6, row["replay/rows"]) for row in whole[1:]]]
    assert whole[3]["replay/rows"] == 6 and all(1 <= row["replay/age"] <= row["replay/age_max"] for row in whole[1:])


@pytest.mark.slow
def test_a_replayed_row_is_what_its_step_sampled(tmp_path):
    """Its tokens, log-probs, reward and advantage, and its age; only rows above their group's mean are kept."""
    store, seen = rows.replay(), Seen()
    train(unequal(tmp_path, num_steps=4), features=(store, seen))
    fresh = sum(SIZES)
    kept = {}
    for step, samples in enumerate(seen.samples):
        added = len(samples.group) - fresh
        assert len(samples.rollout.tokens) == len(samples.group) and samples.counts == (len(samples.group),)
        ages = []
        for row in range(fresh, fresh + added):
            key = samples.rollout.tokens[row][samples.rollout.attention_mask[row]]
            made, logprob, reward, advantage = kept[tuple(key.tolist())]
            ages.append(step - made)
            assert samples.rollout.logprobs[row].sum() == pytest.approx(logprob, abs=1e-5)
            assert (samples.rewards[row], samples.advantages[row]) == (reward, advantage) and advantage > 0
        if ages:
            assert metrics_of(tmp_path)[step]["replay/age"] == pytest.approx(sum(ages) / len(ages))
        assert len(set(samples.group[fresh:].tolist()) | set(samples.group[:fresh].tolist())) == len(SIZES) + added
        for row in range(fresh):
            key = tuple(samples.rollout.tokens[row][samples.rollout.attention_mask[row]].tolist())
            numbers = samples.rollout.logprobs[row].sum().item(), samples.rewards[row], samples.advantages[row]
            kept[key] = (step, *numbers)
    assert len(store.stored.steps) == 12 and (store.stored.advantages > 0).all()
    assert store.stored.steps.tolist() == sorted(store.stored.steps.tolist())


def test_the_store_needs_what_the_sampler_recorded(tmp_path):
    from dllm_rl import ELBO

    with pytest.raises(ValueError, match=r"use likelihood=Trajectory\(\)"):
        train(unequal(tmp_path, likelihood=ELBO()), features=(rows.replay(),))


def test_two_features_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ReplayRows appears twice"):
        train(unequal(tmp_path), features=(rows.replay(), rows.replay()))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """With groups of unequal size, replayed rows, weights per token, and groups that move between the processes."""
    rows.run(tmp_path / "one")
    run_ranks("import sys, rows; rows.run(sys.argv[1])", 2, tmp_path / "two")
    (one, _), (two, swaps) = (torch.load(tmp_path / name / "gradients.pt") for name in ("one", "two"))
    assert swaps > 0 and one.abs().amax() > 1e-4
    torch.testing.assert_close(one, two, atol=1e-4 * one.abs().max().item(), rtol=0)
    for mine, other in zip(*(metrics_of(tmp_path / name) for name in ("one", "two")), strict=True):
        names = ("loss", "reward", "replay/rows", "replay/age", "replay/age_max", "rollout_corr/kl", "num_tokens")
        for name in names:
            if name in mine:
                assert other[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-6)
        assert math.isfinite(other["loss"])


@pytest.mark.slow
def test_two_processes_draw_the_denoising_steps_of_one(tmp_path):
    """Of completions in groups of unequal size, some of which move between the processes, in two updates a step."""
    rows.drawn(tmp_path / "one")
    run_ranks("import sys, rows; rows.drawn(sys.argv[1])", 2, tmp_path / "two")
    (one, _), (two, swaps) = (torch.load(tmp_path / name / "gradients.pt") for name in ("one", "two"))
    assert swaps > 0 and len(one) == 6 and one.abs().amax() > 1e-4
    torch.testing.assert_close(one, two, atol=1e-4 * one.abs().max().item(), rtol=0)
    for mine, other in zip(*(metrics_of(tmp_path / name) for name in ("one", "two")), strict=True):
        assert 0 < mine["drawn_steps/row_forwards"] < 3
        for name in ("drawn_steps/row_forwards", "loss", "rollout_corr/kl", "trained/rollout_is_mean"):
            assert other[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-6)


def test_samples_of_several_processes_are_joined_by_rank(tmp_path):
    def samples(first, counts):
        total = sum(counts)
        values = torch.arange(first, first + total).double()
        tokens = torch.zeros(counts[0], 2, dtype=torch.long)
        mask = tokens == 0
        rollout = Rollout(tokens, mask, mask, tokens, tokens.float(), torch.arange(counts[0]))
        return Samples(rollout, torch.arange(total), values, values, values, counts)

    joined = samples(0, (2, 3)).concatenate(samples(10, (1, 2)), pad_id=0)
    assert joined.rewards.tolist() == [0, 1, 10, 2, 3, 4, 11, 12] and joined.counts == (3, 5)
    assert joined.group.tolist() == [0, 1, 5, 2, 3, 4, 6, 7] and len(joined.rollout.tokens) == 3
    for name in ("group", "rewards", "advantages", "metric_weights"):  # one number would count for every row
        for wrong in (getattr(joined, name)[:1], getattr(joined, name)[:, None]):
            with pytest.raises(ValueError, match=rf"^Samples: {name} is of shape .* and counts=\(3, 5\) are 8 rows"):
                replace(joined, **{name: wrong})


def test_weights_and_steps_that_are_none_keep_their_meaning_when_rollouts_merge():
    zeros = torch.zeros(2, 3, dtype=torch.long)
    plain = Rollout(zeros, zeros == 0, zeros == 0, zeros, zeros.float(), torch.arange(2))
    given = replace(plain, loss_weights=torch.full((2, 3), 0.5), first_step=zeros + 4)
    for parts, halves in (((plain, given), [1, 1, 0.5, 0.5]), ((given, plain), [0.5, 0.5, 1, 1])):
        joined = Rollout.concatenate(parts, pad_id=0)
        assert joined.loss_weights[:, 0].tolist() == halves and joined.loss_weights.shape == (4, 3)
        assert joined.first_step[:, 0].tolist() == [8 * (1 - weight) for weight in halves]
        assert joined.first_step.dtype == torch.long
    placed = plain.replace_rows(torch.tensor([1]), given.rows(torch.tensor([0])), pad_id=0)
    assert placed.loss_weights[:, 0].tolist() == [1, 0.5] and placed.first_step[:, 0].tolist() == [0, 4]
    assert Rollout.concatenate([plain, plain], pad_id=0).loss_weights is None


def test_a_wrong_number_of_rows_is_named(tmp_path):
    def halves(policy, prompts, generator):
        sampler = Unmask(max_new_tokens=16, temperature=1.0)
        return sampler(policy, prompts.rows(torch.arange(len(prompts.tokens) // 2)), generator)

    from dllm_rl.samplers.sampler import FunctionSampler

    with pytest.raises(ValueError, match="must return one row for each row of its prompts"):
        train(tiny_recipe(tmp_path, sampler=FunctionSampler(function=halves, max_new_tokens=16)))


def test_equal_groups_are_what_encode_makes():
    policy = tiny_masked_lm(characters="1234.=")
    from dllm_rl.tasks import Problem

    prompts = encode(policy, [Problem("12"), Problem("3")], num_generations=3)
    assert torch.equal(prompts.group, equal_groups(2, 3)) and prompts.lengths == [2, 2, 2, 1, 1, 1]


def test_groups_cost_what_their_rows_cost():
    """Of groups of 1, 5, 2 and 6, the first forward runs 4 rows, and every other one all 14."""
    policy, run = tiny_masked_lm(**MODEL | {"characters": "123456"}), []
    policy.module.get_input_embeddings().register_forward_hook(lambda *call: run.append(len(call[-1])))
    prompts = Prompts.from_ids([[3, 4]] * 4, pad_id=policy.pad_id, num_generations=SIZES)
    rollout = Unmask(max_new_tokens=6, diffusion_steps=3, temperature=1.0)(policy, prompts, generator_for(0))
    assert run == [4, 14, 14]
    run.clear()
    likelihood = Trajectory(include_order=False)
    likelihood.logprobs(policy, rollout, likelihood.draw_views(rollout, generator_for(0)))
    assert run == [4, 14, 14]


@pytest.mark.slow
def test_the_gradient_of_shared_rows_repeats_bit_for_bit_in_two_threads():
    """The states of one row serve its group: their gradients are added in one order."""
    policy = tiny_masked_lm(characters="123456", hidden_size=64, num_layers=1, head_std=0.3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = gradients_of_shared_rows(policy)
    finally:
        torch.set_num_threads(threads)
    assert found[0].abs().max() > 0 and all(torch.equal(found[0], other) for other in found)
