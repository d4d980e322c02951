"""Late rollouts: workers make the batches of later steps while the learner trains (`rollout_workers`, `max_staleness`).

The batch of step m is sampled with the weights after max(0, m - K) steps, K = max_staleness, whatever the number of
workers and their speed. It is one job of one worker, and so one call with the same shapes: its bits do not depend on
who makes it. Weights, and the batches that come back, travel as the bytes of a safetensors file; a checkpoint holds
the same bytes.
"""

import copy
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from dllm_rl.algorithms.mismatch import PREFIX, mismatch_metrics
from dllm_rl.device import find_device
from dllm_rl.distributed.collectives import launched, make_accelerator
from dllm_rl.distributed.stop import SIGNALS, handlers_kept, with_the_run
from dllm_rl.models.base import Policy
from dllm_rl.models.merge import host_copy
from dllm_rl.monitoring.log import RunLog
from dllm_rl.recipe import Recipe
from dllm_rl.tasks.base import Problem, Reward
from dllm_rl.training.completion_log import stored_fields
from dllm_rl.training.forwards import arithmetic
from dllm_rl.training.learner import Step
from dllm_rl.training.policies import engine_of
from dllm_rl.training.rollouts import Answer, collect
from dllm_rl.training.run import Run
from dllm_rl.training.samples import Samples
from dllm_rl.training.selection import metric_weights, views_of_step
from dllm_rl.types import Columns, Rollout, SamplingParams

ATTEMPTS = 3  # at a job: a worker that dies for a reason of its own would die for ever
PATIENCE = 30.0  # seconds that a cluster gets to reserve the workers' processors
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What a rollout consists of: records of columns, as it is one itself.
RECORDS: dict[str, Any] = {kind.__name__: kind for kind in (*Columns.__subclasses__(), SamplingParams)}
Collected = tuple[Samples, list[Answer], dict[str, float]]
_HERE: ContextVar[bool] = ContextVar("whether late rollouts are made in this process", default=False)


@contextmanager
def in_this_process() -> Iterator[None]:
    """Runs in this block make their late rollouts themselves, one after another: for tests, and for studies of the lag
    alone, which then need one processor and no Ray. The bits are those of the workers."""
    before = _HERE.set(True)
    try:
        yield
    finally:
        _HERE.reset(before)


# --- Weights and batches as bytes -----------------------------------------------------------------------------------


def as_bytes(tensors: Mapping[str, Tensor], about: Any) -> bytes:
    """A safetensors file of host copies of the tensors, whose header has `about` as JSON."""
    # Copies: the format refuses tensors that share memory.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return safetensors.save(copies, metadata={"about": json.dumps(about)})


def from_bytes(data: bytes) -> tuple[dict[str, Tensor], Any]:
    """What `as_bytes` got. Raises ValueError on other bytes."""
    try:
        (size,) = struct.unpack("<Q", data[:8])
        return safetensors.load(data), json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["about"])
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"no safetensors file of this library: {error}") from None


def trained_weights(policy: Policy) -> bytes:
    """The weights that training changes, with adapters these alone, and their version."""
    trained = {name: weight for name, weight in policy.module.named_parameters() if weight.requires_grad}
    return as_bytes(trained, {"version": policy.version})


def plain_record(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A rollout, or a part of it, as JSON; its tensors go to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if is_dataclass(value):
        held = {f.name: plain_record(getattr(value, f.name), f"{name}.{f.name}", tensors) for f in fields(value)}
        return {"record": type(value).__name__, "fields": held}
    if isinstance(value, tuple):
        return {"tuple": [plain_record(each, f"{name}.{i}", tensors) for i, each in enumerate(value)]}
    return {"rank": True} if callable(value) else value  # of all that a rollout holds, its rank alone is a function


def record_of(value: Any, tensors: Mapping[str, Tensor], rank: Callable | None) -> Any:
    """What `plain_record` got; `rank` is the sampler's."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "record" in value:
        held = {name: record_of(each, tensors, rank) for name, each in value["fields"].items()}
        return RECORDS[value["record"]](**held)
    return rank if "rank" in value else tuple(record_of(each, tensors, rank) for each in value["tuple"])


def batch_as_bytes(collected: Collected, seconds: float) -> bytes:
    """A batch for another process or a checkpoint; `seconds` that it took. A problem's fields become JSON, as in
    completions.jsonl: after grading they are shown and stored, and no more than that."""
    samples, answers, metrics = collected
    tensors = {"rewards": samples.rewards, "advantages": samples.advantages, "metric_weights": samples.metric_weights}
    tensors |= {f"rollout_logprobs.{number}": each for number, each in enumerate(samples.rollout_logprobs)}
    problems: dict[int, dict[str, Any]] = {}
    graded = []
    for answer in answers:
        problem, reward = answer.problem, answer.reward
        if id(problem) not in problems:
            texts = {"prompt": problem.prompt, "solution": problem.solution, "blank": problem.blank}
            problems[id(problem)] = {"fields": stored_fields(problem), **texts}
        parts = {name: float(value) for name, value in reward.breakdown.items()}
        kept = {
            "value": float(reward.value),
            "parsed": bool(reward.parsed),
            "breakdown": parts,
            "answer": reward.answer,
        }
        plain = {f.name: getattr(answer, f.name) for f in fields(answer) if f.name not in ("problem", "reward")}
        graded.append({"problem": list(problems).index(id(problem)), "reward": kept, **plain})
    rollout = plain_record(samples.rollout, "rollout", tensors)
    known = {"rollout": rollout, "problems": list(problems.values()), "answers": graded}
    return as_bytes(tensors, {**known, "metrics": metrics, "seconds": seconds})


def batch_from_bytes(data: bytes, recipe: Recipe, device: torch.device) -> tuple[Collected, float]:
    """What `batch_as_bytes` got, the rollout on the device."""
    tensors, about = from_bytes(data)
    rollout: Rollout = record_of(about["rollout"], tensors, getattr(recipe.sampler, "keywords", {}).get("rank"))
    count = sum(name.startswith("rollout_logprobs.") for name in tensors)
    samples = Samples(
        rollout.to(device),
        tensors["rewards"],
        tensors["advantages"],
        tensors["metric_weights"],
        tuple(tensors[f"rollout_logprobs.{number}"].to(device) for number in range(count)),
    )
    problems = [Problem(**each) for each in about["problems"]]
    answers = []
    for each in about["answers"]:
        graded = {"problem": problems[each["problem"]], "reward": Reward(**each["reward"])}
        answers.append(Answer(**{**each, **graded}))
    return (samples, answers, about["metrics"]), about["seconds"]


# --- Who makes them -------------------------------------------------------------------------------------------------


class Sampler:
    """Makes batches with a learner's twin and the rollout's copy of it, in a worker's process or in the learner's."""

    def __init__(self, recipe: Recipe, twin: Policy, accelerator: Accelerator) -> None:
        self.recipe = recipe
        self.policy = twin.to(accelerator.device)
        self.accelerator = accelerator
        self.log = RunLog(Path(os.devnull), start=0, main=False)
        self.rollout_policy: Policy | None = None

    def make(self, step: int, weights: bytes) -> bytes:
        """A step's batch of these weights: nothing else decides its bits. Raises what `collect` raises."""
        began = time.perf_counter()
        self.load(weights)
        assert self.rollout_policy is not None, "loaded"
        samples, answers, metrics = collect(self.recipe, self.rollout_policy, step, self.accelerator, self.log)
        samples = self.scored(samples, step)
        return batch_as_bytes((samples, answers, metrics), time.perf_counter() - began)

    def scored(self, samples: Samples, step: int) -> Samples:
        """The samples with the estimate of the weights that sampled, which are gone when the learner scores. An
        estimate that replays the sampler needs none: its record is in the rollout. The masks are those that the
        learner will draw: of the step's number, the rollout and its advantages alone."""
        recipe, likelihood = self.recipe, self.recipe.likelihood
        if likelihood.exact_for_sampler or not recipe.max_staleness:  # without a lag the learner has these weights
            return samples
        assert self.rollout_policy is not None, "loaded"
        known = samples.weighted(metric_weights(recipe, samples.advantages, step))
        score = partial(likelihood.logprobs, self.rollout_policy, samples.rollout)
        with arithmetic(recipe, self.accelerator):
            sets = views_of_step(recipe, known, step, self.accelerator)
            made = tuple(score(views, micro_batch_size=recipe.micro_batch_size) for views in sets)
        return replace(samples, rollout_logprobs=made)

    @torch.no_grad()
    def load(self, weights: bytes) -> None:
        tensors, about = from_bytes(weights)
        places = dict(self.policy.module.named_parameters())
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
        self.policy.version = about["version"]
        engine = engine_of(self.recipe)
        if self.rollout_policy is None:
            self.rollout_policy = engine.load(self.policy)
            self.rollout_policy.version = self.policy.version
        else:
            engine.sync(self.policy, self.rollout_policy)


def twin_of(policy: Policy) -> Policy:
    """The policy over a copy of its module, on the host."""
    twin = copy.copy(policy)
    twin.module = host_copy(policy.module)
    return twin


@runtime_checkable
class Pool(Protocol):
    """What the schedule needs of those who make batches. Jobs are named by their step, and asked for in order."""

    def put(self, weights: bytes) -> Any:
        """Make weights known, once for all jobs that take them; returns what `submit` takes."""

    def submit(self, step: int, weights: Any) -> None: ...

    def ready(self, step: int) -> bytes | None:
        """A batch, or None if it is not yet made; waits for nothing and raises nothing."""

    def result(self, step: int) -> bytes:
        """A batch, which is waited for. Raises what its making raised; RuntimeError if no worker makes it."""

    def forget(self, step: int) -> None: ...


class InTurn:
    """Batches made in this process, each when it is asked for."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.jobs: dict[int, bytes] = {}  # the weights of each
        self.made: dict[int, bytes] = {}

    def put(self, weights: bytes) -> bytes:
        return weights

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


class Worker:
    """What a Ray actor runs. It sets itself up with its first job, so that a failure is that job's, and told."""

    def __init__(self) -> None:
        self.sampler: Sampler | None = None

    def make(self, given: tuple[Recipe, Policy, int, str], step: int, weights: bytes) -> bytes | tuple[str, str]:
        """A batch, or the kind and the text of an error: Ray would wrap it in lines of its own."""
        try:
            if self.sampler is None:
                recipe, twin, threads, kind = given
                torch.set_num_threads(threads)  # sums are split between them, and round accordingly
                for name in LAUNCH:  # of the learner, whose process group this process must not join
                    os.environ.pop(name, None)
                # A copy: the object store's own is shared and must not change.
                self.sampler = Sampler(recipe, twin_of(twin), make_accelerator(device=torch.device(kind)))
            return self.sampler.make(step, weights)
        except Exception as error:  # of any kind: a sampler's or a grader's own
            return type(error).__name__, str(error)


@dataclass(eq=False)
class Job:
    weights: Any  # Ray's reference, kept until the batch is learned from: a lost job is made again with the same
    worker: int
    future: "Future[Any]"
    attempts: int = 1

    @property
    def made(self) -> bytes | None:
        if not self.future.done() or self.future.exception() is not None:
            return None
        found = self.future.result()
        return found if isinstance(found, bytes) else None


class RayWorkers:
    """Batches made by Ray actors, each by the one with the fewest jobs to do when it is asked for. A worker that dies,
    or does not return within collective_timeout, is replaced, and its jobs are made again.

    The actors are made here, before the learner has a model: they import torch and this library, which takes seconds,
    while the learner loads and warms up. `set_up` comes before the first job.
    """

    def __init__(self, recipe: Recipe, reserved: Any, device: torch.device) -> None:
        import ray

        self.ray = ray
        self.recipe = recipe
        self.kind = device.type
        self.threads = torch.get_num_threads()
        place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(reserved)
        wanted = {"num_cpus": self.threads, "num_gpus": int(self.kind != "cpu"), "max_restarts": 0}
        self.actor: Any = ray.remote(Worker).options(**wanted, scheduling_strategy=place)
        self.workers: list[Any] = [self.actor.remote() for _ in range(recipe.rollout_workers)]
        self.jobs: dict[int, Job] = {}

    def set_up(self, policy: Policy, say: Callable[[str], None]) -> None:
        """Send the model, once per machine; `say` prints a line of the run."""
        self.say = say
        self.setup = self.ray.put((self.recipe, twin_of(policy), self.threads, self.kind))

    def put(self, weights: bytes) -> Any:
        return self.ray.put(weights)

    def submit(self, step: int, weights: Any) -> None:
        every = range(len(self.workers))
        to_do = [sum(job.worker == worker and job.made is None for job in self.jobs.values()) for worker in every]
        worker = to_do.index(min(to_do))
        self.jobs[step] = Job(weights, worker, self._sent(step, weights, worker))

    def _sent(self, step: int, weights: Any, worker: int) -> "Future[Any]":
        # A future, not ray.get: inside Ray's own wait a signal's handler could not end the run.
        return self.workers[worker].make.remote(self.setup, step, weights).future()

    def ready(self, step: int) -> bytes | None:
        return self.jobs[step].made

    def result(self, step: int) -> bytes:
        job = self.jobs[step]
        seconds = self.recipe.collective_timeout
        errors = self.ray.exceptions
        while True:
            why = f"did not return within collective_timeout={seconds:g} s"
            try:
                found = job.future.result(seconds)
            except (errors.RayActorError, errors.WorkerCrashedError, errors.ObjectLostError):
                why = "died"
            except errors.RayError as error:  # what was sent could not be read at the other end
                raise RuntimeError(f"rollouts of step {step}: {str(error).strip().splitlines()[-1]}") from None
            except TimeoutError:
                pass
            else:
                if isinstance(found, bytes):
                    return found
                raise error_of(*found)
            if job.attempts == ATTEMPTS:
                raise RuntimeError(
                    f"rollouts of step {step}: {ATTEMPTS} workers in turn took the job, and the last one {why}; the "
                    f"processes' own last words are in {self.logs}"
                )
            job.attempts += 1
            self.say(f"warning: the worker that made the rollouts of step {step} {why}; another one makes them again")
            self._replace(job.worker)

    def _replace(self, worker: int) -> None:
        """A new actor in a worker's place, which gets all of its jobs that are not done."""
        self.ray.kill(self.workers[worker])  # one that hangs; another is dead already
        self.workers[worker] = self.actor.remote()
        for step, job in sorted(self.jobs.items()):
            if job.worker == worker and job.made is None:
                job.future = self._sent(step, job.weights, worker)

    @property
    def logs(self) -> str:
        return str(Path(self.ray._private.worker.global_worker.node.get_logs_dir_path()))

    def forget(self, step: int) -> None:
        del self.jobs[step]


def error_of(kind: str, text: str) -> Exception:
    """A worker's error in this process: of the kinds that a step raises, or a RuntimeError that names the kind."""
    known = {each.__name__: each for each in (ValueError, RuntimeError, FloatingPointError, OSError)}
    return known[kind](text) if kind in known else RuntimeError(f"{kind}: {text}")


# --- The cluster ----------------------------------------------------------------------------------------------------


def make_workers(recipe: Recipe) -> RayWorkers | None:
    """Join the cluster of RAY_ADDRESS, or start one of this machine, and start the workers on processors and GPUs that
    are reserved for them. None for a run without. Raises ValueError where they find no room, before any work."""
    count = recipe.rollout_workers
    if not count or _HERE.get():
        return None
    if launched() > 1:
        raise ValueError(
            f"rollout_workers={count} goes with one learner process, and {launched()} were launched: launch one, or "
            "set rollout_workers=0"
        )
    if find_spec("ray") is None:
        raise ValueError(f"rollout_workers={count} needs Ray: pip install 'dllm_rl[ray]', or set rollout_workers=0")
    import ray

    device = torch.device("cpu") if parse_flag_from_env("ACCELERATE_USE_CPU") else find_device()
    if not ray.is_initialized():
        start_ray(ray, device)
    each = {"CPU": torch.get_num_threads(), "GPU": int(device.type != "cpu")}
    there = ray.cluster_resources()
    enough = all(there.get(name, 0) >= wanted * count for name, wanted in each.items())
    bundle = {name: wanted for name, wanted in each.items() if wanted}
    reserved = ray.util.placement_group([bundle] * count) if enough else None
    if reserved is not None:  # a cluster of the caller's own outlives the run
        with_the_run().callback(ray.util.remove_placement_group, reserved)
    if reserved is None or not reserved.wait(PATIENCE):
        free = ray.available_resources() if enough else there
        found = ", ".join(f"{free.get(name, 0):g} {name}" for name in bundle)
        wanted = ", ".join(f"{number} {name}" for name, number in bundle.items())
        raise ValueError(
            f"rollout_workers={count} take {wanted} each (as many processors as the learner has threads, and a GPU if "
            f"it has one, which Ray must not give away), and the cluster has {found} free: use fewer workers, fewer "
            "threads (OMP_NUM_THREADS), or more machines"
        )
    return RayWorkers(recipe, reserved, device)


def start_ray(ray: Any, device: torch.device) -> None:
    """Ray, silent, until the run ends."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would give the learner the cores that they share
    address = os.environ.get("RAY_ADDRESS", "local")
    check_address(address)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if address == "local" and device.type == "cuda":  # the first GPU is the learner's
        ids = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ids[1:])
    # Ray's processes are of this one's group, and ignore what a terminal or SLURM sends to all of it: without them Ray
    # would hold this process for a minute. The kernel kills them when this process ends, however it ends.
    deaf = {number for number in SIGNALS if number != signal.SIGINT}  # that one Ray blocks by itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, deaf)
    try:
        with handlers_kept():  # Ray sets its own for SIGTERM
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"rollout_workers: Ray at RAY_ADDRESS={address!r} did not start: {why}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        else:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    with_the_run().callback(ray.shutdown)


def check_address(address: str) -> None:
    """Raise ValueError where nobody listens at HOST:PORT: Ray would try for minutes, and then end the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:  # local, auto, or a URL
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise ValueError(
            f"rollout_workers: nobody answers at RAY_ADDRESS={address!r} ({error}): start a cluster there (ray start "
            "--head), or unset RAY_ADDRESS"
        ) from None


# --- The schedule ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Pending:
    """A batch that is not yet learned from."""

    weights: bytes
    age: int  # the steps behind the weights
    made: bytes | None = None  # from a checkpoint


@dataclass(eq=False)
class LateRollouts:
    """The schedule of a run: which step's batch is made of which weights."""

    run: Run[Recipe]
    pool: Pool
    pending: dict[int, Pending] = field(default_factory=dict)

    def begin(self, folder: Path | None) -> None:
        """Hand out the batches of the next K + 1 steps, as in the undisturbed run at the checkpoint in `folder`. What
        it does not hold is made of the present weights: the newest batch, and, where a finished run goes on, the
        batches of steps that it had not planned."""
        done = self.run.state.step
        own = trained_weights(self.run.policy)
        shared = self.pool.put(own)
        for step in range(done, min(done + self.run.recipe.max_staleness + 1, self.run.recipe.num_steps)):
            made, weights = (held(folder, name) for name in file_names(step))
            if made is not None:
                self.pending[step] = Pending(b"", age=-1, made=made)
            elif weights is not None:
                self.hand_out(step, weights, self.pool.put(weights), age=-1)
            else:
                self.hand_out(step, own, shared, age=done)

    def hand_out(self, step: int, weights: bytes, shared: Any, *, age: int) -> None:
        self.pending[step] = Pending(weights, age)
        self.pool.submit(step, shared)

    def collect(self, step: int) -> Collected:
        """What `training.rollouts.collect` returns, from whoever makes it."""
        run = self.run
        with run.log.stage("waiting"):
            held = self.pending[step].made
            made = self.pool.result(step) if held is None else held
        (samples, answers, metrics), seconds = batch_from_bytes(made, run.recipe, run.accelerator.device)
        metrics["num_tokens"] += run.log.last.get("num_tokens", 0.0)  # a worker knows its own batch alone
        version = samples.rollout.weights_version
        metrics |= {"rollout_version": float(version), "staleness": float(run.policy.version - version)}
        return samples, answers, metrics | {"time/rollout_worker": seconds}

    def publish(self, step: int, learned: Step) -> dict[str, float]:
        """Hand out another batch, of the weights after the update of `step`. Call it before the learner's own copy is
        refreshed, by which it tells staleness from quantisation in `learned`; returns the metrics of both."""
        run = self.run
        if self.pending.pop(step).made is None:
            self.pool.forget(step)
        later = step + 1 + run.recipe.max_staleness
        if later < run.recipe.num_steps:
            weights = trained_weights(run.policy)
            self.hand_out(later, weights, self.pool.put(weights), age=step + 1)
        return split(run, learned)

    def files(self, step: int) -> dict[str, bytes]:
        """What a checkpoint of the state after `step` steps holds of the pending batches: each one if it is made, else
        the weights that it is made of. Waits for nothing, so that a stopped run can be saved in time."""
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


def split(run: Run[Recipe], learned: Step) -> dict[str, float]:
    """Which part of the mismatch is the quantisation's (the learner against its own copy of the same weights), and
    which the staleness's (that copy against the record of the weights that sampled): `kl` and `k3_kl` of
    `mismatch_metrics`, nats, over the tokens of one scored group. Nothing without a copy, or without staleness."""
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
        fresh = recipe.likelihood.logprobs(copied, rollout, logps.views.only(chosen), micro_batch_size=size)
    mask = mask[rows].cpu()
    found: dict[str, float] = {}
    for part, apart in (("quantization", logps.old - fresh), ("staleness", fresh - logps.rollout)):
        apart = torch.where(mask, apart[rows].cpu(), 0)
        if (mask & apart.isfinite()).any():
            measured = mismatch_metrics(apart, mask)
            found |= {f"mismatch_split/{part}_{name}": measured[PREFIX + name] for name in ("kl", "k3_kl")}
    return found


def late_rollouts(run: Run[Recipe], workers: RayWorkers | None, folder: Path | None) -> LateRollouts | None:
    """The schedule of a run with workers, its first batches handed out; None for a run that samples by itself."""
    if not run.recipe.rollout_workers:
        return None
    pool: Pool
    if workers is None:  # `in_this_process`
        pool = InTurn(Sampler(run.recipe, twin_of(run.policy), run.accelerator))
    else:
        workers.set_up(run.policy, run.log.say)
        pool = workers
    late = LateRollouts(run, pool)
    late.begin(folder)
    return late
