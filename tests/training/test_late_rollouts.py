"""Late rollouts: the schedule by hand, the same bits from all who can make a batch, resumes, faults, bad input."""

import dataclasses
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from ray_processes import named, of_ray, workers
from refusals import refuses
from repetitions import nightly
from run_outputs import assert_same_weights, metrics_of, weights_of
from tiny_recipe import ONE_PUZZLE, SIZES, OddPuzzles, Wrapped, tiny_recipe, with_changes

from dllm_rl.algorithms.correctors import AIS, TIS, Aligned, NoCorrection
from dllm_rl.algorithms.losses import Reinforce
from dllm_rl.callbacks import Callback
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.distributed.collectives import make_accelerator
from dllm_rl.groups import GROUPED, Teacher
from dllm_rl.integrations import ray_pool
from dllm_rl.integrations.ray_pool import MAX_ATTEMPTS, RayWorkerPool, check_copies, ray_workers
from dllm_rl.integrations.serving.engine import HTTPEngine
from dllm_rl.likelihoods.estimators import ELBO, Coupled, OneStep, Trajectory
from dllm_rl.models.base import copied
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.samplers.revise import Remask
from dllm_rl.samplers.rules import MaxProb, PlackettLuce, RandomOrder, Rank, SoftThreshold
from dllm_rl.samplers.sampler import FunctionSampler
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.collect import collect
from dllm_rl.step.context import StepFeature
from dllm_rl.step.score import score_samples
from dllm_rl.step.update import train_step
from dllm_rl.tasks.datasets import task_from_dataset
from dllm_rl.training.late_rollouts.messages import deserialize, deserialize_batch, serialize, serialize_batch
from dllm_rl.training.late_rollouts.schedule import (
    AsyncRollouts,
    InProcessPool,
    PendingBatch,
    add_rollout_logprobs,
    is_of_recipe,
    read_pending_file,
    split_mismatch,
)
from dllm_rl.training.make_step import make_step
from dllm_rl.training.policies import RolloutCopy, build_policy, make_optimizer
from dllm_rl.training.trainer import check_rows, train
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Logprobs, Views
from recipes.examples.bounds import Sandwich

pytestmark = pytest.mark.usefixtures("no_rehearsal")

QUIET = {"report_to": None, "log_completions_steps": 0}
SHORT = {"train_batch_size": 2, "sampler": Unmask(max_new_tokens=16, diffusion_steps=2, temperature=1.0)}


@pytest.fixture
def ray():
    return pytest.importorskip("ray", reason="Ray is an optional extra")


def late_recipe(directory, *, late=1, workers=1, **changes):
    return tiny_recipe(
        directory, **{**QUIET, **ONE_PUZZLE, "rollout_workers": workers, "max_staleness": late, **changes}
    )


def train_here(recipe):
    return train(recipe, InProcessPool())


def test_each_batch_is_made_of_the_weights_that_the_schedule_says_also_after_a_resume(tmp_path):
    """K = 2, five steps: at the start three batches of the first weights; after step m the batch of step m + 3."""
    seen = []

    class Watched(InProcessPool):
        def submit(self, step, weights):
            seen.append(("submit", step, deserialize(weights)[1]["version"]))
            super().submit(step, weights)

        def make(self, step):
            seen.append(("make", step))
            super().make(step)

    asked = {"num_steps": 5, "save_steps": 2, "save_total_limit": 9, **SHORT}
    recipe = late_recipe(tmp_path / "run", late=2, **asked)
    whole = train(recipe, Watched())
    start = [("submit", 0, 0), ("submit", 1, 0), ("submit", 2, 0)]
    steps = [("make", 0), ("submit", 3, 1), ("make", 1), ("submit", 4, 2)]
    end = [("make", 2), ("make", 3), ("make", 4)]
    assert seen == [*start, *steps, *end]
    rows = metrics_of(tmp_path / "run")
    assert [row["rollout_version"] for row in rows] == [0, 0, 0, 1, 2]
    assert [row["staleness"] for row in rows] == [0, 1, 2, 2, 2]
    # Of the same weights, to rounding: the copy scores other rows together than the sampler did.
    assert rows[0]["mismatch_split/staleness_k3_kl"] < 1e-9 < rows[0]["mismatch_split/quantization_k3_kl"]
    assert rows[4]["mismatch_split/staleness_k3_kl"] > rows[4]["mismatch_split/quantization_k3_kl"] > 0
    assert rows[4]["num_tokens"] > rows[3]["num_tokens"] > rows[0]["num_tokens"]

    weights = weights_of(whole)
    folder = tmp_path / "run" / "checkpoints" / "step-000002"
    # The batches of steps 2 and 3 are not made yet; that of step 4 is of the checkpoint's own weights.
    pending = ["000002.weights.safetensors", "000003.weights.safetensors"]
    assert sorted(path.name for path in (folder / "rollouts").iterdir()) == pending
    assert not (tmp_path / "run" / "checkpoints" / "step-000000" / "rollouts").exists()
    seen.clear()
    train(replace(recipe, resume_from_checkpoint=str(folder)), Watched())
    assert seen == [("submit", 2, 0), ("submit", 3, 1), ("submit", 4, 2), *end]
    again = weights_of({"checkpoint": str(tmp_path / "run" / "checkpoints" / "step-000005")})
    assert all(torch.equal(weights[name], weight) for name, weight in again.items())
    assert metrics_of(tmp_path / "run") == rows


@pytest.mark.slow
def test_a_resume_takes_the_batches_that_were_made_before(tmp_path):
    class Ahead(InProcessPool):
        def submit(self, step, weights):
            super().submit(step, weights)
            self.make(step)

    recipe = late_recipe(tmp_path / "run", late=2, num_steps=6, save_steps=3, save_total_limit=9, corrector=AIS())
    weights, rows = weights_of(train(recipe, Ahead())), metrics_of(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-000003"
    assert sorted(path.name for path in (folder / "rollouts").iterdir()) == [f"00000{i}.safetensors" for i in (3, 4)]
    again = train(replace(recipe, resume_from_checkpoint=str(folder)), Ahead())
    assert all(torch.equal(weights[name], weight) for name, weight in weights_of(again).items())
    assert metrics_of(tmp_path / "run") == rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("late", "ends"),
    [
        (2, [("latest", 3), ("latest", 6)]),
        (1, [("latest", 2), ("latest", 3), ("latest", 5)]),
        (3, [("latest", 2), ("latest", 6)]),
        (2, [("latest", 4), ("step-000003", 4), ("latest", 6)]),
        (2, [("latest", 6), ("step-000003", 4), ("latest", 6)]),
    ],
    ids=["twice", "three times", "fewer steps than the lag", "the end repeated", "a shorter run, then longer again"],
)
def test_more_steps_on_a_resume_are_those_of_a_run_with_these_steps(tmp_path, late, ends):
    changes = {
        "late": late,
        "lr_schedule_steps": 6,
        "save_steps": 3,
        "save_total_limit": 9,
        "rollout_quantization": None,
    }
    changes["model"] = partial(tiny_masked_lm, **SIZES | {"hidden_size": 16, "num_layers": 1})
    whole = train_here(late_recipe(tmp_path / "whole", num_steps=ends[-1][1], **changes))
    for index, (start, num_steps) in enumerate(ends):
        start = str(tmp_path / "parts" / "checkpoints" / start) if start != "latest" else start
        recipe = late_recipe(tmp_path / "parts", num_steps=num_steps, **changes)
        parts = train_here(replace(recipe, resume_from_checkpoint=start if index else None))
    assert_same_weights(whole, parts)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")
    assert [row["staleness"] for row in metrics_of(tmp_path / "parts")] == [min(i, late) for i in range(ends[-1][1])]


SEVERAL_MASKS = {"likelihood": Coupled(), "rollout_quantization": None, "num_iterations": 2, "corrector": TIS()}


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"likelihood": Coupled()},
        nightly(SEVERAL_MASKS),
        pytest.param({"lora": Lora(), "learning_rate": 1e-2}, marks=pytest.mark.nightly),
        pytest.param({"likelihood": Sandwich()}, marks=pytest.mark.nightly),
        pytest.param({"likelihood": Trajectory(num_segments=2), "beta": 0.1}, marks=pytest.mark.nightly),
    ],
)
def test_one_step_late_is_the_loop_written_by_hand(changes, tmp_path):
    """The batch of step m is of a copy of the weights after m - 1 steps, quantized afresh. An estimate that does not
    replay the sampler is scored by that copy. Nothing here is of the schedule's file."""
    recipe = late_recipe(tmp_path / "run", num_steps=3, **SHORT | changes)
    trained = train_here(recipe)
    accelerator = make_accelerator()
    policy = build_policy(recipe, accelerator.device)
    if recipe.lora is not None:
        add_lora(policy, recipe.lora)
    optimizer = make_optimizer(recipe, policy)
    engine = RolloutCopy(recipe=recipe)
    fresh = engine.load(policy)
    reference = copied(policy) if recipe.beta else None
    run = make_step(recipe, accelerator=accelerator, policy=policy, rollout_policy=fresh, reference=reference)
    kept = [copied(policy)]
    for number in range(recipe.num_steps):
        stale = engine.load(kept[max(0, number - 1)])
        samples, _, _ = collect(replace(run, rollout_policy=stale), number)
        scores = fresh if recipe.likelihood.exact_for_sampler else stale
        train_step(replace(run, rollout_policy=scores), samples, number, optimizer)
        engine.sync(policy, fresh)
        kept.append(copied(policy))
    assert any((a != b).any() for a, b in zip(kept[0].module.parameters(), policy.module.parameters(), strict=True))
    of_run = dict(trained.policy.module.named_parameters())
    for name, weight in policy.module.named_parameters():
        assert torch.equal(weight, of_run[name]), name


@pytest.mark.nightly
@pytest.mark.parametrize("changes", [{}, SEVERAL_MASKS])
def test_without_staleness_a_worker_takes_the_steps_of_a_plain_run(changes, tmp_path):
    plain = train(tiny_recipe(tmp_path / "plain", num_steps=3, **QUIET, **changes))
    worker = train_here(late_recipe(tmp_path / "worker", late=0, num_steps=3, **changes))
    assert_same_weights(plain, worker)
    for a, b in zip(metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "worker"), strict=True):
        assert b == a | {"rollout_version": b["rollout_version"], "staleness": 0.0}
    late = train_here(late_recipe(tmp_path / "late", late=1, num_steps=3, **changes))
    assert any((weights_of(plain)[name] != weight).any() for name, weight in weights_of(late).items())


@pytest.mark.slow
@pytest.mark.parametrize("corrector", [Aligned(), nightly(TIS())])
def test_late_rollouts_go_with_correctors(corrector, tmp_path):
    train_here(late_recipe(tmp_path, late=2, num_steps=4, corrector=corrector, num_iterations=2))
    assert metrics_of(tmp_path)[-1]["staleness"] == 2


class EveryGroup(StepFeature):
    """Give every group advantages, also those of equal rewards."""

    def after_rollout(self, context, samples, step):
        signs = torch.arange(len(samples.advantages)) % 2 * 2.0 - 1
        return replace(samples, advantages=signs), {}


@pytest.mark.slow
def test_a_feature_cannot_train_on_what_a_worker_did_not_score(tmp_path):
    changes = {"task": OddPuzzles(), "likelihood": Coupled(), "num_mismatch_groups": 1, "train_batch_size": 8}
    recipe = late_recipe(tmp_path / "coupled", num_steps=1, **changes)
    with pytest.raises(ValueError, match=r"whose rollout log-probs their worker did not compute.*Trajectory"):
        train(recipe, InProcessPool(), features=(EveryGroup(),))
    exact = late_recipe(tmp_path / "exact", num_steps=1, **changes | {"likelihood": Trajectory()})
    train(exact, InProcessPool(), features=(EveryGroup(),))


class StopAfterTwo(Callback):
    def on_step(self, run, metrics):
        if run.step == 2:
            run.stop("enough")


@pytest.mark.slow
def test_batches_of_a_checkpoint_keep_the_groups_that_were_scored(tmp_path):
    """A resume that compares more groups reads a log-prob of 0 for none of them: the copy is unquantized, so that
    learner and rollout agree.
    """
    changes = {"task": OddPuzzles(), "likelihood": Coupled(), "train_batch_size": 8, "num_steps": 4}
    changes |= {"rollout_quantization": None, "learning_rate": 1e-6}
    few = late_recipe(tmp_path, workers=2, late=2, num_mismatch_groups=1, callbacks=[StopAfterTwo()], **changes)
    train(few, InProcessPool())
    (*_, last) = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert list((last / "rollouts").iterdir())
    more = replace(few, num_mismatch_groups=8, callbacks=[], resume_from_checkpoint="latest")
    train(more, InProcessPool())
    rows = metrics_of(tmp_path)
    assert len(rows) == 4 and max(row["rollout_corr/abs_log_ratio_max"] for row in rows) < 1e-2


@pytest.mark.parametrize(
    "changes",
    [{"max_staleness": 1}, {"num_iterations": 2}, {"likelihood": Trajectory()}, {"resample_masks": False}],
    ids=str,
)
@pytest.mark.repeated(first_only=True)
def test_batches_of_a_checkpoint_that_do_not_fit_are_made_again(changes, tmp_path):
    """They are of weights that are too old now, or have other log-probs than a step reads."""
    asked = {"num_steps": 4, "lr_schedule_steps": 4}
    recipe = late_recipe(tmp_path, late=2, workers=2, likelihood=OneStep(), callbacks=[StopAfterTwo()], **asked)
    train(recipe, InProcessPool())
    allowed = ",".join(GROUPED.get(name, name).partition(".")[0] for name in changes)
    resumed = {"callbacks": [], "allow_changed": allowed, "resume_from_checkpoint": "latest"}
    train(with_changes(recipe, **resumed, **changes), InProcessPool())
    rows = metrics_of(tmp_path)
    assert len(rows) == 4
    assert all(row["staleness"] <= changes.get("max_staleness", 2) for row in rows[2:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"likelihood": ELBO(num_samples=3)}, {"likelihood": OneStep()}, {"seed": 5}], ids=str
)
def test_log_probs_of_another_likelihood_or_seed_are_made_again(changes, tmp_path):
    """The sampler has the learner's weights: log-probs of the same masks agree."""

    class Ahead(InProcessPool):
        def submit(self, step, weights):
            super().submit(step, weights)
            self.make(step)

    asked = {"num_steps": 5, "lr_schedule_steps": 5, "learning_rate": 1e-9}
    asked |= {"likelihood": ELBO(num_samples=1), "rollout_quantization": None, "callbacks": [StopAfterTwo()]}
    recipe = late_recipe(tmp_path, late=2, workers=2, **asked)
    train(recipe, Ahead())
    assert list((tmp_path / "checkpoints" / "step-000002" / "rollouts").glob("0*[0-9].safetensors"))
    resumed = {"callbacks": [], "allow_changed": ",".join(changes), "resume_from_checkpoint": "latest"}
    train(with_changes(recipe, **resumed, **changes), Ahead())
    rows = metrics_of(tmp_path)
    assert len(rows) == 5 and max(row["rollout_corr/abs_log_ratio_max"] for row in rows) < 1e-2


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"learning_rate": 0.5}, True),
        ({"likelihood": ELBO(num_samples=3)}, False),
        ({"seed": 5}, False),
        ({"train_batch_size": 4}, False),
    ],
)
def test_a_stored_batch_with_log_probs_of_masks_is_of_one_likelihood_and_seed(changes, fits, tmp_path):
    recipe = tiny_recipe(tmp_path, likelihood=ELBO(num_samples=1), train_batch_size=2, num_iterations=1)
    TrainingState(version=2, dtype="float32", recipe=recipe.settings()).write(tmp_path)
    batch = SimpleNamespace(group=torch.tensor([0, 0, 1, 1]), rollout_logprobs=(torch.zeros(4, 3),))
    assert is_of_recipe(batch, recipe.replace(**changes), tmp_path) == fits


class Moves(StepFeature):
    """Changes the samples by the function that it is given."""

    def __init__(self, change):
        self.change = change

    def after_rollout(self, context, samples, step):
        return self.change(samples, context.policy.pad_id), {}


def reversed_rows(samples, pad_id):
    order = torch.arange(len(samples.group)).flip(0)
    return samples.reorder(order, samples.counts, samples.rollout.rows(order))


def reversed_and_padded(samples, pad_id):
    order = torch.arange(len(samples.group)).flip(0)
    return samples.reorder(order, samples.counts, samples.rollout.rows(order).padded(3, pad_id=pad_id))


def swapped_within_groups(samples, pad_id):
    order = torch.arange(len(samples.group)).view(-1, 2).flip(1).flatten()
    return samples.reorder(order, samples.counts, samples.rollout.rows(order))


def twice_reversed(samples, pad_id):
    return reversed_rows(reversed_rows(samples, pad_id), pad_id)


def forgets(samples, pad_id):
    return replace(samples, rollout_logprobs=())


def cuts_columns(samples, pad_id):
    rollout = samples.rollout
    return replace(samples, rollout=rollout.padded(1, pad_id=pad_id))


@pytest.mark.parametrize("likelihood", [ELBO(num_samples=2), OneStep(prompt_mask=0.5)], ids=["ELBO", "OneStep"])
def test_late_rollouts_that_a_feature_moves_keep_their_logprobs(tmp_path, likelihood):
    """Those of the weights that sampled, half a nat away from today's; each row also keeps its masks, those of its
    prompt, too.
    """
    recipe = late_recipe(tmp_path, late=1, likelihood=likelihood)
    accelerator, policy = make_accelerator(), build_policy(recipe, torch.device("cpu"))
    context = make_step(recipe, accelerator=accelerator, policy=policy, rollout_policy=policy)
    samples = add_rollout_logprobs(context, collect(context, 0)[0], 0)
    late = replace(samples, rollout_logprobs=tuple(values - 0.5 for values in samples.rollout_logprobs))
    assert (samples.source, late.source, replace(late, rollout_logprobs=()).source) == ("late", "late", "fresh")

    def scored(change):
        moved = late
        if change is not None:
            moved, _ = Moves(change).after_rollout(context, late, 0)
            check_rows(recipe, Moves(change), late, moved)
        made = score_samples(context, moved, 0)
        logps, completion = made.logps[0], made.samples.rollout.completion_mask
        at = logps.views.scored(completion)
        apart = (logps.old_logprobs - logps.rollout_logprobs)[at]
        torch.testing.assert_close(apart, torch.full_like(apart, 0.5), atol=1e-4, rtol=0)
        return torch.where(at, logps.rollout_logprobs, 0).sum(-1)

    plain = scored(None)
    for change, expected in (
        (reversed_rows, plain.flip(0)),
        (reversed_and_padded, plain.flip(0)),
        (twice_reversed, plain),
        (swapped_within_groups, plain.view(-1, 2).flip(1).flatten()),
    ):
        torch.testing.assert_close(scored(change), expected)
    for change in (forgets, cuts_columns):
        with pytest.raises(ValueError, match=r"^features: after_rollout of Moves left late rollouts of shape"):
            scored(change)
    order = torch.arange(len(late.group))
    refuses(r"^Samples.reorder: late", lambda: late.reorder(order, (len(order) // 2,) * 2, late.rollout))
    fresh = replace(late, rollout_logprobs=())
    with pytest.raises(ValueError, match=r"^Samples: rows of one group are apart"):
        fresh.reorder(order.view(2, -1).T.flatten(), fresh.counts, fresh.rollout)
    for pair in ((late, late), (late, fresh), (fresh, late)):
        with pytest.raises(ValueError, match=r"^Samples.concatenate: late"):
            pair[0].concatenate(pair[1], pad_id=policy.pad_id)


def test_a_batch_survives_its_bytes(tmp_path):
    """Every part that a rollout may have: the order's law, kept tokens, events of a rule that rewrites."""
    recipe = late_recipe(tmp_path, late=0)
    accelerator = make_accelerator()
    ranked = Unmask(max_new_tokens=8, diffusion_steps=4, rank=PlackettLuce(temperature=1.0), temperature=1.0, top_k=3)
    rewriting = Unmask(max_new_tokens=8, diffusion_steps=4, rank=RandomOrder(), commit=Remask(eta=0.3), temperature=0.7)
    coins = Unmask(max_new_tokens=8, rank=MaxProb(), commit=SoftThreshold(tau=0.1), temperature=1.0)
    found = set()
    for sampler in (ranked, rewriting, coins):
        each = replace(recipe, sampler=sampler)
        policy = build_policy(each, accelerator.device)
        run = make_step(each, accelerator=accelerator, policy=policy, rollout_policy=policy)
        collected = collect(run, 0)
        scored = tuple(torch.full((2, 3), float(i)) for i in range(11))
        collected = (replace(collected[0], rollout_logprobs=scored), *collected[1:])
        (samples, answers, metrics), seconds = deserialize_batch(
            serialize_batch(collected, 1.5), getattr(each.sampler, "rank", None), accelerator.device
        )
        assert seconds == 1.5 and metrics == collected[2] and answers == collected[1]
        assert [each[0, 0].item() for each in samples.rollout_logprobs] == list(range(11))
        assert_equal_records(samples.rollout, collected[0].rollout, found)
        assert torch.equal(samples.group, collected[0].group) and samples.counts == collected[0].counts
        assert torch.equal(samples.rewards, collected[0].rewards)
        assert torch.equal(samples.advantages, collected[0].advantages)
        assert torch.equal(samples.metric_weights, collected[0].metric_weights)
    assert {"Rollout", "FilterSupport", "Order", "Events", "rank_function"} <= found


def assert_equal_records(a, b, found):
    assert type(a) is type(b)
    found.add(type(a).__name__)
    for each in dataclasses.fields(a):
        one, other = getattr(a, each.name), getattr(b, each.name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), each.name
        elif callable(other):  # the rank, which is a record too
            assert one is other, each.name
            found.add(each.name)
        elif dataclasses.is_dataclass(other):
            assert_equal_records(one, other, found)
        else:
            assert one == other, each.name


class Failing(Wrapped):
    """Grades a few batches, and then raises."""

    calls = 0

    def reward(self, problem, completion):
        self.calls += 1
        if self.calls > 20:
            raise LookupError("no such board")
        return self.task.reward(problem, completion)


def test_an_error_of_a_grader_ends_the_run_and_the_last_step_is_saved(tmp_path):
    recipe = late_recipe(tmp_path, num_steps=6)
    recipe = replace(recipe, task=Failing(recipe.task))
    refuses(r"grader of task 'wrapped' raised .*no such board", lambda: train_here(recipe), RuntimeError)
    done = metrics_of(tmp_path)[-1]["step"] + 1
    assert (tmp_path / "checkpoints" / f"step-{done:06d}").exists()


def test_damaged_bytes_are_refused(tmp_path):
    (tmp_path / "rollouts").mkdir()
    assert read_pending_file(tmp_path, "rollouts/000001.safetensors") is None
    whole = serialize({"a": torch.ones(2)}, {"b": 1})
    for data in (b"", whole[:20], whole[:-1], b"\xff" * 40):
        (tmp_path / "rollouts" / "000001.safetensors").write_bytes(data)
        refuses(r"000001.safetensors is damaged", lambda: read_pending_file(tmp_path, "rollouts/000001.safetensors"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout_workers": 2, "max_staleness": 0}, "late: workers=2 are more than the 1 batches"),
        ({"rollout_workers": 4, "max_staleness": 2}, "use 3 workers, or max_staleness=3"),
        ({"rollout_workers": 1, "max_staleness": 1, "zero_mismatch": True, "rollout_quantization": None}, "as they do"),
        (
            {"rollout_workers": 1, "max_staleness": 1, "likelihood": Coupled(), "teacher": Teacher(model="reference")},
            "teacher with late.max_staleness=1 and likelihood='Coupled'",
        ),
        ({"rollout_workers": 1, "rollout_engine": HTTPEngine(), "rollout_quantization": None}, "serves one process"),
        ({"rollout_workers": 1, "torch_compile": True}, "do not compile their forwards, as torch_compile=True asks"),
        ({"rollout_workers": 0}, "late: workers=0 must be at least 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        tiny_recipe(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_a_missing_ray_is_refused(tmp_path, monkeypatch):
    recipe = late_recipe(tmp_path)
    assert ray_workers(with_changes(recipe, late=None)) is None
    monkeypatch.setattr(ray_pool, "find_spec", lambda name: None)
    refuses(r"needs Ray: pip install -e '.\[ray\]'", lambda: train(recipe))
    assert not tmp_path.exists() or not any(tmp_path.iterdir())


class Locked:
    """Holds what pickle refuses, as the client of a judge does."""

    def __init__(self):
        self.lock = Lock()

    def __call__(self, *arguments, **columns):
        with self.lock:
            return [1.0] * len(columns["completions"])


class LockedRank(Rank):
    lock: Any

    def __call__(self, logits):
        return logits[:, 0]


def reward_of_a_closure():
    lock = Lock()

    def judged(completions, **columns):
        with lock:
            return [1.0] * len(completions)

    return judged


class Rows:
    """Rows of a database."""

    def __init__(self):
        self.database = sqlite3.connect(":memory:")

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index]


def any_text(completions, **columns):
    return [1.0] * len(completions)


ROWS = [{"prompt": "12="}, {"prompt": "34="}]


@pytest.mark.parametrize(
    ("changes", "named", "cause"),
    [
        (lambda: {"task": task_from_dataset(ROWS, reward_funcs=reward_of_a_closure())}, "judged", "'_thread.lock'"),
        (lambda: {"task": task_from_dataset(ROWS, reward_funcs=Locked())}, "task=DatasetTask", "'_thread.lock'"),
        (
            lambda: {"task": task_from_dataset(Rows(), reward_funcs=any_text)},
            "task=DatasetTask",
            "'sqlite3.Connection'",
        ),
        (
            lambda: {"sampler": Unmask(max_new_tokens=4, rank=LockedRank(lock=Lock()))},
            "sampler=Unmask(max_new_tokens=4",
            "'_thread.lock'",
        ),
        (lambda: {"advantages": partial(len, (i for i in "ab"))}, "advantages=functools.partial", "'generator'"),
        (lambda: {"model": partial(len, socket.socket())}, "model=functools.partial", "'socket'"),
    ],
)
def test_what_has_no_copy_for_workers_is_refused_in_a_line_before_ray_starts(
    ray, tmp_path, monkeypatch, changes, named, cause
):
    monkeypatch.setattr(ray_pool, "start_ray", lambda *_: pytest.fail("Ray was started"))
    recipe = late_recipe(tmp_path)
    for name, value in changes().items():
        object.__setattr__(recipe, name, value)  # without the checks of a recipe, which are not of this test
    with pytest.raises(ValueError, match="has no copy for workers: cannot pickle") as error:
        ray_workers(recipe)
    assert named in str(error.value) and cause in str(error.value) and len(str(error.value)) < 380
    assert "\n" not in str(error.value)


def test_workers_need_no_copy_of_a_callback(ray, tmp_path):
    callback = Callback()
    callback.lock = Lock()
    recipe = late_recipe(tmp_path, callbacks=(callback,))
    check_copies(vars(recipe))
    pool, sent = object.__new__(RayWorkerPool), []
    pool.ray, pool.threads, pool.kind = SimpleNamespace(put=sent.append), 1, "cpu"
    context = SimpleNamespace(log=SimpleNamespace(say=print), policy=build_policy(recipe, torch.device("cpu")))
    pool.set_up(recipe, context)
    assert ray.cloudpickle.loads(ray.cloudpickle.dumps(sent[0]))[0].callbacks == ()
    context.policy.tokenizer.lock, pool.ray.put = Lock(), ray.cloudpickle.dumps  # as of a maker of one's own
    with pytest.raises(ValueError, match=r"model=ModulePolicy\(.*cannot pickle '_thread.lock'") as error:
        pool.set_up(recipe, context)
    assert "\n" not in str(error.value)


def test_other_learners_do_not_wait_in_an_exchange_for_the_complete_batch(tmp_path):
    """`_next` gives None after a quarter of collective_timeout, then the pool's batch, or its error."""
    finished, failure = {}, []

    class Slow(InProcessPool):
        def ready(self, step):
            return finished.get(step)

        def wait(self):
            time.sleep(0.001)

        def mend(self, steps):
            if failure:
                raise failure.pop()

    two = SimpleNamespace(num_processes=2)
    pending = {0: PendingBatch(b"", 0), 1: PendingBatch(b"", 0)}
    recipe = late_recipe(tmp_path, collective_timeout=0.02)
    rollouts = AsyncRollouts(recipe, SimpleNamespace(accelerator=two), Slow(), pending)
    assert rollouts._next(0) is None and rollouts._next(0) is None
    finished[0] = b"a batch"
    assert rollouts._next(0) == b"a batch"
    failure.append(ValueError("the grader failed"))
    refuses("the grader failed", lambda: rollouts._next(1))


# --- With Ray: each test starts a cluster, and workers that import the library ----------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "likelihood",
    [
        pytest.param({}, id="recorded"),
        pytest.param({"likelihood": Coupled()}, id="scored", marks=pytest.mark.nightly),
    ],
)
def test_workers_make_the_bits_of_this_process(ray, likelihood, tmp_path, capsys):
    changes = {"num_steps": 5, "log_completions_steps": 1, "late": 2, **likelihood}
    before = signal.getsignal(signal.SIGTERM)
    runs = {"here": train_here(late_recipe(tmp_path / "here", **changes))}
    for count in (1, 2):
        runs[count] = train(late_recipe(tmp_path / str(count), workers=count, **changes))
        assert not of_ray() and signal.getsignal(signal.SIGTERM) == before
    for name in (1, 2):
        assert_same_weights(runs["here"], runs[name])
        assert metrics_of(tmp_path / str(name)) == metrics_of(tmp_path / "here")
        texts = [(tmp_path / each / "completions.jsonl").read_text() for each in ("here", str(name))]
        assert texts[0] == texts[1]
    assert "ray" not in capsys.readouterr().err.lower()


def test_a_job_goes_to_the_worker_with_the_fewest_to_do(monkeypatch):
    monkeypatch.setattr(RayWorkerPool, "_send_job", lambda *_: Future())
    pool = object.__new__(RayWorkerPool)
    pool.workers, pool.jobs = [None, None], {}
    for number in range(3):
        pool.submit(number, b"")
    for number in (0, 2):
        pool.jobs[number].future.set_result(b"a batch")
    pool.submit(3, b"")  # the other one is still at step 1's
    assert [job.worker for job in pool.jobs.values()] == [0, 1, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("number_of", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.nightly)])
def test_a_worker_that_dies_or_hangs_is_replaced(ray, number_of, tmp_path, monkeypatch, capsys):
    """A stopped process keeps its memory and its sockets, and never answers: as one that hangs in a driver's call. The
    batch of step 3 is handed out after the blow, so that it is always one that the struck worker cannot make."""
    expected = train_here(late_recipe(tmp_path / "here", num_steps=5))
    plain = AsyncRollouts.collect
    struck = []

    def struck_first(late, number):
        if number == 1:
            for process in workers():
                process.send_signal(getattr(signal, number_of))
                struck.append(process)
        return plain(late, number)

    monkeypatch.setattr(AsyncRollouts, "collect", struck_first)
    waits = {"SIGKILL": {}, "SIGSTOP": {"collective_timeout": 60.0}}  # a death is noticed at once
    found = train(late_recipe(tmp_path / "run", num_steps=5, **waits[number_of]))
    (process,) = struck
    why = "died" if number_of == "SIGKILL" else "did not return within collective_timeout=60 s"
    assert why in capsys.readouterr().out
    assert not process.is_running()
    assert_same_weights(expected, found)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "here")
    assert not of_ray()


@pytest.mark.nightly
def test_a_job_that_kills_every_worker_ends_the_run_in_a_line(ray, tmp_path):
    learner = os.getpid()
    plain = tiny_recipe(tmp_path).sampler

    def deadly(policy, prompts, generator):  # of this function: pickled with its code
        if os.getpid() != learner and policy.weights_version:
            os._exit(1)
        return plain(policy, prompts, generator)

    with pytest.raises(RuntimeError, match=rf"rollouts of step 2: {MAX_ATTEMPTS} workers in turn .* died") as error:
        train(late_recipe(tmp_path, num_steps=4, sampler=FunctionSampler(function=deadly, max_new_tokens=16)))
    assert "\n" not in error.value.args[0]
    folder = tmp_path / "checkpoints" / "step-000002"
    assert [path.name for path in (folder / "rollouts").iterdir()] == ["000002.weights.safetensors"]
    assert not of_ray()


SHARDED = """
import sys
from tiny_recipe import ONE_PUZZLE, tiny_recipe
from dllm_rl import Lora
from dllm_rl.distributed.sharding import sharding_of
from dllm_rl.training.trainer import check_rows, train
changes = {"lora": Lora()} if sys.argv[2] == "lora" else {}
recipe = tiny_recipe(sys.argv[1], rollout_workers=2, max_staleness=1, num_steps=4, save_steps=2, save_total_limit=9,
                     shard_size=0, report_to=None, log_completions_steps=0, **ONE_PUZZLE, **changes)
assert sharding_of(train(recipe).policy.module) is not None
"""


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["full", pytest.param("lora", marks=pytest.mark.nightly)])
def test_two_sharded_learners_publish_full_weights(ray, trained, tmp_path):
    """Two processes with half of the weights each, and two workers: to rounding the run of one process. Its checkpoint
    has the batches, or the full weights to make them."""
    changes = {"lora": Lora()} if trained == "lora" else {}
    expected = train_here(late_recipe(tmp_path / "one", num_steps=4, **changes))
    run_ranks(SHARDED, 2, tmp_path / "two", trained)
    for a, b in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-5)
    found = {"checkpoint": str(tmp_path / "two" / "checkpoints" / "step-000004")}
    assert_same_weights(expected, found, rtol=0, atol=5e-5)
    stored = [*(tmp_path / "two" / "checkpoints" / "step-000002" / "rollouts").iterdir()]
    assert len(stored) == 1
    again = late_recipe(
        tmp_path / "two", num_steps=4, resume_from_checkpoint=str(stored[0].parents[1]), shard_size=1, **changes
    )
    assert_same_weights(expected, train_here(again), rtol=0, atol=5e-5)


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_learners(ray, tmp_path):
    learner = os.getpid()
    plain = tiny_recipe(tmp_path).sampler

    def wrong(policy, prompts, generator):
        if os.getpid() != learner:
            raise LookupError("no such token")
        return plain(policy, prompts, generator)

    with pytest.raises(RuntimeError, match=r"^LookupError: no such token"):
        train(late_recipe(tmp_path, num_steps=4, sampler=FunctionSampler(function=wrong, max_new_tokens=16)))
    assert not of_ray()


@pytest.mark.slow
def test_a_cluster_without_room_is_refused(ray, tmp_path):
    with pytest.raises(ValueError, match=r"late.workers=999 take 1 CPU each .* free: use fewer workers") as error:
        train(late_recipe(tmp_path, workers=999, late=998))
    assert "\n" not in str(error.value) and not of_ray()


def test_an_address_where_nobody_listens_is_refused(ray, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ValueError, match=r"nothing answers at RAY_ADDRESS='127.0.0.1:1'.*unset RAY_ADDRESS") as error:
        train(late_recipe(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_the_death_of_rays_own_processes_ends_the_run_in_a_line_with_its_last_step_saved(ray, name, tmp_path):
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), str(here.parent / "support")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    run = tmp_path / "run"
    program = PROGRAM.replace("num_steps=12", "num_steps=4000").replace("save_steps=3", "save_steps=4000")
    with subprocess.Popen(
        [sys.executable, "-c", program, str(run)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as learner:
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes().splitlines()) < 3:
            assert learner.poll() is None
            time.sleep(0.05)
        import psutil

        (daemon,) = [p for p in psutil.Process(learner.pid).children() if Path((named(p) or [""])[0]).name == name]
        daemon.kill()
        _, words = learner.communicate()
    assert learner.returncode == 1
    assert f"Ray's process {name} died" in words.decode()
    steps = len((run / "metrics.jsonl").read_bytes().splitlines())
    assert (run / "checkpoints" / f"step-{steps:06d}").is_dir()


PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from test_late_rollouts import late_recipe
from dllm_rl.training.trainer import check_rows, train
train(late_recipe(sys.argv[1], num_steps=12, train_batch_size=8, num_generations=8, late=2, save_steps=3,
                  resume_from_checkpoint="latest"))
"""


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_learner_that_ends_leaves_no_process_and_its_run_goes_on(ray, number, tmp_path):
    changes = {"num_steps": 12, "train_batch_size": 8, "num_generations": 8, "late": 2, "save_steps": 3}
    expected = train_here(late_recipe(tmp_path / "here", **changes))
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), str(here.parent / "support")]
    run = tmp_path / "run"
    command = [sys.executable, "-c", PROGRAM, str(run)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as learner:
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes().splitlines()) < 5:
            assert learner.poll() is None
            time.sleep(0.05)
        mine = of_ray()
        for process in mine:
            process.info = named(process)[0]
        assert any(process.info.startswith("ray::Worker") for process in mine)
        learner.send_signal(number)
        assert learner.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    # Two agents of Ray's, which do nothing without it, take a minute to see that it is gone.
    mine = [process for process in mine if "Agent" not in process.info]
    until = time.monotonic() + 30
    while any(process.is_running() and process.status() != "zombie" for process in mine):
        assert time.monotonic() < until
        time.sleep(0.1)
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    (found,) = (run / "checkpoints").glob("step-000012")
    assert_same_weights(expected, {"checkpoint": str(found)})
    assert metrics_of(run) == metrics_of(tmp_path / "here")


@pytest.mark.slow
def test_a_resume_with_another_batch_size_makes_the_batches_again(tmp_path, monkeypatch):
    """Those of the checkpoint have another number of prompts, which other processes could not divide."""
    seen = []
    plain = AsyncRollouts.collect

    def watched(self, step):
        found = plain(self, step)
        seen.append(len(found[0].group))
        return found

    monkeypatch.setattr(AsyncRollouts, "collect", watched)
    asked = {"num_steps": 5, "lr_schedule_steps": 5, "num_generations": 4}
    recipe = late_recipe(tmp_path, late=2, workers=2, train_batch_size=3, callbacks=[StopAfterTwo()], **asked)
    train(recipe, InProcessPool())
    assert list((tmp_path / "checkpoints").glob("*/rollouts/*"))
    changes = {"train_batch_size": 4, "allow_changed": "train_batch_size", "resume_from_checkpoint": "latest"}
    train(with_changes(recipe, callbacks=[], **changes), InProcessPool())
    assert seen == [12] * 2 + [16] * 3


def test_an_order_whose_rank_the_sampler_does_not_name_is_not_scored_by_another(tmp_path):
    inner = Unmask(max_new_tokens=16, diffusion_steps=3, temperature=1.0, rank=PlackettLuce(temperature=1.0))

    def wrapped(policy, prompts, generator):
        return inner(policy, prompts, generator)

    sampler = FunctionSampler(function=wrapped, max_new_tokens=16)
    recipe = late_recipe(tmp_path, sampler=sampler, likelihood=Trajectory(), num_steps=1)
    with pytest.raises(ValueError, match="drawn by a rank, and the recipe's sampler has no field rank to score it by"):
        train(recipe, InProcessPool())


def test_workers_of_a_rank_with_weights_of_its_own_are_refused(tmp_path):
    class Learned(Rank):
        order = "deterministic"

        def __call__(self, hidden):
            return hidden[:, 0]

    sampler = Unmask(max_new_tokens=16, rank=PlackettLuce(temperature=1.0, base_rank=Learned()))
    with pytest.raises(
        ValueError, match=r"late\.workers=1 sample with copies of the sampler's rank, which reads hidden"
    ):
        late_recipe(tmp_path, sampler=sampler)
    assert tiny_recipe(tmp_path, sampler=sampler).sampler == sampler


def test_the_parts_of_the_mismatch_have_the_signs_of_the_whole():
    """The learner gives a token -1 nat, its quantized copy -2 and the older weights -4: log rho 3 is 1 and 2."""
    tokens = torch.zeros(2, 3, dtype=torch.long)
    everywhere = tokens == 0
    rollout = Rollout(tokens, everywhere, everywhere, tokens, tokens.float(), torch.zeros(2, dtype=torch.long))
    views = Views(everywhere[None], everywhere[None].float())
    old, rollout_logprobs = torch.full((2, 3), -1.0), torch.full((2, 3), -4.0)
    logps = Logprobs(old, old[None], rollout_logprobs, None, views)
    result = SimpleNamespace(samples=SimpleNamespace(rollout=rollout), logps=logps)
    likelihood = SimpleNamespace(logprobs=lambda *given, **more: torch.full((2, 3), -2.0))
    context = SimpleNamespace(
        settings=SimpleNamespace(likelihood=likelihood, micro_batch_size=None),
        policy="learner",
        rollout_policy="copy",
        learner_samples=False,
        log=SimpleNamespace(stage=lambda name: nullcontext()),
        arithmetic=nullcontext,
    )
    found = split_mismatch(context, result)
    assert found["mismatch_split/quantization_kl"] == -1 and found["mismatch_split/staleness_kl"] == -2


def test_late_rollouts_have_logprobs_of_the_first_masks_alone_where_nothing_reads_the_later_ones(tmp_path):
    changes = {"num_iterations": 2, "likelihood": Coupled(), "loss": Reinforce(), "corrector": NoCorrection()}
    recipe = late_recipe(tmp_path, late=1, **changes)
    accelerator, policy = make_accelerator(), build_policy(recipe, torch.device("cpu"))
    context = make_step(recipe, accelerator=accelerator, policy=policy, rollout_policy=policy)
    late = add_rollout_logprobs(context, collect(context, 0)[0], 0)
    assert len(late.rollout_logprobs) == 1
    for samples in (late, replace(late, rollout_logprobs=())):
        assert [logps.is_scored for logps in score_samples(context, samples, 0).logps] == [True, False]
