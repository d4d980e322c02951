"""Pool of Ray workers that make asynchronous rollouts, and the cluster that they run on."""

import atexit
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from dllm_rl.device import find_device
from dllm_rl.distributed.collectives import make_accelerator
from dllm_rl.distributed.stop import SIGNALS, handlers_kept, run_exit_stack
from dllm_rl.models.base import Policy
from dllm_rl.models.merge import host_copy
from dllm_rl.recipe import Recipe
from dllm_rl.screen import without_middle
from dllm_rl.step.context import StepContext
from dllm_rl.training.late_rollouts.schedule import RolloutProducer

MAX_ATTEMPTS = 3  # per job; if the cause of a worker's death is permanent, more attempts do not help
CLUSTER_SECONDS = 30.0  # seconds that a cluster may take to reserve processors for the workers
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BatchOrError = bytes | tuple[str, str]  # a serialized batch, or the type and the text of an error


class Worker:
    """Ray actor that makes batches. It sets itself up in its first job, so that a setup error is reported as that job's
    error.
    """

    def __init__(self) -> None:
        self.sampler: RolloutProducer | None = None

    def make(self, setup: tuple[Recipe, Policy, int, str], step: int, weights: bytes) -> BatchOrError:
        """Make a batch; return it, or the type and the text of an error, since Ray would add lines to an exception."""
        try:
            if self.sampler is None:
                recipe, policy, num_threads, device_type = setup
                torch.set_num_threads(num_threads)  # how a sum rounds depends on the number of threads
                # Variables of the learner, whose process group this process must not join.
                for name in LAUNCH_VARIABLES:
                    os.environ.pop(name, None)
                # Copied, because the object in Ray's store is shared and must not change.
                accelerator = make_accelerator(device=torch.device(device_type))
                self.sampler = RolloutProducer(recipe, host_copy(policy), accelerator)
            return self.sampler.make(step, weights)
        except Exception as error:  # any exception, from a sampler or a grader
            return type(error).__name__, str(error)


@dataclass(eq=False)
class Job:
    """A batch that a worker makes."""

    weights: bytes  # kept so that the job can be repeated if its worker dies
    worker: int
    future: "Future[BatchOrError]"
    waiting_since: float | None = None  # when the learner began to wait for it, in seconds of time.monotonic
    attempts: int = 1

    @property
    def batch_or_none(self) -> bytes | None:
        """The batch, or None if the job is still running or has failed."""
        if not self.future.done() or self.future.exception() is not None:
            return None
        result = self.future.result()
        return result if isinstance(result, bytes) else None


class RayWorkerPool:
    """Pool of Ray actors. Each batch goes to the actor with the fewest open jobs.

    A worker that dies, or does not return within collective_timeout, is replaced, and its jobs are repeated. The
    constructor starts the actors, so that they import torch and this library while the learner loads its model. Call
    `set_up` before the first job.

    Args:
        count: Number of actors.
        placement_group: Ray's reservation of their processors and GPUs.
        device: Device of the kind that they sample on.
        timeout: The run's `collective_timeout`, in seconds.
    """

    def __init__(self, count: int, placement_group: Any, device: torch.device, *, timeout: float) -> None:
        import ray

        self.ray = ray
        self.timeout = timeout
        self.kind = device.type
        self.threads = torch.get_num_threads()
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(placement_group)
        resources = {"num_cpus": self.threads, "num_gpus": int(self.kind != "cpu"), "max_restarts": 0}
        self.actor: Any = ray.remote(Worker).options(**resources, scheduling_strategy=strategy)
        self.workers: list[Any] = [self.actor.remote() for _ in range(count)]
        self.jobs: dict[int, Job] = {}
        self.stored_weights = b""  # the latest weights that were put into Ray's store
        self.stored_weights_ref: Any = None  # Ray's reference to them

    def set_up(self, recipe: Recipe, context: StepContext) -> None:
        """Put the recipe and the model into Ray's store, from which each machine fetches them once."""
        self.say = context.log.say
        # The recipe is sent without its callbacks, which run in the learner only.
        setup = (replace(recipe, callbacks=()), host_copy(context.policy), self.threads, self.kind)
        try:
            self.setup = self.ray.put(setup)
        except Exception as error:  # any exception, from the code of an object's class
            # Ray's own error has many lines; its cause is the one of pickle.
            raise ValueError(refusal("model", context.policy, error.__cause__ or error)) from None

    def submit(self, step: int, weights: bytes) -> None:
        """Give the job to the worker with the fewest open jobs."""
        busy = [job.worker for job in self.jobs.values() if job.batch_or_none is None]
        worker = min(range(len(self.workers)), key=busy.count)
        self.jobs[step] = Job(weights, worker, self._send_job(step, weights, worker))

    def _send_job(self, step: int, weights: bytes, worker: int) -> "Future[BatchOrError]":
        if dead_daemon(self.ray):  # the learner can complete its step; `mend` raises the error later
            return Future()
        if weights is not self.stored_weights:  # jobs with the same weights share them
            self.stored_weights, self.stored_weights_ref = weights, self.ray.put(weights)
        # A future instead of ray.get, during which a signal handler could not end the run.
        reference = self.workers[worker].make.remote(self.setup, step, self.stored_weights_ref)
        return reference.future()

    def ready(self, step: int) -> bytes | None:
        """Return the batch, or None if its job is still running or has failed."""
        return self.jobs[step].batch_or_none if step in self.jobs else None

    def _settle(self, step: int) -> None:
        """Replace the worker of a job if it died or takes too long, and repeat the job. Raise the job's error, or
        RuntimeError after MAX_ATTEMPTS.
        """
        job = self.jobs[step]
        errors = self.ray.exceptions
        try:
            result = job.future.result(0)
        except (errors.RayActorError, errors.WorkerCrashedError, errors.ObjectLostError):
            problem = "died"
        except errors.RayError as error:  # the worker could not read its input
            raise RuntimeError(f"rollouts of step {step}: {str(error).strip().splitlines()[-1]}") from None
        except TimeoutError:
            problem = f"did not return within collective_timeout={self.timeout:g} s"
        else:
            if isinstance(result, bytes):  # finished meanwhile
                return
            raise error_of(*result)
        if job.attempts == MAX_ATTEMPTS:
            raise RuntimeError(
                f"rollouts of step {step}: {MAX_ATTEMPTS} workers in turn took the job; the last one {problem}; "
                f"the logs of the workers are in {self.logs}"
            )
        job.attempts += 1
        self.say(f"warning: the worker that made the rollouts of step {step} {problem}; another worker repeats the job")
        self._replace(job.worker)

    def wait(self) -> None:
        running = [job.future for job in self.jobs.values() if not job.future.done()]
        wait(running, timeout=1.0, return_when=FIRST_COMPLETED)

    def mend(self, steps: Iterable[int]) -> None:
        """Replace the workers of these jobs that are lost, and repeat their jobs. Raise the error of a failed job, or
        RuntimeError after MAX_ATTEMPTS.
        """
        for step in sorted(steps):
            job = self.jobs[step]
            if job.batch_or_none is None:
                self.check_daemons(step)
                job.waiting_since = job.waiting_since or time.monotonic()
                if job.future.done() or time.monotonic() - job.waiting_since > self.timeout:
                    self._settle(step)

    def check_daemons(self, step: int) -> None:
        if (name := dead_daemon(self.ray)) is not None:
            raise RuntimeError(f"rollouts of step {step}: Ray's process {name} died, and its cluster with it")

    def _replace(self, worker: int) -> None:
        """Replace a worker by a new actor and send the new actor all unfinished jobs of the old one."""
        self.ray.kill(self.workers[worker])  # in case the worker hangs; has no effect on a dead worker
        self.workers[worker] = self.actor.remote()
        for step, job in sorted(self.jobs.items()):
            if job.worker == worker and job.batch_or_none is None:
                job.future, job.waiting_since = self._send_job(step, job.weights, worker), None

    @property
    def logs(self) -> str:
        return str(Path(self.ray._private.worker.global_worker.node.get_logs_dir_path()))

    def forget(self, step: int) -> None:
        self.jobs.pop(step, None)


def error_of(kind: str, text: str) -> Exception:
    """Rebuild a worker's error in this process. It keeps its type if that is ValueError, RuntimeError,
    FloatingPointError or OSError; of any other type it becomes a RuntimeError whose text begins with the type's name.
    """
    error_types = {
        error_type.__name__: error_type for error_type in (ValueError, RuntimeError, FloatingPointError, OSError)
    }
    return error_types[kind](text) if kind in error_types else RuntimeError(f"{kind}: {text}")


def check_copies(settings: Mapping[str, Any]) -> None:
    """Raise ValueError if the workers cannot get copies of a recipe's functions and data.

    Call it before Ray starts, because Ray would say so after the model is loaded, in thousands of characters.
    """
    from ray import cloudpickle

    with open(os.devnull, "wb") as sink:
        for name, value in settings.items():
            try:
                if name != "callbacks":
                    cloudpickle.dump(value, sink)
            except Exception as error:  # any exception, from the code of an object's class
                raise ValueError(refusal(name, value, error)) from None


def refusal(name: str, value: Any, error: BaseException | None) -> str:
    """Return the error for a setting that has no copy."""
    return (
        f"{name}={without_middle(repr(value), 160)} has no copy for workers: {error}; make what cannot be "
        "copied (a lock, a client) where it is first used, or set late=None"
    )


def ray_workers(recipe: Recipe) -> RayWorkerPool | None:
    """Start the pool of a run: join the cluster at RAY_ADDRESS or start one on this machine, reserve processors and
    GPUs, and start the workers. Return None if the recipe has no workers.

    Raises:
        ValueError: The cluster has too few free processors or GPUs, a setting cannot be copied to the workers, or Ray
            is missing. It is raised before any work.
    """
    if recipe.late is None:
        return None
    count = recipe.late.workers
    if find_spec("ray") is None:
        raise ValueError(f"late.workers={count} needs Ray: pip install -e '.[ray]', or set late=None")
    import ray

    check_copies(vars(recipe))
    device = torch.device("cpu") if parse_flag_from_env("ACCELERATE_USE_CPU") else find_device()
    if not ray.is_initialized():
        start_ray(ray, device)
    resources_per_worker = {"CPU": torch.get_num_threads(), "GPU": int(device.type != "cpu")}
    cluster_resources = ray.cluster_resources()
    has_enough = all(cluster_resources.get(name, 0) >= amount * count for name, amount in resources_per_worker.items())
    bundle = {name: amount for name, amount in resources_per_worker.items() if amount}
    placement_group = ray.util.placement_group([bundle] * count) if has_enough else None
    if placement_group is not None:  # the cluster may outlive the run
        run_exit_stack().callback(release, ray, placement_group)
    if placement_group is None or not placement_group.wait(CLUSTER_SECONDS):
        free_resources = ray.available_resources() if has_enough else cluster_resources
        free_text = ", ".join(f"{free_resources.get(name, 0):g} {name}" for name in bundle)
        amount = ", ".join(f"{amount} {name}" for name, amount in bundle.items())
        raise ValueError(
            f"late.workers={count} take {amount} each (as many processors as the learner has threads, and a GPU if "
            f"the learner has one; they must not be in use by other Ray jobs), and the cluster has {free_text} free: "
            "use fewer workers, fewer threads (OMP_NUM_THREADS), or more machines"
        )
    return RayWorkerPool(count, placement_group, device, timeout=recipe.limits.collective_timeout)


def start_ray(ray: ModuleType, device: torch.device) -> None:
    """Start Ray, without output on the screen. It is shut down when the run ends."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # With Ray's default niceness of 15, workers would get almost no time on cores that they share with the learner.
    os.environ.setdefault("RAY_worker_niceness", "0")
    address = os.environ.get("RAY_ADDRESS", "local")
    check_address(address)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if address == "local" and device.type == "cuda":  # the learners use the first GPUs
        ids = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        learners = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ids[learners:])
    # Ray's processes belong to this process's group. They must ignore the signals that a terminal or SLURM sends to the
    # group: if they died, Ray would block this process for a minute. The kernel kills them when this process ends.
    ignored_signals = {number for number in SIGNALS if number != signal.SIGINT}  # Ray blocks SIGINT itself
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, ignored_signals)
    try:
        with handlers_kept():  # Ray sets a handler for SIGTERM
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"late: Ray at RAY_ADDRESS={address!r} did not start: {reason}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        else:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    run_exit_stack().callback(shut_down, ray)


def dead_daemon(ray: ModuleType) -> str | None:
    """Return the name of a Ray process that this process started and that has died, or None.

    Call it before each call into Ray: without its raylet or its gcs_server, Ray ends this process without a message,
    immediately or after a minute.
    """
    processes_by_name = ray._private.worker.global_worker.node.all_processes
    names = ("raylet", "gcs_server")
    return next(
        (
            name
            for name in names
            for process_info in processes_by_name.get(name, [])
            if process_info.process.poll() is not None
        ),
        None,
    )


def release(ray: ModuleType, placement_group: Any) -> None:
    """Give the reserved processors back, unless Ray has died."""
    if dead_daemon(ray) is None:
        ray.util.remove_placement_group(placement_group)


def shut_down(ray: ModuleType) -> None:
    """Shut Ray down. If one of its processes has died, kill the others, and skip Ray's clean-up at exit."""
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
            f"late: nothing answers at RAY_ADDRESS={address!r} ({error}): start a cluster there (ray start "
            "--head), or unset RAY_ADDRESS"
        ) from None
