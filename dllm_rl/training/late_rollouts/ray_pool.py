"""Ray workers that make asynchronous rollouts, and the cluster that they run on."""

import atexit
import os
import signal
import socket
import sys
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from dllm_rl.device import find_device
from dllm_rl.distributed.collectives import launched, make_accelerator
from dllm_rl.distributed.stop import SIGNALS, handlers_kept, with_the_run
from dllm_rl.models.base import Policy
from dllm_rl.recipe import Recipe
from dllm_rl.training.context import StepContext
from dllm_rl.training.late_rollouts.schedule import Sampler, twin_of

ATTEMPTS = 3  # per job: a worker whose death has a lasting cause would die in every attempt
CLUSTER_SECONDS = 30.0  # seconds that a cluster has to reserve the workers' processors
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Made = bytes | tuple[str, str]  # a batch, or the kind and the text of an error


class Worker:
    """Ray actor that makes batches. It sets itself up in its first job, so that a setup error is reported as that job's
    error.
    """

    def __init__(self) -> None:
        self.sampler: Sampler | None = None

    def make(self, given: tuple[Recipe, Policy, int, str], step: int, weights: bytes) -> Made:
        """Return a batch, or the kind and the text of an error: Ray would add lines to an exception."""
        try:
            if self.sampler is None:
                recipe, twin, threads, kind = given
                torch.set_num_threads(threads)  # sums are split between them, and round accordingly
                for name in LAUNCH:  # the learner's, whose process group this process must not join
                    os.environ.pop(name, None)
                # A copy: the object in Ray's store is shared and must not change.
                self.sampler = Sampler(recipe, twin_of(twin), make_accelerator(device=torch.device(kind)))
            return self.sampler.make(step, weights)
        except Exception as error:  # any exception, from a sampler or a grader
            return type(error).__name__, str(error)


@dataclass(eq=False)
class Job:
    weights: bytes  # a lost job is repeated with the same weights
    worker: int
    future: "Future[Made]"
    attempts: int = 1

    @property
    def made(self) -> bytes | None:
        if not self.future.done() or self.future.exception() is not None:
            return None
        found = self.future.result()
        return found if isinstance(found, bytes) else None


class RayWorkers:
    """Pool of Ray actors. Each batch goes to the actor with the fewest open jobs.

    A worker that dies, or does not return within collective_timeout, is replaced, and its jobs are repeated. The actors
    start here, before the learner has a model: they import torch and this library, which takes seconds, while the
    learner loads and warms up. Call `set_up` before the first job.
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
        self.sent = b""  # the weights that were put into Ray's store last

    def set_up(self, context: StepContext[Recipe]) -> None:
        """Send the model, once per machine."""
        self.say = context.log.say
        self.setup = self.ray.put((self.recipe, twin_of(context.policy), self.threads, self.kind))

    def submit(self, step: int, weights: bytes) -> None:
        every = range(len(self.workers))
        to_do = [sum(job.worker == worker and job.made is None for job in self.jobs.values()) for worker in every]
        worker = to_do.index(min(to_do))
        self.jobs[step] = Job(weights, worker, self._sent(step, weights, worker))

    def _sent(self, step: int, weights: bytes, worker: int) -> "Future[Made]":
        if dead_daemon(self.ray):  # the learner completes its step, and `result` raises
            return Future()
        if weights is not self.sent:  # once for all jobs with these weights
            self.sent, self.shared = weights, self.ray.put(weights)
        # A future, not ray.get: while Ray waits, a signal handler could not end the run.
        return self.workers[worker].make.remote(self.setup, step, self.shared).future()

    def ready(self, step: int) -> bytes | None:
        return self.jobs[step].made

    def result(self, step: int) -> bytes:
        job = self.jobs[step]
        seconds = self.recipe.collective_timeout
        errors = self.ray.exceptions
        while True:
            why = f"did not return within collective_timeout={seconds:g} s"
            try:
                found = self._wait(step, job.future, seconds)
            except (errors.RayActorError, errors.WorkerCrashedError, errors.ObjectLostError):
                why = "died"
            except errors.RayError as error:  # the worker could not read its input
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

    def _wait(self, step: int, future: "Future[Made]", seconds: float) -> Made:
        """Call `future.result`, but raise RuntimeError within a second of the death of a Ray process."""
        until = time.monotonic() + seconds
        while (remaining := until - time.monotonic()) > 0 and not wait([future], timeout=min(remaining, 1.0)).done:
            self.check_daemons(step)
        self.check_daemons(step)
        return future.result(0)

    def check_daemons(self, step: int) -> None:
        if (name := dead_daemon(self.ray)) is not None:
            raise RuntimeError(f"rollouts of step {step}: Ray's process {name} died, and its cluster with it")

    def _replace(self, worker: int) -> None:
        """Replace a worker by a new actor and send the new actor all unfinished jobs of the old one."""
        self.ray.kill(self.workers[worker])  # a worker that hangs; a dead worker is not affected
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
    """Make a worker's error in this process: one of the kinds that a step raises, or a RuntimeError that names the
    kind.
    """
    known = {each.__name__: each for each in (ValueError, RuntimeError, FloatingPointError, OSError)}
    return known[kind](text) if kind in known else RuntimeError(f"{kind}: {text}")


def ray_workers(recipe: Recipe) -> RayWorkers | None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine, and start the workers on processors and GPUs that
    are reserved for them. Return None for a run without workers.

    Raises:
        ValueError: The cluster has too few free processors or GPUs, or Ray is missing. It is raised before any work.
    """
    count = recipe.rollout_workers
    if not count:
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
    if reserved is not None:  # a cluster that the caller started outlives the run
        with_the_run().callback(release, ray, reserved)
    if reserved is None or not reserved.wait(CLUSTER_SECONDS):
        free = ray.available_resources() if enough else there
        found = ", ".join(f"{free.get(name, 0):g} {name}" for name in bundle)
        wanted = ", ".join(f"{number} {name}" for name, number in bundle.items())
        raise ValueError(
            f"rollout_workers={count} take {wanted} each (as many processors as the learner has threads, and a GPU if "
            f"it has one, which Ray must not give away), and the cluster has {found} free: use fewer workers, fewer "
            "threads (OMP_NUM_THREADS), or more machines"
        )
    return RayWorkers(recipe, reserved, device)


def start_ray(ray: ModuleType, device: torch.device) -> None:
    """Start Ray without output, until the run ends."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would give the learner the cores that they share
    address = os.environ.get("RAY_ADDRESS", "local")
    check_address(address)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if address == "local" and device.type == "cuda":  # the first GPU is the learner's
        ids = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ids[1:])
    # Ray's processes are in this process's group, and ignore signals that a terminal or SLURM sends to the group: if
    # they died, Ray would block this process for a minute. The kernel kills them whenever this process ends.
    deaf = {number for number in SIGNALS if number != signal.SIGINT}  # Ray blocks SIGINT itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, deaf)
    try:
        with handlers_kept():  # Ray sets a handler for SIGTERM
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
    with_the_run().callback(shut_down, ray)


def dead_daemon(ray: ModuleType) -> str | None:
    """Return the name of a Ray process that this process started and that has died, or None.

    Call it before each call into Ray: without its raylet or its gcs_server, Ray ends this process without a message,
    immediately or after a minute.
    """
    started = ray._private.worker.global_worker.node.all_processes
    names = ("raylet", "gcs_server")
    return next((name for name in names for each in started.get(name, []) if each.process.poll() is not None), None)


def release(ray: ModuleType, reserved: Any) -> None:
    if dead_daemon(ray) is None:
        ray.util.remove_placement_group(reserved)


def shut_down(ray: ModuleType) -> None:
    if dead_daemon(ray) is None:
        ray.shutdown()
    else:  # Ray's clean-up, error report and exit threads would wait for the dead process, or crash
        atexit.unregister(ray.shutdown)
        atexit.register(leave_at_exit)
        sys.excepthook = ray._private.worker.normal_excepthook
        ray._private.worker.global_worker.node.kill_all_processes(check_alive=False, allow_graceful=False)


def leave_at_exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def check_address(address: str) -> None:
    """Raise ValueError if nothing listens at HOST:PORT: Ray would try for minutes, and then end the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:  # local, auto, or a URL
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CLUSTER_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"rollout_workers: nobody answers at RAY_ADDRESS={address!r} ({error}): start a cluster there (ray start "
            "--head), or unset RAY_ADDRESS"
        ) from None
