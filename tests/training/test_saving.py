"""What a run remembers of its saves."""

from pathlib import Path
from types import SimpleNamespace

from dllm_rl.training import saving
from dllm_rl.training.run import Run


def test_a_save_that_failed_is_not_remembered_as_done():
    """A stop that finds the step remembered would end the run without writing it."""
    warnings: list[str] = []
    recipe, log = SimpleNamespace(on_save_error="continue"), SimpleNamespace(say=warnings.append)
    run = object.__new__(Run)
    run.__dict__.update(recipe=recipe, log=log)

    def full_disk():
        raise OSError(28, "No space left on device")

    assert saving._attempt(run, 3, full_disk) is None and run.saved is None
    assert warnings == ["warning: No space left on device"]
    assert saving._attempt(run, 4, lambda: Path("folder")) == Path("folder") and run.saved == 4
