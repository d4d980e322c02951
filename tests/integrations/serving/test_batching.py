"""The queue: who runs with whom and when, and that everyone gets what is theirs."""

import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace

import pytest
import torch
from refusals import refuses
from servers import causal, diffusion, held

from dllm_rl.decoding.texts import completion_token_ids
from dllm_rl.integrations.serving.batching import (
    Abandoned,
    Batcher,
    CompletionJob,
    PolicyCall,
    Refused,
    sample_rows,
)
from dllm_rl.samplers import Autoregress, Unmask, sampler_for
from dllm_rl.samplers.sampler import FunctionSampler
from dllm_rl.samplers.with_settings import with_settings

SAMPLERS = {kind: kind(max_new_tokens=4, temperature=1.0) for kind in (Unmask, Autoregress)}
SAMPLER = SAMPLERS[Unmask]


@pytest.fixture
def batches(monkeypatch):
    """The prompts of each batch, in the order in which they ran."""
    seen = []

    def spy(policy, completions):
        seen.append([list(job.ids) for job in completions])
        return sample_rows(policy, completions)

    monkeypatch.setattr("dllm_rl.integrations.serving.batching.sample_rows", spy)
    return seen


@pytest.fixture
def make():
    made = []

    def make(policy=None, **options):
        made.append(Batcher(policy or diffusion(), SAMPLER, **options))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close()


def job(length, sampler=SAMPLER, seed=0, suffix=()):
    return CompletionJob([3] * length, seed, sampler, suffix)


def run(batcher, jobs):
    with held(batcher):
        for each in jobs:
            batcher.submit([each])
    return [each.future.result(60) for each in jobs]


def test_similar_prompts_of_equal_settings_run_together(make, batches):
    other = SAMPLER.replace(temperature=0.5)
    jobs = [job(2), job(40), job(3), job(3, other), job(30)]
    run(make(), jobs)
    lengths = [[len(ids) for ids in batch] for batch in batches]
    # 40 is more than twice 2 and more than 32 tokens longer; 30 is less than 32 longer.
    assert lengths == [[2, 3, 30], [40], [3]]


def test_long_prompts_may_differ_by_a_factor_of_two(make, batches):
    policy = causal()
    policy.spec = policy.spec.__class__(**{**vars(policy.spec), "max_length": None})
    run(make(policy), [job(length, SAMPLERS[Autoregress]) for length in (50, 100, 101, 49)])
    assert [[len(ids) for ids in batch] for batch in batches] == [[50, 100], [101], [49]]


def test_a_batch_has_at_most_its_size_and_the_oldest_run_first(make, batches):
    jobs = [CompletionJob([3 + i], i, SAMPLER) for i in range(7)]
    run(make(max_batch_size=3), jobs)
    assert batches == [[[3], [4], [5]], [[6], [7], [8]], [[9]]]


@pytest.mark.parametrize("policy", [diffusion(), causal()], ids=["full", "causal"])
@pytest.mark.repeated(first_only=True)
def test_everyone_gets_the_completion_that_is_theirs(make, policy):
    """Under exact batches bit for bit the one of a batch of one; else to rounding, for each seed and prompt its own."""
    sampler = SAMPLERS[sampler_for(policy)]
    for exact in (True, False):
        alone, together = (make(policy, exact_batches=exact, max_batch_size=size) for size in (1, 16))
        jobs = [[CompletionJob([3 + i] * (1 + i % 3), i, sampler) for i in range(6)] for _ in range(2)]
        for one, other in zip(run(alone, jobs[0]), run(together, jobs[1]), strict=True):
            assert completion_token_ids(one) == completion_token_ids(other)
            logprobs = [each.logprobs[each.completion_mask] for each in (one, other)]
            torch.testing.assert_close(*logprobs, **({"rtol": 0, "atol": 0} if exact else {}))
            assert one.tokens[one.attention_mask].tolist() == other.tokens[other.attention_mask].tolist()
        assert len({tuple(completion_token_ids(each.future.result())[0]) for each in jobs[0]}) > 3


def test_exact_batches_hold_prompts_of_one_length(make, batches):
    run(make(exact_batches=True), [job(2), job(3), job(2)])
    assert [[len(ids) for ids in batch] for batch in batches] == [[2, 2], [3]]


def test_completions_with_a_suffix_run_together_and_are_those_that_run_alone(make, batches):
    """Suffixes of several lengths in one batch, and completions without a suffix in another."""
    suffixes = [(5, 6), (), (7,), (4, 4, 4), ()]
    batched, alone = ([job(2, seed=i, suffix=suffix) for i, suffix in enumerate(suffixes)] for _ in range(2))
    together = run(make(), batched)
    assert [[len(ids) for ids in batch] for batch in batches] == [[2, 2, 2], [2, 2]]
    for one, other, suffix in zip(together, run(make(max_batch_size=1), alone), suffixes, strict=True):
        assert completion_token_ids(one) == completion_token_ids(other) and len(completion_token_ids(one)[0]) == 4
        row = one.tokens[0][one.attention_mask[0]].tolist()
        assert row[:2] == [3, 3] and tuple(row[6:]) == suffix


def test_a_call_runs_alone_and_first_if_asked(make):
    batcher, order = make(), []
    calls = [PolicyCall(lambda policy, i=i: order.append(i)) for i in range(3)]
    with held(batcher):
        batcher.submit([calls[0]])
        batcher.submit([calls[1]])
        batcher.submit([calls[2]], first=True)
    for call in calls:
        call.future.result(60)
    assert order == [2, 0, 1]


def test_several_calls_that_go_first_keep_their_order(make):
    """Of one request, as they were given; a later request that goes first too stands before them."""
    batcher, order = make(), []
    calls = [PolicyCall(lambda policy, i=i: order.append(i)) for i in range(6)]
    with held(batcher):
        batcher.submit(calls[:2])
        batcher.submit(calls[2:5], first=True)
        batcher.submit(calls[5:], first=True)
    for call in calls:
        call.future.result(60)
    assert order == [5, 2, 3, 4, 0, 1]


def test_a_full_queue_takes_nothing_of_a_request(make):
    batcher = make(max_waiting=3)
    with held(batcher):
        batcher.submit([job(1), job(1)])
        refused = [job(1), job(1)]
        refuses("the queue of 3 completions is full", lambda: batcher.submit(refused), Refused)
        fits = job(1)
        batcher.submit([fits])
        batcher.submit([PolicyCall(lambda policy: None)], first=True)  # a learner's update is never refused
    fits.future.result(60)
    assert not any(each.future.done() for each in refused)


def test_cancelled_jobs_leave_their_places(make, batches):
    batcher = make(max_waiting=2)
    with held(batcher):
        left = [job(1), job(1)]
        batcher.submit(left)
        batcher.cancel(left)
        stays = job(2)
        batcher.submit([stays])
    stays.future.result(60)
    assert batches == [[[3, 3]]]
    with pytest.raises(CancelledError):
        left[0].future.result(0)


def test_an_error_ends_its_batch_and_not_the_thread(make):
    batcher = make()
    bad = job(1, SAMPLER.replace(diffusion_steps=9))
    worse = PolicyCall(lambda policy: 1 / 0)
    good = job(1)
    with held(batcher):
        batcher.submit([bad, worse, good])
    refuses("diffusion_steps=9", lambda: bad.future.result(60))
    with pytest.raises(ZeroDivisionError):
        worse.future.result(60)
    assert good.future.result(60).tokens.shape == (1, 5)


def test_closing_refuses_those_that_wait_and_finishes_the_batch_that_runs():
    batcher = Batcher(diffusion(), SAMPLER)
    begun, release, waits = threading.Event(), threading.Event(), job(1)
    running = PolicyCall(lambda policy: (begun.set(), release.wait(60)))
    batcher.submit([running])
    begun.wait(60)
    batcher.submit([waits])
    batcher.close(wait=False)
    refuses("the server is stopping", lambda: waits.future.result(60), Refused)
    refuses("the server is stopping", lambda: batcher.submit([job(1)]), Refused)
    release.set()
    batcher.close()
    assert running.future.done() and not batcher._thread.is_alive()


def test_an_idle_thread_holds_no_batch(make):
    import gc
    import weakref

    batcher = make()
    done = job(4)
    batcher.submit([done])
    rollout = weakref.ref(done.future.result(60).tokens)
    del done
    deadline = time.monotonic() + 10
    while rollout() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert rollout() is None


def test_a_completion_that_is_refused_takes_no_other_with_it(make, batches):
    """As prompts that are too long, or have tokens that a model cannot read."""

    def sample_without_5(policy, prompts, generator):
        if (prompts.tokens == 5).any():
            raise ValueError("token 5")
        return SAMPLER(policy, prompts, generator)

    picky = FunctionSampler(function=sample_without_5, max_new_tokens=4)
    jobs = [CompletionJob([3] * 2, 0, picky), CompletionJob([5] * 2, 1, picky), CompletionJob([4] * 2, 2, picky)]
    batcher = make()
    with held(batcher):
        for each in jobs:
            batcher.submit([each])
    refuses("token 5", lambda: jobs[1].future.result(60))
    assert completion_token_ids(jobs[0].future.result(60)) and completion_token_ids(jobs[2].future.result(60))
    assert [len(batch) for batch in batches] == [3, 1, 1, 1]


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("length", range(1, 13))
def test_scaled_steps_are_enough_wherever_a_completion_begins_in_a_block(length):
    policy = diffusion()
    policy.spec = replace(policy.spec, attention="block_causal", block_size=4)
    sampler = with_settings(policy, {"max_new_tokens": length}, Unmask(max_new_tokens=16, diffusion_steps=4))
    for begins in range(4):
        blocks = -(-(length + begins) // 4)
        assert blocks <= sampler.diffusion_steps <= length or length < blocks


class Slow:
    """A policy whose first forward waits until it is released, and which counts its forwards."""

    def __init__(self, policy):
        self.policy, self.count = policy, 0
        self.begun, self.release = threading.Event(), threading.Event()
        next(policy.module.children()).register_forward_pre_hook(self.wait)

    def wait(self, *_):
        self.count += 1
        self.begun.set()
        self.release.wait(60)


@pytest.mark.parametrize("policy", [diffusion, causal], ids=["Unmask", "Autoregress"])
@pytest.mark.parametrize("kept", [0, 1])
def test_a_running_batch_ends_at_its_next_forward_when_all_its_jobs_are_abandoned(make, policy, kept):
    slow = Slow(policy())
    batcher = make(slow.policy)
    jobs = [job(2, SAMPLERS[sampler_for(slow.policy)], seed) for seed in (1, 2)]
    batcher.submit(jobs)
    slow.begun.wait(60)
    batcher.cancel(jobs[kept:])
    slow.release.set()
    if kept:
        assert len(jobs[0].future.result(60).tokens) == 1 and slow.count > 2
    else:
        assert all(isinstance(each.future.exception(60), Abandoned) for each in jobs) and slow.count <= 2
    (done,) = run(batcher, [job(2, SAMPLERS[sampler_for(slow.policy)], 1)])  # the next batch is not disturbed
    assert done.tokens.shape[1] > 2


def test_a_call_that_is_abandoned_ends_at_its_next_forward(make):
    slow = Slow(diffusion())
    batcher = make(slow.policy)
    call = PolicyCall(lambda policy: sample_rows(policy, [job(2)]))
    batcher.submit([call])
    slow.begun.wait(60)
    batcher.cancel([call])
    slow.release.set()
    assert isinstance(call.future.exception(60), Abandoned) and slow.count <= 2
