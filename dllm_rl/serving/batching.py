"""Run all jobs on one thread, which owns the policy. Completions with equal settings and similar prompts run together.

The oldest job always runs next. A job that arrives while a batch runs joins the next batch that it fits.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from dllm_rl.diagnostics.batch_invariance import batch_invariant
from dllm_rl.models.base import Policy
from dllm_rl.rng import generator_for
from dllm_rl.samplers import sampler_for
from dllm_rl.serving.settings import read_settings
from dllm_rl.types import Prompts, Rollout

SCORED_POSITIONS = 256  # of a prompt, whose logits are in memory together
MAX_LENGTH_DIFFERENCE = 32  # tokens; longer prompts may also differ by a factor of two


class QueueFull(Exception):
    """Raised when more jobs would wait than the server allows."""


class ShuttingDown(Exception):
    """The error of jobs that had not begun when the server stopped."""


@dataclass(eq=False)
class Completion:
    """A job: one completion of one prompt.

    Args:
        ids: Token ids of the prompt.
        seed: Seed of the completion, of 63 bits.
        settings: Pairs of name and value of the sampler's settings (`read_settings`), in a fixed order. They replace
            the server's defaults.
        future: Receives a rollout of one row, on the host.
    """

    ids: Sequence[int]
    seed: int
    settings: tuple[tuple[str, Any], ...]
    future: "Future[Rollout]" = field(default_factory=Future)


@dataclass(eq=False)
class Call:
    """A call of a function of the policy, in no batch.

    Args:
        function: Function to call.
        future: Receives the result.
    """

    function: Callable[[Policy], Any]
    future: "Future[Any]" = field(default_factory=Future)


@dataclass(frozen=True)
class PromptScores:
    """The log-probs of a prompt's tokens under a causal model, in nats.

    Args:
        logprobs: Log-prob of each token; None for the first, which nothing predicts.
        best: Id and log-prob of the likeliest token at each position; None for the first.
    """

    logprobs: list[float | None]
    best: list[tuple[int, float] | None]


Job = Completion | Call


class Batcher:
    """The waiting jobs, and the thread that runs them.

    Args:
        policy: Policy that samples. No other thread may use its module.
        defaults: Keywords of the policy's sampler that a completion's settings do not replace.
        max_batch_size: Largest number of completions in a batch.
        max_waiting: Largest number of waiting jobs.
        exact_batches: Whether a completion's bits are the same in every batch, which is slower: `batch_invariant`, and
            only prompts of one length in a batch, because padding changes how sums round.
    """

    def __init__(
        self,
        policy: Policy,
        defaults: Mapping[str, Any],
        *,
        max_batch_size: int = 32,
        max_waiting: int = 256,
        exact_batches: bool = False,
    ) -> None:
        self.policy = policy
        self.defaults = dict(defaults)
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        self.exact_batches = exact_batches
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="sampler")
        self._thread.start()

    def submit(self, jobs: Sequence[Job], *, first: bool = False) -> None:
        """Let jobs wait for their turn, with `first` before all others.

        Raises:
            QueueFull: More than `max_waiting` jobs would wait. None of `jobs` waits then.
            ShuttingDown: The server stops.
        """
        with self._changed:
            if self._is_closed:
                raise ShuttingDown
            if not first and len(self._waiting) + len(jobs) > self.max_waiting:
                raise QueueFull
            if first:
                self._waiting.extendleft(reversed(jobs))
            else:
                self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Drop those jobs that have not begun. A batch that runs goes on."""
        with self._changed:
            for job in jobs:
                job.future.cancel()
            self._waiting = deque(job for job in self._waiting if not job.future.cancelled())

    def close(self, *, wait: bool = True) -> None:
        """Refuse the waiting jobs with ShuttingDown, and with `wait` let the running batch end."""
        with self._changed:
            self._is_closed = True
            refused, self._waiting = self._waiting, deque()
            self._changed.notify()
        for job in refused:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(ShuttingDown())
        if wait:
            self._thread.join()

    def _work(self) -> None:
        while self._run_next():  # no variable here: a thread that waits must not hold the last batch
            pass

    def _run_next(self) -> bool:
        """Wait for the next batch and run it. Return False at the end."""
        batch = self._take()
        jobs = [job for job in batch if job.future.set_running_or_notify_cancel()]
        if jobs:
            try:
                with batch_invariant() if self.exact_batches else nullcontext():
                    results = self._run(jobs)
            except Exception as error:  # any error, from a sampler or torch: it ends these jobs, and not the thread
                for job in jobs:
                    job.future.set_exception(error)
            else:
                for job, result in zip(jobs, results, strict=True):
                    job.future.set_result(result)
        return bool(batch)

    def _take(self) -> list[Job]:
        """Wait for the next batch. An empty list means the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if not self._waiting:
                return []
            oldest = self._waiting[0]
            if isinstance(oldest, Call):
                return [self._waiting.popleft()]
            batch = self._fitting(oldest)
            taken = set(map(id, batch))
            self._waiting = deque(job for job in self._waiting if id(job) not in taken)
            return batch

    def _fitting(self, oldest: Completion) -> list[Job]:
        """Return the oldest job, and the waiting jobs that can run with it, in the order of their arrival."""
        batch: list[Job] = []
        shortest = longest = len(oldest.ids)
        for job in self._waiting:
            if isinstance(job, Call) or job.settings != oldest.settings:
                continue
            least, most = min(shortest, len(job.ids)), max(longest, len(job.ids))
            is_similar = most - least <= MAX_LENGTH_DIFFERENCE or most <= 2 * least
            if least == most if self.exact_batches else is_similar:
                batch.append(job)
                shortest, longest = least, most
            if len(batch) == self.max_batch_size:
                break
        return batch

    def _run(self, jobs: Sequence[Job]) -> list[Any]:
        if isinstance(jobs[0], Call):
            return [jobs[0].function(self.policy)]
        completions = [job for job in jobs if isinstance(job, Completion)]
        keywords = self.defaults | read_settings(self.policy, dict(completions[0].settings))
        return sample_rows(self.policy, keywords, completions)


def sample_rows(policy: Policy, keywords: Mapping[str, Any], completions: Sequence[Completion]) -> list[Rollout]:
    """Sample completions as one batch; return a rollout of one row for each, on the host.

    Args:
        policy: Policy that samples.
        keywords: Keywords of its sampler.
        completions: Prompts and seeds.
    """
    seeds = [job.seed for job in completions]
    prompts = Prompts.from_ids([job.ids for job in completions], pad_id=policy.pad_id, seeds=seeds)
    # Every row has a seed, so that the sampler draws nothing from the generator.
    rollout = sampler_for(policy)(policy, prompts, generator_for("unused"), **keywords).to("cpu")
    return [rollout.rows(torch.tensor([row])) for row in range(len(completions))]


@torch.no_grad()
def score_prompt(policy: Policy, ids: Sequence[int]) -> PromptScores:
    """Compute the log-probs of a prompt's tokens under a causal model, at temperature 1 and without filters."""
    tokens = torch.tensor([ids], device=policy.device)
    hidden = policy.hidden(tokens, torch.ones_like(tokens, dtype=torch.bool))
    logprobs: list[float | None] = [None]
    best: list[tuple[int, float] | None] = [None]
    for start in range(1, len(ids), SCORED_POSITIONS):  # in chunks, since the logits of a long prompt may not fit
        chunk = slice(start, start + SCORED_POSITIONS)
        scores = policy.head(hidden[:, chunk])[0].float().log_softmax(-1)
        logprobs += scores.gather(-1, tokens[0, chunk, None])[:, 0].tolist()
        values, likeliest = scores.max(-1)
        best += zip(likeliest.tolist(), values.tolist(), strict=True)
    return PromptScores(logprobs, best)
