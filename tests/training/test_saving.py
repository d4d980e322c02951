"""What a run remembers of its saves."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dllm_rl.checkpoints.state import TrainingState
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


@pytest.mark.parametrize("during", [{}, {"state": "later"}, {"state": "later", "version": 4}])
def test_a_copy_during_which_a_step_ended_is_not_saved(monkeypatch, during):
    """The copy may hold weights of two steps, also where version and state agree again when it is made."""
    policy = SimpleNamespace(version=3, module=None)
    log = SimpleNamespace(entered="")
    writer = SimpleNamespace(alone=nullcontext(), wait=lambda: None)
    run = object.__new__(Run)
    state = TrainingState(step=3, version=3, dtype="float32", recipe={})
    run.__dict__.update(policy=policy, optimizer=None, log=log, writer=writer, state=state, saved=2)

    def copied(policy, optimizer):
        if "state" in during:
            run.state = replace(state, step=4, version=during.get("version", 3))
        policy.version = during.get("version", 3)
        return ()

    written = []
    monkeypatch.setattr(saving, "on_host", copied)
    monkeypatch.setattr(saving, "_prepared", lambda run, state: state)
    monkeypatch.setattr(saving, "_attempt", lambda run, step, write: written.append((step, write)))
    saving.save_alone(run)
    assert written == ([] if during else [(3, state)])
