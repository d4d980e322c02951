"""The schedule first_ready: its rule with simulated times, runs without Ray, resumes, and two Ray workers."""

import itertools
import json
import time
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from ray_processes import of_ray, workers
from run_outputs import metrics_of, weights_of
from tiny_recipe import tiny_recipe

from dllm_rl.distributed.collectives import make_accelerator
from dllm_rl.likelihoods.estimators import Coupled, Trajectory
from dllm_rl.models.base import copied
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.samplers.sampler import FunctionSampler
from dllm_rl.step.collect import collect
from dllm_rl.step.update import train_step
from dllm_rl.training.late_rollouts import first_ready
from dllm_rl.training.late_rollouts.first_ready import FirstReadyRollouts, choose_batch, read_order
from dllm_rl.training.late_rollouts.messages import deserialize, trained_weights
from dllm_rl.training.late_rollouts.ray_pool import RayWorkerPool
from dllm_rl.training.late_rollouts.schedule import ORDER_FILE, InProcessPool
from dllm_rl.training.make_step import make_step
from dllm_rl.training.policies import RolloutCopy, build_policy, make_optimizer
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")

FIRST_READY = {"report_to": None, "log_completions_steps": 0, "rollout_schedule": "first_ready"}


def first_ready_recipe(directory, *, late=2, workers=2, **changes):
    return tiny_recipe(directory, **{**FIRST_READY, "rollout_workers": workers, "max_staleness": late, **changes})


# --- The rule, with simulated workers and a learner that only counts ------------------------------------


class Simulated(InProcessPool):
    """Workers that take the given times; a batch is the version of its weights."""

    def set_up(self, recipe, context):
        self.num_workers, self.policy = recipe.rollout_workers, context.policy
        self.jobs, self.made, self.published = {}, {}, self.policy.weights_version

    def submit(self, step, weights):
        version = deserialize(weights)[1]["version"]
        assert self.num_free() and version == self.published, "the newest weights, to a worker that is free"
        super().submit(step, str(version).encode())

    def forget(self, step):
        super().forget(step)  # during the learner's step
        self.published = self.policy.weights_version

    def make(self, step):
        self.made[step] = self.jobs[step]


def simulate(duration, *, workers, late, steps, saved=None):
    """Train on `steps` batches; returns (number, version, learner's version) of each. At the steps `saved` the run
    stops, and is resumed from what it saves with that number of workers."""
    policy = SimpleNamespace(weights_version=0, module=torch.nn.Identity())
    recipe = SimpleNamespace(
        max_staleness=late,
        num_steps=steps,
        rollout_workers=workers,
        collective_timeout=1.0,
        rollout_schedule="",
        sampler=None,
        likelihood=Trajectory(),
    )
    one = SimpleNamespace(num_processes=1)
    context = SimpleNamespace(recipe=recipe, policy=policy, accelerator=one)
    rollouts = begun(context, duration, 0, {}, [], 0)
    trained = []
    for step in range(steps):
        if saved and step in saved:
            recipe.rollout_workers = saved[step]
            files = rollouts.files(step)
            order = json.loads(files.pop(first_ready.ORDER_FILE))
            made = {int(name[9:15]): (int(batch), batch) for name, batch in files.items()}
            rollouts = begun(context, duration, step, made, order["unfinished"], order["next"])
            assert made.keys() <= rollouts.pending.keys(), "nothing finished is lost"
        assert_in_time(rollouts, late)
        number, batch = rollouts._next(step)
        assert number in numbers_of(rollouts.files(step)), "taken, and not yet trained on"
        assert number not in numbers_of(rollouts.files(step + 1)), "trained on, and not yet published"
        trained.append((number, int(batch), step))
        policy.weights_version += 1
        rollouts._submit_next(step, trained_weights(policy), rollouts.pool)
        assert_in_time(rollouts, late)
    assert not rollouts.pending and not rollouts.numbers
    return trained


def numbers_of(files):
    return {int(name[9:15]) for name in files if name != first_ready.ORDER_FILE}


def begun(context, duration, steps_done, made, unfinished, next_number):
    rollouts = FirstReadyRollouts(context.recipe, context, Simulated(duration))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(first_ready, "read_made", lambda *_: made)
        patched.setattr(first_ready, "read_order", lambda *_: (unfinished, next_number))
        patched.setattr(first_ready, "run_exit_stack", ExitStack)
        rollouts._begin(steps_done, None, context, trained_weights(context.policy))
    return rollouts


def assert_in_time(rollouts, late):
    ages = [batch.age for batch in rollouts.pending.values()]
    assert ages == sorted(ages) and len(ages) <= late + 1
    assert all(rollouts.version + place <= age + late for place, age in enumerate(ages)), (
        "all can be trained on in time"
    )


def assert_bounded(trained, late):
    assert all(0 <= learner - version <= late for _, version, learner in trained)
    assert sorted(number for number, _, _ in trained) == list(range(len(trained))), "each batch once"


@pytest.mark.parametrize(("workers", "late"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 4)])
@pytest.mark.repeated(every=3)
def test_no_batch_is_too_old_whatever_workers_take_and_each_is_trained_on_once(workers, late):
    """Every combination of three times, from much shorter to much longer than a learner's step."""
    for times in itertools.product((0.3, 1.0, 4.5), repeat=5):
        assert_bounded(simulate(times.__getitem__, workers=workers, late=late, steps=5), late)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(0.01, 20.0), min_size=2, max_size=24),
    st.integers(1, 5),
    st.integers(0, 6),
    st.dictionaries(st.integers(0, 23), st.integers(1, 5), max_size=4),
)
def test_no_batch_is_too_old_or_lost_also_after_resumes(times, workers, more, saved):
    late = max(1, max(workers, *saved.values()) - 1 + more) if saved else max(1, workers - 1 + more)
    # After a resume a worker may take another time.
    calls = itertools.count()
    trained = simulate(
        lambda number: times[(number + next(calls)) % len(times)],
        workers=workers,
        late=late,
        steps=len(times),
        saved=saved,
    )
    assert_bounded(trained, late)


@pytest.mark.parametrize("saved_at", [5, 6, 7])
def test_finished_batches_of_another_schedule_are_trained_on_once_also_after_a_further_resume(saved_at):
    """A checkpoint of 'in_order' at step 4, with batches 4, 5 and 7 finished and 6 not, has no file of the order."""
    recipe = SimpleNamespace(
        max_staleness=5,
        num_steps=12,
        rollout_workers=1,
        collective_timeout=1.0,
        rollout_schedule="",
        sampler=None,
        likelihood=Trajectory(),
    )
    policy = SimpleNamespace(weights_version=4, module=torch.nn.Linear(1, 1))
    context = SimpleNamespace(recipe=recipe, policy=policy, accelerator=SimpleNamespace(num_processes=1))
    made = dict.fromkeys((4, 5, 7), (4, b"4"))
    rollouts = begun(context, lambda _: 50.0, 4, made, [], 4)  # its worker finishes nothing before the save
    trained = []
    for step in range(4, 12):
        if step == saved_at:
            files = rollouts.files(step)
            order = json.loads(files.pop(first_ready.ORDER_FILE))
            made = {int(name[9:15]): (int(batch), batch) for name, batch in files.items()}
            rollouts = begun(context, lambda _: 0.5, step, made, order["unfinished"], order["next"])
        trained.append(rollouts._next(step)[0])
        policy.weights_version += 1
        rollouts._submit_next(step, trained_weights(policy), rollouts.pool)
    assert sorted(trained) == list(range(4, 12))


def test_a_slow_batch_lets_others_pass_until_it_is_due():
    """Batch 0 takes 4.4 steps; two workers, at most three updates old. By hand: while one worker makes it, the other
    makes 1, 2 and 3, which the learner takes meanwhile. Then 0 is due: three updates were made since its weights."""
    trained = simulate(lambda number: 4.4 if number == 0 else 0.5, workers=2, late=3, steps=8)
    assert [number for number, _, _ in trained[:4]] == [1, 2, 3, 0]
    assert trained[3] == (0, 0, 3)
    assert_bounded(trained, 3)
    # In equal times nothing passes, and batches of one worker, slower than the learner, are one update old.
    assert simulate(lambda _: 1.5, workers=1, late=3, steps=4) == [(0, 0, 0), (1, 0, 1), (2, 1, 2), (3, 2, 3)]


@pytest.mark.parametrize(
    ("versions", "made", "learner", "late", "chosen"),
    [
        ({0: 0, 1: 0}, {1}, 0, 1, 1),  # 0 can wait for one step: it is due at version 1
        ({0: 0, 1: 0}, {1}, 1, 1, None),  # 0 is due now
        ({0: 0, 1: 0}, {0, 1}, 1, 1, 0),
        ({0: 0, 1: 0, 2: 1}, {2}, 1, 2, None),  # 0 and 1 are due at versions 1 and 2
        ({0: 1, 1: 1, 2: 2}, {2}, 1, 3, 2),
        ({5: 4}, set(), 4, 1, None),
        ({}, set(), 0, 1, None),
    ],
)
def test_a_batch_is_taken_only_if_the_older_ones_can_wait(versions, made, learner, late, chosen):
    assert choose_batch(versions, made.__contains__, learner, late) == chosen


# --- Runs in this process -------------------------------------------------------------------------------


def slow_first(number):
    """Every fourth batch takes three steps and a half, the others half a step."""
    return 3.5 if number % 4 == 0 else 0.5


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("changes", [{"likelihood": Coupled(), "rollout_quantization": None}, {}])
def test_a_batch_keeps_its_prompts_numbers_and_masks_in_whatever_step_it_is_trained_on(changes, tmp_path):
    """The run is the loop written by hand: batch b of the weights that the metrics name, trained on in the step that
    they name."""
    recipe = first_ready_recipe(tmp_path / "run", late=3, num_steps=4, log_completions_steps=1, **changes)
    trained = train(recipe, InProcessPool(slow_first))
    rows = metrics_of(tmp_path / "run")
    numbers, versions = ([int(row[name]) for row in rows] for name in ("rollout_batch", "rollout_version"))
    assert numbers != sorted(numbers) and sorted(numbers) == list(range(4))
    assert [row["staleness"] for row in rows] == [step - version for step, version in enumerate(versions)]
    written = current_rows(tmp_path / "run" / "completions.jsonl")
    assert {(row["step"], row["weights_version"]) for row in written} == set(enumerate(versions))

    accelerator = make_accelerator()
    policy = build_policy(recipe, accelerator.device)
    optimizer, engine = make_optimizer(recipe, policy), RolloutCopy(recipe=recipe)
    fresh = engine.load(policy)
    run = make_step(recipe, accelerator=accelerator, policy=policy, rollout_policy=fresh, reference=None)
    kept = [copied(policy)]
    for step, (number, version) in enumerate(zip(numbers, versions, strict=True)):
        stale = engine.load(kept[version])
        stale.weights_version = version
        samples, _, _ = collect(replace(run, rollout_policy=stale), number)
        scores = fresh if recipe.likelihood.exact_for_sampler else stale
        train_step(replace(run, rollout_policy=scores), samples, step, optimizer)
        engine.sync(policy, fresh)
        kept.append(copied(policy))
    of_run = dict(trained.policy.module.named_parameters())
    for name, weight in policy.module.named_parameters():
        assert torch.equal(weight, of_run[name]), name


@pytest.mark.slow
def test_a_resume_keeps_finished_batches_and_makes_the_others_again(tmp_path):
    recipe = first_ready_recipe(tmp_path / "run", late=3, num_steps=8, save_steps=2, save_total_limit=9)
    train(recipe, InProcessPool(slow_first))
    before = {int(row["step"]): row for row in metrics_of(tmp_path / "run")}
    folder = tmp_path / "run" / "checkpoints" / "step-000002"
    order = json.loads((folder / "rollouts" / "order.json").read_text())
    stored = sorted(path.name for path in (folder / "rollouts").glob("*.safetensors"))
    done = {int(before[step]["rollout_batch"]) for step in (0, 1)}
    assert 0 in order["unfinished"] and stored, "one is under way, and another is finished"
    assert done | {*order["unfinished"]} | {int(name[:6]) for name in stored} == set(range(order["next"]))

    submitted = set()

    class Watched(InProcessPool):
        def submit(self, step, weights):
            submitted.add(step)
            super().submit(step, weights)

    resumed = replace(recipe, resume_from_checkpoint=str(folder))
    weights = weights_of(train(resumed, Watched(slow_first)))
    rows = metrics_of(tmp_path / "run")
    assert sorted(row["rollout_batch"] for row in rows) == list(range(8)), "each batch once, before or after"
    assert max(row["staleness"] for row in rows) <= 3
    assert not {int(name[:6]) for name in stored} & submitted, "what was finished is not made again"
    again = weights_of(train(resumed, InProcessPool(slow_first)))
    assert all(torch.equal(weights[name], weight) for name, weight in again.items())

    with pytest.raises(ValueError, match="rollout_schedule='in_order' differs from the checkpoint's 'first_ready'"):
        train(replace(resumed, rollout_schedule="in_order"), InProcessPool())
    changed = {"rollout_schedule": "in_order", "allow_changed": "rollout_schedule"}
    with pytest.raises(ValueError, match="'in_order' cannot continue a run of 'first_ready'"):
        train(replace(resumed, **changed), InProcessPool())


@pytest.mark.slow
def test_a_resume_may_change_the_schedule_or_the_bound(tmp_path):
    """From in_order with K = 3 to first_ready with K = 1: stored batches that would be too old are made again."""

    class Ahead(InProcessPool):
        def submit(self, step, weights):
            super().submit(step, weights)
            self.make(step)

    changes = {"late": 3, "num_steps": 6, "save_steps": 3, "save_total_limit": 9, "rollout_schedule": "in_order"}
    train(first_ready_recipe(tmp_path, **changes), Ahead())
    folder = tmp_path / "checkpoints" / "step-000003"
    assert len([*(folder / "rollouts").iterdir()]) == 3
    changes |= {"late": 1, "rollout_schedule": "first_ready", "resume_from_checkpoint": str(folder)}
    allowed = "rollout_schedule,max_staleness"
    train(first_ready_recipe(tmp_path, **changes, allow_changed=allowed), InProcessPool())
    rows = metrics_of(tmp_path)
    assert [row["rollout_batch"] for row in rows[3:]] == [5, 3, 4], "that of step 5 is one update old"
    assert [row["rollout_version"] for row in rows[3:]] == [2, 3, 4]


def test_a_pool_without_the_methods_is_refused_before_any_work(tmp_path):
    class Old:
        set_up = submit = ready = result = forget = None

    for schedule in ("first_ready", "in_order"):
        with pytest.raises(ValueError, match=r"pool=Old lacks a method of WorkerPool; it needs .* wait, mend"):
            train(first_ready_recipe(tmp_path / "run", rollout_schedule=schedule), Old())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"workers": 0, "late": 0}, {"workers": 1, "late": 0}])
def test_a_schedule_with_nothing_to_choose_is_refused(changes, tmp_path):
    with pytest.raises(ValueError, match=r"'first_ready' chooses among batches .* set max_staleness to 1"):
        first_ready_recipe(tmp_path, **changes)


# --- With Ray -------------------------------------------------------------------------------------------


class Lost(Exception):
    """Stands for Ray's errors of a lost worker."""


@pytest.fixture
def pool(monkeypatch):
    """A pool of two workers whose jobs are futures; `sent` has the jobs that it sends."""
    pool = object.__new__(RayWorkerPool)
    pool.workers, pool.jobs, pool.timeout = [None, None], {}, 60.0
    names = dict.fromkeys(("RayActorError", "WorkerCrashedError", "ObjectLostError"), Lost)
    pool.ray = SimpleNamespace(exceptions=SimpleNamespace(**names, RayError=KeyError), kill=lambda worker: None)
    pool.actor = SimpleNamespace(remote=lambda: None)
    pool.said, pool.sent = [], []
    pool.say = pool.said.append

    def send(pool, step, weights, worker):
        pool.sent.append((step, weights, worker))
        return Future()

    monkeypatch.setattr(RayWorkerPool, "_send_job", send)
    monkeypatch.setattr(RayWorkerPool, "check_daemons", lambda *_: None)
    return pool


def test_jobs_of_lost_and_late_workers_are_repeated_with_their_weights(pool):
    pool.submit(0, b"zero")
    pool.submit(1, b"one")
    assert pool.num_free() == 0 and pool.sent == [(0, b"zero", 0), (1, b"one", 1)]
    pool.mend(pool.jobs)
    assert len(pool.sent) == 2, "nothing to mend"
    pool.jobs[0].future.set_exception(Lost())
    assert pool.num_free() == 0, "the lost worker has a job to repeat"
    pool.mend(pool.jobs)
    assert pool.sent[2:] == [(0, b"zero", 0)] and "step 0 died" in pool.said[0]
    pool.jobs[1].waiting_since -= 61
    pool.mend(pool.jobs)
    assert pool.sent[3:] == [(1, b"one", 1)] and "step 1 did not return within" in pool.said[1]
    pool.mend(pool.jobs)
    assert len(pool.sent) == 4, "its time begins again"
    pool.jobs[1].future.set_result(b"a batch")
    assert pool.ready(1) == b"a batch" and pool.num_free() == 1
    pool.jobs[0].future.set_result(("ValueError", "the grader failed"))
    pool.mend([1])  # in order, an error is raised when the learner needs the batch
    pool.wait()  # which waits for running jobs only
    with pytest.raises(ValueError, match="the grader failed"):
        pool.mend(pool.jobs)


@pytest.mark.slow
def test_two_ray_workers_keep_the_bound_also_after_their_death(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray", reason="Ray is an optional extra")
    recipe = first_ready_recipe(tmp_path, late=3, num_steps=12, save_steps=5)
    plain = recipe.sampler

    def uneven(policy, prompts, generator):  # of this function: pickled with its code
        time.sleep(int(prompts.tokens.sum()) % 3 * 0.2)
        return plain(policy, prompts, generator)

    plain_collect = FirstReadyRollouts.collect

    def struck_first(rollouts, step):
        if step == 4:
            for process in workers():
                process.kill()
        return plain_collect(rollouts, step)

    monkeypatch.setattr(FirstReadyRollouts, "collect", struck_first)
    recipe = replace(recipe, sampler=FunctionSampler(function=uneven, max_new_tokens=16))
    train(recipe)
    assert "another worker repeats the job" in capsys.readouterr().out
    rows = metrics_of(tmp_path)
    assert sorted(row["rollout_batch"] for row in rows) == list(range(12))
    assert all(0 <= row["staleness"] <= 3 for row in rows)
    assert all(row["rollout_version"] == row["step"] - row["staleness"] for row in rows)
    resumed = replace(recipe, num_steps=14, lr_schedule_steps=12, resume_from_checkpoint="latest")
    train(resumed)
    assert sorted(row["rollout_batch"] for row in metrics_of(tmp_path)) == list(range(14))
    assert not of_ray()


TWO_LEARNERS = """
import sys
from tiny_recipe import tiny_recipe
from dllm_rl.training.trainer import train
train(tiny_recipe(sys.argv[1], rollout_workers=2, max_staleness=3, rollout_schedule="first_ready", num_steps=8,
                  shard_size=int(sys.argv[2]), report_to=None, log_completions_steps=0))
"""


@pytest.mark.nightly
@pytest.mark.parametrize("shard_size", [1, 0])
def test_two_learners_train_on_the_same_batch(shard_size, tmp_path):
    pytest.importorskip("ray", reason="Ray is an optional extra")
    run_ranks(TWO_LEARNERS, 2, tmp_path, shard_size)
    rows = metrics_of(tmp_path)
    assert sorted(row["rollout_batch"] for row in rows) == list(range(8))
    assert all(row["staleness"] <= 3 and row["rollout_version"] == row["step"] - row["staleness"] for row in rows)


@pytest.mark.parametrize("text", ["[]", "{", '{"unfinished": [1.5], "next": 3}', '{"unfinished": [1]}'])
def test_a_damaged_order_is_named(tmp_path, text):
    (tmp_path / "rollouts").mkdir()
    (tmp_path / ORDER_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"order\.json is damaged"):
        read_order(tmp_path, 3)
