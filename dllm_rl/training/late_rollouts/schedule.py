"""Schedules of asynchronous rollouts: which weights make which batch, which step trains on it, and the interface of
worker pools.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator

from dllm_rl.algorithms.mismatch import PREFIX, mismatch_metrics
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.distributed.collectives import collective, from_main
from dllm_rl.distributed.sharding import sharding_of
from dllm_rl.models.base import Policy
from dllm_rl.models.merge import host_copy
from dllm_rl.recipe import Recipe
from dllm_rl.step.collect import collect
from dllm_rl.step.context import StepContext
from dllm_rl.step.samples import Samples, StepResult, rows_of_processes
from dllm_rl.step.score import draw_view_sets, metric_weights
from dllm_rl.training.late_rollouts.messages import (
    Collected,
    deserialize,
    deserialize_batch,
    serialize_batch,
    trained_weights,
)
from dllm_rl.training.make_step import make_step
from dllm_rl.training.policies import RolloutCopy
from dllm_rl.training.sharded_learner import gather_on_main
from dllm_rl.types.groups import group_numbers, group_sizes

RAY_WORKERS = "dllm_rl.integrations.ray_pool:ray_workers"  # the function that starts a run's default pool


class RolloutProducer:
    """Makes batches with copies of the learner and of the rollout policy, in a worker's process or in the learner's."""

    def __init__(self, recipe: Recipe, policy: Policy, accelerator: Accelerator) -> None:
        self.recipe = recipe
        self.policy = policy.to(accelerator.device)
        self.accelerator = accelerator
        self.context: StepContext | None = None

    def make(self, step: int, weights: bytes) -> bytes:
        """Make the batch of a step with these weights, which alone determine its bits. Raises what `collect` raises."""
        start_time = time.perf_counter()
        context = self.load(weights)
        samples, answers, metrics = collect(context, step)
        if self.recipe.max_staleness:  # without staleness the learner has these weights
            samples = add_rollout_logprobs(context, samples, step)
        return serialize_batch((samples, answers, metrics), time.perf_counter() - start_time)

    @torch.no_grad()
    def load(self, weights: bytes) -> StepContext:
        """Load serialized weights into the learner's copy, and sync the rollout policy."""
        tensors, header = deserialize(weights)
        parameters = dict(self.policy.module.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
        policy = self.policy
        policy.weights_version = header["version"]
        engine = self.recipe.rollout_engine or RolloutCopy(recipe=self.recipe)
        if self.context is None:
            rollout_policy = engine.load(policy)
            rollout_policy.weights_version = policy.weights_version
            self.context = make_step(
                self.recipe, accelerator=self.accelerator, policy=policy, rollout_policy=rollout_policy
            )
        else:
            engine.sync(policy, self.context.rollout_policy)
        return self.context


def add_rollout_logprobs(context: StepContext, samples: Samples, step: int) -> Samples:
    """Add the log-probs under the weights that sampled; when the learner scores the batch, it no longer has these
    weights.

    An estimator that replays the sampler needs none: the rollout has the sampler's record. The masks are those that the
    learner will draw, since they depend only on the step, the rollout and its advantages.
    """
    settings, likelihood = context.settings, context.settings.likelihood
    if likelihood.exact_for_sampler:
        return samples
    weighted_samples = replace(samples, metric_weights=metric_weights(settings, samples, step))
    compute_logprobs = partial(likelihood.logprobs, context.rollout_policy, samples.rollout)
    with context.arithmetic():
        view_sets = draw_view_sets(settings, weighted_samples, step, context.accelerator)
        rollout_logprobs = tuple(
            compute_logprobs(views, micro_batch_size=settings.micro_batch_size)
            for views in view_sets[: settings.num_scored_mask_sets]
        )
    return replace(weighted_samples, rollout_logprobs=rollout_logprobs)


def is_of_recipe(samples: Samples, recipe: Recipe, folder: Path) -> bool:
    """Return whether a batch of a checkpoint has as many prompts as this recipe's steps, and the log-probs that they
    read: a resume may have changed a setting.
    """
    num_sets = 0 if recipe.likelihood.exact_for_sampler else recipe.num_scored_mask_sets
    before, now = TrainingState.read(folder).recipe, recipe.settings()
    # Log-probs of masks are of one likelihood, and the seed draws the masks.
    has_changed = num_sets > 0 and any(before[name] != now[name] for name in ("likelihood", "seed"))
    fits = len(group_sizes(samples.group)) == recipe.train_batch_size and len(samples.rollout_logprobs) == num_sets
    return fits and not has_changed


@runtime_checkable
class WorkerPool(Protocol):
    """Interface of the workers that make the batches of `late`.

    Implement it for workers other than Ray's and pass it to `train(recipe, pool=...)`. Each job has the number of its
    batch, which is the step that trains on it.
    """

    def set_up(self, recipe: Recipe, context: StepContext) -> None:
        """Receive the recipe and the policies. Called once, before the first job."""

    def submit(self, step: int, weights: bytes) -> None:
        """Start to make the batch of a step with these serialized weights. Do not wait."""

    def ready(self, step: int) -> bytes | None:
        """Return the batch of a step, or None if it is not finished or not submitted. Do not wait and do not raise."""

    def forget(self, step: int) -> None:
        """Delete the batch of a step, which the learner has trained on. It had no job if a checkpoint had stored it."""

    def wait(self) -> None:
        """Wait until a job is finished, at most about a second. Do not raise."""

    def mend(self, steps: Iterable[int]) -> None:
        """Repeat those of these jobs whose workers are lost. Raise the error of a failed job, or RuntimeError if no
        worker makes it.
        """


class InProcessPool:
    """Pool that makes each batch in this process when it is requested.

    Use it in tests, and to study staleness on one processor without Ray. Its batches have the same bits as those of Ray
    workers.
    """

    def set_up(self, recipe: Recipe, context: StepContext) -> None:
        if context.accelerator.num_processes > 1:
            raise ValueError("InProcessPool samples in the only learner process, and several were launched: launch one")
        self.sampler = RolloutProducer(recipe, host_copy(context.policy), context.accelerator)
        self.jobs: dict[int, bytes] = {}  # the weights of each job
        self.made: dict[int, bytes] = {}

    def submit(self, step: int, weights: bytes) -> None:
        self.jobs[step] = weights

    def ready(self, step: int) -> bytes | None:
        return self.made.get(step)

    def make(self, step: int) -> None:
        """Make the batch of a job now."""
        self.made[step] = self.sampler.make(step, self.jobs[step])

    def forget(self, step: int) -> None:
        for of_step in (self.jobs, self.made):
            of_step.pop(step, None)

    def wait(self) -> None:
        self.make(min(self.jobs.keys() - self.made.keys()))

    def mend(self, steps: Iterable[int]) -> None:
        """No worker is lost here."""


@dataclass(eq=False)
class PendingBatch:
    """A batch that the learner has not trained on yet."""

    weights: bytes  # serialized
    age: int  # number of steps that the weights were trained for
    made: bytes | None = None  # the serialized batch, if it was read from a checkpoint


@dataclass(eq=False)
class AsyncRollouts:
    """Schedule of a run: submits the batch of each step to the pool, with the weights that it must be made with.

    Several learner processes share the batches: the main process has the pool, and every process trains on its groups.
    """

    recipe: Recipe
    context: StepContext
    pool: WorkerPool | None  # None in the other processes
    pending: dict[int, PendingBatch] = field(default_factory=dict)

    @property
    def rank(self) -> Callable | None:
        """The rank of the recipe's sampler, which a batch's order refers to."""
        return getattr(self.recipe.sampler, "rank", None)

    def begin(self, steps_done: int, folder: Path | None) -> None:
        """Plan the batches of the next K + 1 steps (K = max_staleness) at the start of a run, or after a resume.

        A batch that the checkpoint in `folder` contains is not made again; one whose weights it contains is made with
        those weights, as in the uninterrupted run. The newest batch is made with the current weights.
        """
        run = self.context
        policy = gather_on_main(run.policy, run.accelerator)  # a collective for a sharded learner
        weights = trained_weights(policy) if run.accelerator.is_main_process else b""
        if policy is not run.policy:
            run = replace(run, policy=policy, rollout_policy=policy)
        from_main(partial(self._begin, steps_done, folder, run, weights), run.accelerator)

    def _begin(self, steps_done: int, folder: Path | None, context: StepContext, weights: bytes) -> None:
        """Begin in the main process; `context` has the full policy, and `weights` are its trained ones, serialized."""
        assert self.pool is not None, "only the main process has the pool"
        self.pool.set_up(self.recipe, context)
        for step in range(steps_done, steps_done + self.recipe.max_staleness + 1):
            batch, older_weights = (read_pending_file(folder, name) for name in file_names(step))
            # A setting that was changed at this resume may ask for newer weights, or for other log-probs.
            oldest = context.policy.weights_version + step - steps_done - self.recipe.max_staleness
            if batch is not None and folder is not None and not self.fits(batch, oldest, folder):
                batch = None
            if older_weights is not None and deserialize(older_weights)[1]["version"] < oldest:
                older_weights = None
            if batch is not None:
                self.pending[step] = PendingBatch(b"", age=-1, made=batch)
            elif older_weights is not None:
                self.plan(step, older_weights, age=-1)
            else:
                self.plan(step, weights, age=steps_done)

    def fits(self, batch: bytes, oldest: int, folder: Path) -> bool:
        """Return whether a checkpoint's batch is of weights of at least the version `oldest`, and `is_of_recipe`."""
        (samples, _, _), _ = deserialize_batch(batch, self.rank, torch.device("cpu"))
        return is_of_recipe(samples, self.recipe, folder) and samples.rollout.weights_version >= oldest

    def plan(self, step: int, weights: bytes, *, age: int) -> None:
        """Submit the batch of a step. Only keep its weights if the run ends before: a resume to more steps makes it."""
        if step < self.recipe.num_steps:
            self.submit(step, weights, age=age)
        else:
            self.pending[step] = PendingBatch(weights, age)

    def submit(self, step: int, weights: bytes, *, age: int) -> None:
        """Submit the batch of a step, to be made with weights that were trained for `age` steps."""
        assert self.pool is not None, "only the main process submits"
        self.pending[step] = PendingBatch(weights, age)
        self.pool.submit(step, weights)

    def collect(self, step: int) -> Collected:
        """Return what `step.collect.collect` returns for this step, from the pool or from the checkpoint."""
        run = self.context
        batch = None
        with run.log.stage("waiting"):
            while batch is None:  # each exchange is shorter than collective_timeout, however often a job is repeated
                batch = from_main(partial(self._next, step), run.accelerator)
        (samples, answers, metrics), seconds = deserialize_batch(batch, self.rank, run.accelerator.device)
        counts = rows_of_processes(torch.tensor(group_sizes(samples.group)), run.accelerator.num_processes)
        samples = replace(samples, counts=counts)
        rows = torch.arange(len(answers)).split(list(counts))[run.accelerator.process_index]
        if len(rows) < len(answers):
            answers = [answers[row] for row in rows.tolist()]
            samples = samples.of_rows(rows)
        metrics["num_tokens"] += run.log.last.get("num_tokens", 0.0)  # a worker counts only the tokens of its batch
        version = samples.rollout.weights_version
        metrics |= {"rollout_version": float(version), "staleness": float(run.policy.weights_version - version)}
        return samples, answers, metrics | {"time/rollout_worker": seconds}

    def _next(self, step: int) -> bytes | None:
        """Return the batch of a step; None if it is not ready soon and other processes wait in an exchange."""
        assert self.pool is not None, "only the main process has the batches"
        others_wait = self.context.accelerator.num_processes > 1
        start_time = time.monotonic()
        while (batch := self._made(step)) is None:
            self.pool.mend([step])
            if others_wait and time.monotonic() - start_time > self.recipe.limits.collective_timeout / 4:
                break
            self.pool.wait()
        return batch

    def _made(self, number: int) -> bytes | None:
        """Return the batch of this number if it is finished, else None."""
        return self.pending[number].made or (self.pool.ready(number) if self.pool else None)

    @collective
    def publish(self, step: int, result: StepResult) -> dict[str, float]:
        """Submit one more batch, with the weights after the update of `step`; return the metrics of `split_mismatch`.

        Call it before the rollout policy is synced: the metrics need the copy of the weights before the update.
        """
        run = self.context
        weights = b""
        if self.pool is not None or sharding_of(run.policy.module) is not None:
            weights = trained_weights(run.policy, keep=self.pool is not None)
        if self.pool is not None:
            if self.pending.pop(step).made is None:
                self.pool.forget(step)
            self.plan(step + 1 + self.recipe.max_staleness, weights, age=step + 1)
        return split_mismatch(run, result) if self.recipe.max_staleness else {}

    def files(self, step: int) -> dict[str, bytes]:
        """Return the files with which a checkpoint after `step` steps stores the pending batches: the batch if it is
        finished, else the weights that it is made with. It does not wait, so that a stopped run can be saved in time.
        """
        files = {}
        for number, pending_batch in list(self.pending.items()):  # a copy: another thread may save
            if pending_batch.age < step:  # a newer batch is made with the checkpoint's weights
                batch_name, weights_name = file_names(number)
                if (batch := self._made(number)) is not None:
                    files[batch_name] = batch
                else:
                    files[weights_name] = pending_batch.weights
        return files


def file_names(step: int) -> tuple[str, str]:
    """Return the names, in a checkpoint, of the file with a step's batch and the file with the weights to make it."""
    return f"rollouts/{step:06d}.safetensors", f"rollouts/{step:06d}.weights.safetensors"


def read_pending_file(folder: Path | None, name: str) -> bytes | None:
    """Read a file of a checkpoint; return None if the file does not exist.

    Raises:
        ValueError: The file is damaged.
    """
    if folder is None or not (folder / name).exists():
        return None
    data = (folder / name).read_bytes()
    try:
        deserialize(data)
    except ValueError as error:
        raise ValueError(f"{folder}: {name} is damaged: {error}; take an earlier checkpoint") from None
    return data


def split_mismatch(context: StepContext, result: StepResult) -> dict[str, float]:
    """Split the mismatch into two parts: quantization (the learner against its quantized copy, at the same weights) and
    staleness (that copy against the older weights that sampled).

    Returns:
        `kl` and `k3_kl` of `mismatch_metrics` for both parts, in nats, over the tokens of one scored group. {} without
        a quantized copy.
    """
    settings, rollout_policy = context.settings, context.rollout_policy
    if context.learner_samples:
        return {}
    rollout, logps = result.samples.rollout, result.logps
    mask = logps.views.scored(rollout.completion_mask)
    number = group_numbers(rollout.group)
    scored = number[mask.any(-1)]
    if not len(scored):
        return {}
    is_measured_row = number == scored[0]
    rows = is_measured_row.nonzero()[:, 0]
    with context.log.stage("scoring"), context.arithmetic():
        views = logps.views.restrict_to_rows(is_measured_row)
        copy_logprobs = settings.likelihood.logprobs(
            rollout_policy, rollout, views, micro_batch_size=settings.micro_batch_size
        )
    mask = mask[rows].cpu()
    metrics: dict[str, float] = {}
    log_ratios = {
        "quantization": logps.old_logprobs - copy_logprobs,
        "staleness": copy_logprobs - logps.rollout_logprobs,
    }
    for source, log_ratio in log_ratios.items():
        log_ratio = torch.where(mask, log_ratio[rows].cpu(), 0)
        if (mask & log_ratio.isfinite()).any():
            mismatch = mismatch_metrics(log_ratio, mask)
            metrics |= {f"mismatch_split/{source}_{name}": mismatch[PREFIX + name] for name in ("kl", "k3_kl")}
    return metrics
