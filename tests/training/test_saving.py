"""What a run remembers of its saves."""

from pathlib import Path
from types import SimpleNamespace

from dllm_rl.training import saving


def test_a_save_that_failed_is_not_remembered_as_done(monkeypatch):
    """A stop that finds the step remembered would end the run without writing it. None: the save failed."""
    run = SimpleNamespace(recipe=None, log=None, history={})
    monkeypatch.setattr(saving, "attempt", lambda recipe, log, write: write())
    assert saving._attempt(run, 3, lambda: None) is None and run.history == {}
    assert saving._attempt(run, 4, lambda: Path("folder")) == Path("folder") and run.history == {"saved": 4}
