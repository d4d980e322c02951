"""Writes checkpoints: at once, or while training goes on."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dllm_rl.screen import escape_controls


class Writer:
    """Writes one checkpoint at a time: at once, or with `later` in a thread; `check` and `wait` raise its error."""

    def __init__(self, *, later: bool, group: Any = None) -> None:
        self.later = later
        self.group = group  # of the exchanges of several writing processes
        self.alone = threading.RLock()  # for a save by the main process alone
        self._thread: threading.Thread | None = None
        self._folder: Path | None = None
        self._error: Exception | None = None

    def run(self, work: Callable[[], Path | None]) -> None:
        """Start `work`; call `wait` for the previous one first."""
        if not self.later:
            self._folder = work()
            return
        self._thread = threading.Thread(target=self._in_thread, args=(work,), name="checkpoint")
        self._thread.start()

    def _in_thread(self, work: Callable[[], Path | None]) -> None:
        try:
            with torch.no_grad():
                self._folder = work()
        except Exception as error:  # of any kind: `check` raises it in the main thread
            self._error = error

    def check(self) -> None:
        if self._error is not None and not (self._thread and self._thread.is_alive()):
            error = self._error
            self._error = None  # raised once
            raise error

    def wait(self) -> Path | None:
        """Wait for the write; returns the last checkpoint, or None if none was written."""
        if self._thread is not None:
            self._thread.join()
        self.check()
        return self._folder

    def close(self) -> None:
        """Wait, and print an error that nothing has raised. For the end of a run, however it ends."""
        try:
            self.wait()
        except Exception as error:  # of any kind: the run is ending already
            print(f"error: the last checkpoint: {escape_controls(str(error))}", file=sys.stderr, flush=True)

    def gather(self, value: Any) -> list[Any]:
        said: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(said, value, group=self.group)
        return said
