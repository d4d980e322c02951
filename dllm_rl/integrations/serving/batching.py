"""Run all jobs on one thread, which owns the policy, and batch completions with equal settings and similar prompts.

The oldest job always runs next. A job that arrives while a batch runs can only join a later batch (`benchmarks.waiting`
measures the wait): samplers take all rows of a batch through the same block and step.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dllm_rl.models.base import Policy
from dllm_rl.models.forward.batch_invariance import batch_invariant
from dllm_rl.rng import generator_for
from dllm_rl.samplers import Sampler
from dllm_rl.samplers.unmask import check_number_of_steps
from dllm_rl.types.rollouts import Prompts, Rollout

MAX_LENGTH_DIFFERENCE = 32  # tokens between the prompts of a batch, unless the longest is at most twice the shortest


class Refused(Exception):
    """Raised if a request gets an error response, in OpenAI's format.

    Args:
        status: HTTP status.
        message: One line with the field, its value and a remedy.
        param: Field of the request that is at fault. None: no single field.
    """

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


class Abandoned(Exception):
    """Raised in the sampler's thread at the next forward, if nobody waits for the running jobs any more."""


def shutting_down() -> Refused:
    """Return the error of requests that had not started when the server stopped."""
    return Refused(503, "the server is stopping; ask another one")


@dataclass(eq=False)
class CompletionJob:
    """A job: one completion of one prompt.

    Args:
        ids: Token ids of the prompt.
        seed: Seed of the completion, a 63-bit integer.
        sampler: Sampler of the completion. Only jobs with equal samplers share a batch.
        suffix: Token ids of the text after the completion. If there are any, the model fills in the `max_new_tokens`
            positions between prompt and suffix. Default: none.
        future: Receives a rollout of one row, on the CPU.
        is_abandoned: Whether nobody waits for the result any more.
    """

    ids: Sequence[int]
    seed: int
    sampler: Sampler
    suffix: Sequence[int] = ()
    future: "Future[Rollout]" = field(default_factory=Future)
    is_abandoned: bool = False

    @property
    def length(self) -> int:
        """Number of tokens of the prompt and the suffix."""
        return len(self.ids) + len(self.suffix)


@dataclass(eq=False)
class PolicyCall:
    """A job: call a function with the policy as its argument. It is never batched with other jobs.

    Args:
        function: Function to call.
        future: Receives the result.
        is_abandoned: Whether nobody waits for the result any more.
    """

    function: Callable[[Policy], Any]
    future: "Future[Any]" = field(default_factory=Future)
    is_abandoned: bool = False


Job = CompletionJob | PolicyCall


class Batcher:
    """The queue of waiting jobs, and the thread that runs them.

    Args:
        policy: Policy that samples. No other thread may use its module.
        defaults: Sampler whose settings apply where a request sets none.
        max_batch_size: Largest number of completions in a batch.
        max_waiting: Largest number of waiting jobs.
        exact_batches: Whether a completion is bitwise identical in every batch. This is slower: it uses
            `batch_invariant`, and batches only prompts of equal length, because padding changes rounding.
    """

    def __init__(
        self,
        policy: Policy,
        defaults: Sampler,
        *,
        max_batch_size: int = 32,
        max_waiting: int = 256,
        exact_batches: bool = False,
    ) -> None:
        self.policy = policy
        self.defaults = defaults
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        self.exact_batches = exact_batches
        self._waiting: deque[Job] = deque()
        self._condition = threading.Condition()  # notified when `_waiting` or `_is_closed` changes
        self._is_closed = False
        self._thread = threading.Thread(target=self._run_until_closed, name="sampler")
        self._thread.start()

    def submit(self, jobs: Sequence[Job], *, first: bool = False) -> None:
        """Add jobs to the queue: at the end, or with `first` at the front and without the limit on waiting jobs.

        Raises:
            Refused: More than `max_waiting` jobs would wait, or the server is stopping. None of `jobs` is added then.
        """
        with self._condition:
            if self._is_closed:
                raise shutting_down()
            if not first and len(self._waiting) + len(jobs) > self.max_waiting:
                advice = "ask again later, or raise --max_waiting"
                raise Refused(429, f"the queue of {self.max_waiting} completions is full; {advice}")
            if first:
                self._waiting.extendleft(reversed(jobs))
            else:
                self._waiting.extend(jobs)
            self._condition.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Remove those jobs that have not started. A running batch of only such jobs ends at its next forward."""
        with self._condition:
            for job in jobs:
                job.is_abandoned = True
                job.future.cancel()
            self._waiting = deque(job for job in self._waiting if not job.future.cancelled())

    def close(self, *, wait: bool = True) -> None:
        """Refuse the waiting jobs. With `wait`, return only when the running batch has finished."""
        with self._condition:
            self._is_closed = True
            refused, self._waiting = self._waiting, deque()
            self._condition.notify()
        for job in refused:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(shutting_down())
        if wait:
            self._thread.join()

    def _run_until_closed(self) -> None:
        while self._run_next():  # no local variables here: while the thread waits, they would keep the last batch alive
            pass

    def _run_next(self) -> bool:
        """Wait for the next batch and run it. Return False if the queue was closed."""
        batch = self._next_batch()
        jobs: list[Any] = [job for job in batch if job.future.set_running_or_notify_cancel()]
        if jobs:
            self._run(jobs)
        return bool(batch)

    def _run(self, jobs: list[Any]) -> None:
        """Run a batch and give each job its result or the error."""
        is_call = isinstance(jobs[0], PolicyCall)
        try:
            with _ended_if_abandoned(self.policy, jobs), batch_invariant() if self.exact_batches else nullcontext():
                results = [jobs[0].function(self.policy)] if is_call else sample_rows(self.policy, jobs)
        # Broad on purpose: samplers run code of users (rules, modules, tokenizers), which may raise anything. An error
        # that escaped would end the only sampling thread, and every later request would time out.
        except Exception as error:
            if isinstance(error, ValueError) and len(jobs) > 1:  # of one job's prompt, it may be
                for job in jobs:
                    self._run([job])
                return
            for job in jobs:
                job.future.set_exception(error)
        else:
            for job, result in zip(jobs, results, strict=True):
                job.future.set_result(result)

    def _next_batch(self) -> list[Job]:
        """Wait for the next batch and remove it from the queue. Return an empty list if the queue was closed."""
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._is_closed)
            if not self._waiting:
                return []
            oldest = self._waiting[0]
            if isinstance(oldest, PolicyCall):
                return [self._waiting.popleft()]
            batch = self._compatible_jobs(oldest)
            batch_ids = set(map(id, batch))
            self._waiting = deque(job for job in self._waiting if id(job) not in batch_ids)
            return batch

    def _compatible_jobs(self, oldest: CompletionJob) -> list[Job]:
        """Return the oldest job and the waiting jobs that can share a batch with it, oldest first."""
        batch: list[Job] = []
        shortest = longest = oldest.length
        for job in self._waiting:
            if isinstance(job, PolicyCall) or job.sampler != oldest.sampler or bool(job.suffix) != bool(oldest.suffix):
                continue
            new_shortest, new_longest = min(shortest, job.length), max(longest, job.length)
            is_similar = new_longest - new_shortest <= MAX_LENGTH_DIFFERENCE or new_longest <= 2 * new_shortest
            if new_shortest == new_longest if self.exact_batches else is_similar:
                batch.append(job)
                shortest, longest = new_shortest, new_longest
            if len(batch) == self.max_batch_size:
                break
        return batch


@contextmanager
def _ended_if_abandoned(policy: Policy, jobs: Sequence[Job]) -> Iterator[None]:
    """Raise Abandoned at the next forward of the policy in the block, once all jobs are abandoned."""

    def check(*_: Any) -> None:
        if all(job.is_abandoned for job in jobs):
            raise Abandoned

    # A policy calls its module, or the body and the head of it.
    handles = [part.register_forward_pre_hook(check) for part in (policy.module, *policy.module.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sample_rows(policy: Policy, completions: Sequence[CompletionJob]) -> list[Rollout]:
    """Sample completions of equal samplers as one batch. Return one single-row rollout per completion, on the CPU.

    Either all of them have a suffix, or none has.
    """
    sampler = completions[0].sampler
    seeds = [job.seed for job in completions]
    if completions[0].suffix:
        length, mask_id = sampler.max_new_tokens, policy.spec.mask_id
        # `Unmask` does not check the steps of prompts with positions to fill in, whose number differs by row.
        check_number_of_steps(sampler)
        assert mask_id is not None, "suffixes are for models with a mask token"
        ids = [[*job.ids, *[mask_id] * length, *job.suffix] for job in completions]
        blanks = [[False] * len(job.ids) + [True] * length + [False] * len(job.suffix) for job in completions]
        prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, seeds=seeds, open_positions=blanks)
        # A cache or an early exit would need one contiguous completion at the end of the row (`check_infilling`).
        sampler = sampler.replace(max_new_tokens=0, cache=None, approximate_early_exit=False)
    else:
        prompts = Prompts.from_ids([job.ids for job in completions], pad_id=policy.pad_id, seeds=seeds)
    # Every row has its own seed, so the sampler does not use the generator.
    rollout = sampler(policy, replace(prompts, reads_order=False), generator_for("unused")).to("cpu")
    return [rollout.rows(torch.tensor([row])) for row in range(len(completions))]
