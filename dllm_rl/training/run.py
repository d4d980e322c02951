"""The state of a run, and the writer of its checkpoints."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from dllm_rl.callbacks import RunControl
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.distributed.stop import Stop
from dllm_rl.models.base import Policy
from dllm_rl.models.rollout_engine import RolloutEngine
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.monitoring.log import RunLog
from dllm_rl.screen import escape_controls
from dllm_rl.step.context import StepContext, StepFeature
from dllm_rl.training.any_recipe import AnyRecipe
from dllm_rl.training.late_rollouts.schedule import AsyncRollouts

AnySettings = TypeVar("AnySettings", bound=AnyRecipe, covariant=True)  # Recipe, or the settings of SFT


class CheckpointWriter:
    """Writes one checkpoint at a time; with `in_thread`, in another thread, whose errors `check` and `wait` raise."""

    def __init__(self, *, in_thread: bool, group: Any = None) -> None:
        self.thread = ThreadPoolExecutor(1, "checkpoint") if in_thread else None
        self.group = group  # process group for the collectives of several writing processes
        self.main_only = threading.RLock()  # held while the main process saves without the other processes
        self._in_progress: Future[Path] | None = None
        self._folder: Path | None = None  # of the last write, until `wait` returns it

    def run(self, write: Callable[[], Path]) -> None:
        """Start a write. Call `wait` first, so that the previous write is complete."""
        if self.thread is None:
            self._folder = write()
        else:
            self._in_progress = self.thread.submit(torch.no_grad()(write))

    def check(self) -> None:
        """Raise the error of the last write, once, if the write has failed. Does not wait."""
        if self._in_progress is not None and self._in_progress.done():
            done, self._in_progress = self._in_progress, None
            self._folder = done.result()

    def wait(self) -> Path | None:
        """Wait for the write in progress; return its folder, or None if none was written since the last call."""
        if self._in_progress is not None:
            wait([self._in_progress])
        self.check()
        folder, self._folder = self._folder, None
        return folder

    def close(self) -> None:
        """Wait for the write in progress. Called when a run ends, also on errors: prints the write's error instead of
        raising it.
        """
        if self.thread is not None:
            self.thread.shutdown()
        try:
            self.check()
        except Exception as error:  # of any type: the run is ending already
            print(f"error: the last checkpoint: {escape_controls(str(error))}", file=sys.stderr, flush=True)

    def gather(self, value: object) -> list[Any]:
        """Return the value of every process. Collective: every writing process must call it."""
        gathered: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered


@dataclass(eq=False, kw_only=True)
class Run(Generic[AnySettings]):
    """State of a run of RL or SFT, from its start to its summary."""

    recipe: AnySettings
    accelerator: Accelerator
    policy: Policy
    rollout_policy: Policy
    log: RunLog
    step: StepContext | None = None  # of RL, like `engine`
    engine: RolloutEngine | None = None

    optimizer: torch.optim.Optimizer
    state: TrainingState  # replaced, never changed, so that another thread cannot read fields of two different steps
    stop: Stop
    writer: CheckpointWriter
    progress: Callable[..., None]  # shows a step's line on the screen
    async_rollouts: AsyncRollouts | None = None  # set if workers make the rollouts
    without_state: list[StepFeature] = field(default_factory=list)  # features whose `state` raised
    first_step: int = field(init=False)  # index of the first step that this process logs
    control: RunControl = field(init=False)  # what callbacks read, and their requests
    saved: int | None = None  # number of completed steps in the last checkpoint that this process wrote
    checkpoint: str = ""  # folder of the last checkpoint; before the first save, the one that the run resumed from

    @property
    def learner_samples(self) -> bool:
        """Whether the learner makes the rollouts itself, without a copy."""
        return self.rollout_policy is self.policy

    def __post_init__(self) -> None:
        self.first_step = self.state.logged_steps
        directory = Path(self.recipe.directory)
        # A resumed run continues metrics.jsonl; callbacks can read its earlier rows.
        rows = partial(current_rows, directory / "metrics.jsonl") if self.state.step else list
        self.control = RunControl(directory, self.state.step, self.recipe.num_steps, rows)
