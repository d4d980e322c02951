"""The CUDA device of a test: the real one under `pytest -m gpu`, the simulated one elsewhere."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from simulated_cuda import SimulatedCuda

REAL = torch.cuda.is_available()


class RealCuda:
    """The GPU that is here. Waits of the host are those that torch warns of in its synchronization debug mode."""

    def __init__(self) -> None:
        self.counts: dict[str, list[str]] = {}

    def __enter__(self) -> "RealCuda":
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
        self.counts.setdefault(name, []).extend(places)

    def waits(self, phase: str | None = None) -> int:
        return sum(len(places) for name, places in self.counts.items() if phase in (None, name))

    def report(self) -> str:
        return "\n".join(f"{name}: {place}" for name, places in self.counts.items() for place in places)


Cuda = RealCuda if REAL else SimulatedCuda
