"""The record of a run: its state is that of one step, whenever another thread looks."""

from types import SimpleNamespace

from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.training.run import Run
from dllm_rl.training.saving import checkpoint_if_due


def test_a_step_replaces_the_state_as_a_whole():
    nothing = lambda *_: 0  # noqa: E731
    recipe = SimpleNamespace(save_steps=10, num_steps=10)
    run = object.__new__(Run)
    before = TrainingState(step=3, version=6, dtype="float32", eval_before={"reward": 0.5}, recipe={})
    run.__dict__.update(
        recipe=recipe,
        accelerator=None,
        state=before,
        policy=SimpleNamespace(version=8),
        log=SimpleNamespace(entered="sync"),
        stop=SimpleNamespace(agreed=nothing),
        writer=SimpleNamespace(check=nothing),
    )
    checkpoint_if_due(run, 3)
    assert (run.state.step, run.state.version, run.state.eval_before) == (4, 8, {"reward": 0.5})
    assert (before.step, before.version) == (3, 6)
    assert run.log.entered == "" and run.saved is None and run.checkpoint == ""
