"""The schedule 'first_ready': workers that are free take the newest weights, and a step takes a finished batch."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock

import torch

from dllm_rl.distributed.stop import run_exit_stack
from dllm_rl.files import read_json
from dllm_rl.recipe import Recipe
from dllm_rl.step.context import StepContext
from dllm_rl.training.late_rollouts.messages import deserialize_batch
from dllm_rl.training.late_rollouts.schedule import (
    ORDER_FILE,
    AsyncRollouts,
    PendingBatch,
    WorkerPool,
    file_names,
    is_of_recipe,
    read_pending_file,
)


@dataclass(eq=False)
class FirstReadyRollouts(AsyncRollouts):
    """Schedule of a run with rollout_schedule='first_ready'.

    A batch made with weights of version v must be trained on while the learner's version is at most v + K, K =
    max_staleness. Let the pending batches be in the order of their versions v_0, v_1, ..., and V the learner's. All of
    them can be trained on in time if V + i <= v_i + K for each i. Two rules keep this true:

    - A batch is started only if at most K are pending, counting the one that the learner trains on. Its weights are the
      newest, so that it is the last.
    - A finished batch is taken only if every older pending one can wait for one more step (`choose_batch`).

    The oldest pending batch may always be taken, so that the run never stands still.
    """

    weights: bytes = b""  # the newest, serialized
    version: int = 0  # of the newest weights
    numbers: list[int] = field(default_factory=list)  # of the batches to start, the next one last
    spare: list[int] = field(default_factory=list)  # begun before, but this run has fewer steps left
    next_number: int = 0  # the first number that no batch has had
    taken: int | None = None  # number of the batch that the learner trains on
    taken_step: int | None = None  # index of the step that trains on it
    lock: RLock = field(default_factory=RLock)  # the pool starts jobs from its threads, and a thread may save
    is_open: bool = True

    def _begin(self, steps_done: int, folder: Path | None, context: StepContext, weights: bytes) -> None:
        assert self.pool is not None, "only the main process has the pool"
        recipe = self.recipe
        self.pool.set_up(recipe, context)
        self.weights, self.version = weights, context.policy.weights_version
        num_batches = recipe.num_steps - steps_done
        made = read_made(folder, self.rank, recipe)
        for number, (version, data) in sorted(made.items(), key=lambda item: item[1][0]):
            is_in_time = self.version + len(self.pending) <= version + recipe.max_staleness
            if is_in_time and len(self.pending) < num_batches:  # else a setting was changed, and it is made again
                self.pending[number] = PendingBatch(b"", age=version, made=data)
        unfinished, next_number = read_order(folder, steps_done)
        # A checkpoint of 'in_order' has finished batches above `next_number`, with gaps.
        self.next_number = max([next_number, *(number + 1 for number in made)])
        new = range(next_number, next_number + num_batches)
        numbers = sorted({*unfinished, *made, *new} - self.pending.keys())
        count = num_batches - len(self.pending)
        self.numbers = numbers[:count][::-1]
        self.spare = [number for number in numbers[count:] if number < self.next_number]
        self.pool.when_free(self.start_jobs)
        run_exit_stack().callback(self._close)
        self.start_jobs()

    def start_jobs(self) -> None:
        """Give every free worker a batch to make, with the newest weights, as far as the first rule allows."""
        assert self.pool is not None, "only the main process submits"
        with self.lock:
            while (
                self.is_open
                and self.numbers
                and len(self.pending) <= self.recipe.max_staleness
                and self.pool.num_free()
            ):
                self.submit(self.numbers[-1], self.weights, age=self.version)
                self.next_number = max(self.next_number, self.numbers.pop() + 1)

    def _close(self) -> None:
        """Start no more jobs: the run ends."""
        with self.lock:
            self.is_open = False

    def _choose(self, step: int, pool: WorkerPool) -> tuple[int, bytes] | None:
        with self.lock:
            pool.mend([number for number, batch in self.pending.items() if batch.made is None])
            self.start_jobs()
            versions = {number: batch.age for number, batch in self.pending.items()}
            made = {number: batch for number in self.pending if (batch := self._made(number)) is not None}
            number = choose_batch(versions, made.__contains__, self.version, self.recipe.max_staleness)
            if number is None:
                return None
            self.taken, self.taken_step = number, step
            return number, made[number]

    def _submit_next(self, step: int, weights: bytes, pool: WorkerPool) -> None:
        with self.lock:
            assert self.taken is not None, "a step has taken a batch"
            pool.forget(self.taken)
            del self.pending[self.taken]
            self.weights, self.version = weights, self.context.policy.weights_version
            self.start_jobs()

    def files(self, step: int) -> dict[str, bytes]:
        """Return the files with which a checkpoint after `step` steps stores the finished batches, and the numbers of
        those to make again, with the checkpoint's weights.
        """
        with self.lock:
            # A run that failed between the update and `publish` has trained on the taken batch already.
            done = {self.taken} if self.taken_step is not None and step > self.taken_step else set()
            made = {number: self._made(number) for number in self.pending.keys() - done}
            not_restarted = [number for number in self.numbers[::-1] if number < self.next_number] + self.spare
            next_number = self.next_number
        unfinished = [number for number, batch in made.items() if batch is None] + not_restarted
        order = {"unfinished": unfinished, "next": next_number}
        files = {file_names(number)[0]: batch for number, batch in made.items() if batch is not None}
        return {**files, ORDER_FILE: json.dumps(order).encode()}


def choose_batch(
    versions: Mapping[int, int], is_made: Callable[[int], bool], version: int, max_staleness: int
) -> int | None:
    """Return the number of the oldest finished batch, if every older pending one can wait for one more step; else None.

    `versions` has the version of each pending batch's weights by the batch's number, the oldest first; `version` is the
    learner's.
    """
    for place, (number, made_with) in enumerate(versions.items()):
        if is_made(number):
            return number
        if version + place >= made_with + max_staleness:
            return None
    return None


def read_made(folder: Path | None, rank: Callable | None, recipe: Recipe) -> dict[int, tuple[int, bytes]]:
    """Read a checkpoint's finished batches: the version of the weights, and the batch, by the batch's number. `rank` is
    that of the recipe's sampler. Batches that are not of this recipe, because a setting was changed, are left out.
    """
    found: dict[int, tuple[int, bytes]] = {}
    if folder is None:
        return found
    for path in (folder / "rollouts").glob("*.safetensors"):
        name, _, kind = path.name.partition(".")
        data = read_pending_file(folder, f"rollouts/{path.name}") if kind == "safetensors" else None
        if data is not None:  # `kind` is "weights.safetensors" in a checkpoint of 'in_order'
            (samples, _, _), _ = deserialize_batch(data, rank, torch.device("cpu"))
            if is_of_recipe(samples, recipe, folder):
                found[int(name)] = (samples.rollout.weights_version, data)
    return found


def read_order(folder: Path | None, steps_done: int) -> tuple[list[int], int]:
    """Read the numbers of a checkpoint's unfinished batches, and the first number that no batch has had.

    Raises:
        ValueError: The file is damaged.
    """
    if folder is None or not (folder / ORDER_FILE).exists():  # a new run, or a checkpoint of 'in_order'
        return [], steps_done
    match read_json(folder / ORDER_FILE):
        case {"unfinished": [*unfinished], "next": int(next_number)} if all(type(x) is int for x in unfinished):
            return unfinished, next_number
    raise ValueError(f"{folder}: {ORDER_FILE} is damaged; take an earlier checkpoint")
