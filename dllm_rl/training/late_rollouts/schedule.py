"""Which step's batch is made of which weights, and by whom."""

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
from dllm_rl.training.selection import metric_weights, views_of_step


class Sampler:
    """Makes batches with a learner's twin and the rollout's copy of it, in a worker's process or in the learner's."""

    def __init__(self, recipe: Recipe, twin: Policy, accelerator: Accelerator) -> None:
        self.recipe = recipe
        self.policy = twin.to(accelerator.device)
        self.accelerator = accelerator
        self.context: StepContext[Recipe] | None = None

    def make(self, step: int, weights: bytes) -> bytes:
        """A step's batch of these weights: nothing else decides its bits. Raises what `collect` raises."""
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
    """The samples with the estimate of the weights that sampled, which are gone when the learner scores. An estimate
    that replays the sampler needs none: its record is in the rollout. The masks are those that the learner will draw:
    of the step's number, the rollout and its advantages alone.
    """
    recipe, likelihood = run.recipe, run.recipe.likelihood
    if likelihood.exact_for_sampler or not recipe.max_staleness:  # without a lag the learner has these weights
        return samples
    known = samples.weighted(metric_weights(recipe, samples.advantages, step))
    score = partial(likelihood.logprobs, run.rollout_policy, samples.rollout)
    with arithmetic(recipe, run.accelerator):
        sets = views_of_step(recipe, known, step, run.accelerator)
        made = tuple(score(views, micro_batch_size=recipe.micro_batch_size) for views in sets)
    return replace(samples, rollout_logprobs=made)


def twin_of(policy: Policy) -> Policy:
    """The policy over a copy of its module, on the host."""
    twin = copy.copy(policy)
    twin.module = host_copy(policy.module)
    return twin


@runtime_checkable
class Pool(Protocol):
    """Who makes the batches. Jobs are named by their step, and asked for in order."""

    def set_up(self, context: StepContext[Recipe]) -> None:
        """Take the model; called once, before the first job."""

    def submit(self, step: int, weights: bytes) -> None: ...

    def ready(self, step: int) -> bytes | None:
        """A batch, or None if it is not yet made; waits for nothing and raises nothing."""

    def result(self, step: int) -> bytes:
        """A batch, which is waited for. Raises what its making raised; RuntimeError if no worker makes it."""

    def forget(self, step: int) -> None: ...


class InTurn:
    """Batches made in this process, each when it is asked for: for studies of the lag alone, which then need one
    processor and no Ray, and for tests. The bits are those of the workers.
    """

    def set_up(self, context: StepContext[Recipe]) -> None:
        self.sampler = Sampler(context.recipe, twin_of(context.policy), context.accelerator)
        self.jobs: dict[int, bytes] = {}  # the weights of each
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
    """A batch that is not yet learned from."""

    weights: bytes
    age: int  # the steps behind the weights
    made: bytes | None = None  # from a checkpoint


@dataclass(eq=False)
class LateRollouts:
    """The schedule of a run: which step's batch is made of which weights."""

    context: StepContext[Recipe]
    pool: Pool
    pending: dict[int, Pending] = field(default_factory=dict)

    def begin(self, done: int, folder: Path | None) -> None:
        """After `done` steps, hand out the batches of the next K + 1, as in the undisturbed run at the checkpoint in
        `folder`. What it does not hold is made of the present weights: the newest batch, and, where a finished run goes
        on, the batches of steps that it had not planned.
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
        """What `training.rollouts.collect` returns, from whoever makes it."""
        run = self.context
        with run.log.stage("waiting"):
            held = self.pending[step].made
            made = self.pool.result(step) if held is None else held
        (samples, answers, metrics), seconds = batch_from_bytes(made, run.recipe, run.accelerator.device)
        metrics["num_tokens"] += run.log.last.get("num_tokens", 0.0)  # a worker knows its own batch alone
        version = samples.rollout.weights_version
        metrics |= {"rollout_version": float(version), "staleness": float(run.policy.weights_version - version)}
        return samples, answers, metrics | {"time/rollout_worker": seconds}

    def publish(self, step: int, learned: Step) -> dict[str, float]:
        """Hand out another batch, of the weights after the update of `step`. Call it before the learner's own copy is
        refreshed, by which it tells staleness from quantisation in `learned`; returns the metrics of both.
        """
        run = self.context
        if self.pending.pop(step).made is None:
            self.pool.forget(step)
        later = step + 1 + run.recipe.max_staleness
        if later < run.recipe.num_steps:
            self.hand_out(later, trained_weights(run.policy), age=step + 1)
        return split(run, learned)

    def files(self, step: int) -> dict[str, bytes]:
        """What a checkpoint of the state after `step` steps holds of the pending batches: each one if it is made, else
        the weights that it is made of. Waits for nothing, so that a stopped run can be saved in time.
        """
        found = {}
        for number, each in self.pending.items():
            if each.age < step:  # else of the checkpoint's own weights
                made = each.made or self.pool.ready(number)
                batch, weights = file_names(number)
                found[weights if made is None else batch] = each.weights if made is None else made
        return found


def file_names(step: int) -> tuple[str, str]:
    """In a checkpoint: of a step's batch, and of the weights that it is made of."""
    return f"rollouts/{step:06d}.safetensors", f"rollouts/{step:06d}.weights.safetensors"


def held(folder: Path | None, name: str) -> bytes | None:
    """A checkpoint's file, or None. Raises ValueError if it is damaged."""
    if folder is None or not (folder / name).exists():
        return None
    data = (folder / name).read_bytes()
    try:
        from_bytes(data)
    except ValueError as error:
        raise ValueError(f"{folder}: {name} is damaged: {error}; take an earlier checkpoint") from None
    return data


def split(run: StepContext[Recipe], learned: Step) -> dict[str, float]:
    """Which part of the mismatch is the quantisation's (the learner against its own copy of the same weights), and
    which the staleness's (that copy against the record of the weights that sampled): `kl` and `k3_kl` of
    `mismatch_metrics`, nats, over the tokens of one scored group. Nothing without a copy, or without staleness.
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
