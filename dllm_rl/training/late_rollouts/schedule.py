"""The schedule of asynchronous rollouts: which step's batch is made with which weights, and by which pool."""

import copy
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator

from dllm_rl.algorithms.mismatch import PREFIX, mismatch_metrics
from dllm_rl.models.base import Policy
from dllm_rl.models.merge import host_copy
from dllm_rl.recipe import Recipe
from dllm_rl.training.context import StepContext
from dllm_rl.training.forwards import arithmetic
from dllm_rl.training.late_rollouts.serialization import (
    Collected,
    batch_as_bytes,
    batch_from_bytes,
    from_bytes,
    trained_weights,
)
from dllm_rl.training.policies import engine_of
from dllm_rl.training.rollouts import collect
from dllm_rl.training.samples import Samples, Step
from dllm_rl.training.views import metric_weights, views_of_step


class Sampler:
    """Makes batches with copies of the learner and of the rollout policy, in a worker's process or in the learner's."""

    def __init__(self, recipe: Recipe, twin: Policy, accelerator: Accelerator) -> None:
        self.recipe = recipe
        self.policy = twin.to(accelerator.device)
        self.accelerator = accelerator
        self.context: StepContext[Recipe] | None = None

    def make(self, step: int, weights: bytes) -> bytes:
        """Make a step's batch with these weights. Nothing else decides its bits. Raises what `collect` raises."""
        began = time.perf_counter()
        context = self.load(weights)
        samples, answers, metrics = collect(context, step)
        return batch_as_bytes((scored(context, samples, step), answers, metrics), time.perf_counter() - began)

    @torch.no_grad()
    def load(self, weights: bytes) -> StepContext[Recipe]:
        tensors, about = from_bytes(weights)
        places = dict(self.policy.module.named_parameters())
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
        policy = self.policy
        policy.weights_version = about["version"]
        engine = engine_of(self.recipe)
        if self.context is None:
            sampling = engine.load(policy)
            sampling.weights_version = policy.weights_version
            self.context = StepContext(
                recipe=self.recipe, accelerator=self.accelerator, policy=policy, rollout_policy=sampling
            )
        else:
            engine.sync(policy, self.context.rollout_policy)
        return self.context


def scored(run: StepContext[Recipe], samples: Samples, step: int) -> Samples:
    """Add the estimate by the weights that sampled, since these weights are gone when the learner scores.

    An estimator that replays the sampler needs no estimate: its record is in the rollout. The masks are the masks that
    the learner will draw: they depend only on the step's number, the rollout and its advantages.
    """
    recipe, likelihood = run.recipe, run.recipe.likelihood
    if likelihood.exact_for_sampler or not recipe.max_staleness:  # without staleness the learner has these weights
        return samples
    known = samples.weighted(metric_weights(recipe, samples.advantages, step))
    score = partial(likelihood.logprobs, run.rollout_policy, samples.rollout)
    with arithmetic(recipe, run.accelerator):
        sets = views_of_step(recipe, known, step, run.accelerator)
        made = tuple(score(views, micro_batch_size=recipe.micro_batch_size) for views in sets)
    return replace(samples, rollout_logprobs=made)


def twin_of(policy: Policy) -> Policy:
    """Return the policy over a copy of its module on the host."""
    twin = copy.copy(policy)
    twin.module = host_copy(policy.module)
    return twin


@runtime_checkable
class Pool(Protocol):
    """Interface of the workers that make the batches of `rollout_workers`.

    Implement it for workers other than Ray's and pass it to `train(recipe, pool=...)`. Each job has the number of its
    step, and results are requested in the order of the steps.
    """

    def set_up(self, context: StepContext[Recipe]) -> None:
        """Receive the model; called once, before the first job."""

    def submit(self, step: int, weights: bytes) -> None: ...

    def ready(self, step: int) -> bytes | None:
        """Return a batch, or None if it is not finished. Do not wait and do not raise."""

    def result(self, step: int) -> bytes:
        """Wait for a batch and return it. Raise the error of its job, or RuntimeError if no worker makes it."""

    def forget(self, step: int) -> None: ...


class InTurn:
    """Pool that makes each batch in this process when it is requested.

    Use it in tests, and to study staleness on one processor without Ray. The bits are the same as the workers'.
    """

    def set_up(self, context: StepContext[Recipe]) -> None:
        self.sampler = Sampler(context.recipe, twin_of(context.policy), context.accelerator)
        self.jobs: dict[int, bytes] = {}  # the weights of each job
        self.made: dict[int, bytes] = {}

    def submit(self, step: int, weights: bytes) -> None:
        self.jobs[step] = weights

    def ready(self, step: int) -> bytes | None:
        return self.made.get(step)

    def result(self, step: int) -> bytes:
        if step not in self.made:
            self.made[step] = self.sampler.make(step, self.jobs[step])
        return self.made[step]

    def forget(self, step: int) -> None:
        del self.jobs[step]
        self.made.pop(step, None)


@dataclass(eq=False)
class Pending:
    """A batch that the learner has not trained on yet."""

    weights: bytes
    age: int  # number of steps that the weights were trained for
    made: bytes | None = None  # from a checkpoint


@dataclass(eq=False)
class LateRollouts:
    """Schedule of a run: which step's batch is made with which weights."""

    context: StepContext[Recipe]
    pool: Pool
    pending: dict[int, Pending] = field(default_factory=dict)

    def begin(self, done: int, folder: Path | None) -> None:
        """After `done` steps, submit the batches of the next K + 1 steps, as in the uninterrupted run at the checkpoint
        in `folder`.

        Batches that the checkpoint does not contain are made with the current weights: the newest batch, and, if a
        finished run is continued, the batches of steps that it had not planned.
        """
        recipe = self.context.recipe
        own = trained_weights(self.context.policy)
        for step in range(done, min(done + recipe.max_staleness + 1, recipe.num_steps)):
            made, weights = (held(folder, name) for name in file_names(step))
            if made is not None:
                self.pending[step] = Pending(b"", age=-1, made=made)
            elif weights is not None:
                self.hand_out(step, weights, age=-1)
            else:
                self.hand_out(step, own, age=done)

    def hand_out(self, step: int, weights: bytes, *, age: int) -> None:
        self.pending[step] = Pending(weights, age)
        self.pool.submit(step, weights)

    def collect(self, step: int) -> Collected:
        """Return the result of `training.rollouts.collect` for this step, from the pool or from the checkpoint."""
        run = self.context
        with run.log.stage("waiting"):
            held = self.pending[step].made
            made = self.pool.result(step) if held is None else held
        (samples, answers, metrics), seconds = batch_from_bytes(made, run.recipe, run.accelerator.device)
        metrics["num_tokens"] += run.log.last.get("num_tokens", 0.0)  # a worker counts only the tokens of its batch
        version = samples.rollout.weights_version
        metrics |= {"rollout_version": float(version), "staleness": float(run.policy.weights_version - version)}
        return samples, answers, metrics | {"time/rollout_worker": seconds}

    def publish(self, step: int, learned: Step) -> dict[str, float]:
        """Submit another batch, with the weights after the update of `step`, and return the metrics of `split`.

        Call it before the rollout policy is synced: the metrics need the copy of the weights that scored.
        """
        run = self.context
        if self.pending.pop(step).made is None:
            self.pool.forget(step)
        later = step + 1 + run.recipe.max_staleness
        if later < run.recipe.num_steps:
            self.hand_out(later, trained_weights(run.policy), age=step + 1)
        return split(run, learned)

    def files(self, step: int) -> dict[str, bytes]:
        """Return the pending batches that a checkpoint after `step` steps contains: each batch if it is finished, else
        the weights that it is made with. It does not wait, so that a stopped run can be saved in time.
        """
        found = {}
        for number, each in self.pending.items():
            if each.age < step:  # a newer batch is made with the checkpoint's weights
                made = each.made or self.pool.ready(number)
                batch, weights = file_names(number)
                found[weights if made is None else batch] = each.weights if made is None else made
        return found


def file_names(step: int) -> tuple[str, str]:
    """Return the file names in a checkpoint of a step's batch and of the weights that it is made with."""
    return f"rollouts/{step:06d}.safetensors", f"rollouts/{step:06d}.weights.safetensors"


def held(folder: Path | None, name: str) -> bytes | None:
    """Read a file of a checkpoint; return None if the file does not exist.

    Raises:
        ValueError: The file is damaged.
    """
    if folder is None or not (folder / name).exists():
        return None
    data = (folder / name).read_bytes()
    try:
        from_bytes(data)
    except ValueError as error:
        raise ValueError(f"{folder}: {name} is damaged: {error}; take an earlier checkpoint") from None
    return data


def split(run: StepContext[Recipe], learned: Step) -> dict[str, float]:
    """Split the mismatch into the part of quantization (the learner against its quantized copy of the same weights) and
    the part of staleness (that copy against the record of the weights that sampled).

    Returns:
        `kl` and `k3_kl` of `mismatch_metrics` for both parts, in nats, over the tokens of one scored group. {} without
        a
        copy or without staleness.
    """
    recipe, copied = run.recipe, run.rollout_policy
    if copied is run.policy or not recipe.max_staleness:
        return {}
    rollout, logps = learned.samples.rollout, learned.logps
    mask = logps.views.scored(rollout.completion_mask)
    rows = mask.any(-1).nonzero()[: recipe.num_generations, 0]
    if not len(rows):
        return {}
    chosen = torch.zeros_like(mask[:, 0]).index_fill(0, rows, True)
    with run.log.stage("scoring"), arithmetic(recipe, run.accelerator):
        size = recipe.micro_batch_size
        fresh = recipe.likelihood.logprobs(copied, rollout, logps.views.restrict_to_rows(chosen), micro_batch_size=size)
    mask = mask[rows].cpu()
    found: dict[str, float] = {}
    for part, apart in (("quantization", logps.old_logprobs - fresh), ("staleness", fresh - logps.rollout_logprobs)):
        apart = torch.where(mask, apart[rows].cpu(), 0)
        if (mask & apart.isfinite()).any():
            measured = mismatch_metrics(apart, mask)
            found |= {f"mismatch_split/{part}_{name}": measured[PREFIX + name] for name in ("kl", "k3_kl")}
    return found
