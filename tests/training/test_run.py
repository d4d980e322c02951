"""Checkpoints that are written while training goes on: the same ones, whole, whatever ends the run."""

import errno
import os
import signal
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from made_run import make_run
from repetitions import slow
from run_outputs import assert_same_weights, metrics_of
from safetensors.torch import load_file
from tiny_recipe import ONE_PUZZLE, SIZES, Wrapped, tiny_recipe

from dllm_rl import tiny_masked_lm
from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.groups import Late
from dllm_rl.models.lora_settings import Lora
from dllm_rl.monitoring import plots
from dllm_rl.monitoring.log import RunLog
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.hooks import record_update
from dllm_rl.training.saving import checkpoint_if_due
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")

PATIENCE = 600.0  # seconds after which what never comes is given up, the suite's limit


def small(directory, **changes):
    sizes = SIZES | {"hidden_size": 16, "num_layers": 1, "intermediate_size": 16}
    settings = {"model": partial(tiny_masked_lm, **sizes), "save_steps": 1, "learning_rate": 5e-3, "num_steps": 3}
    return tiny_recipe(directory, **settings | {"save_total_limit": 9, **ONE_PUZZLE, **changes})


def writing(monkeypatch, before):
    """Have `before(step)` called in the middle of each checkpoint's writing."""
    save = torch.save

    def patched(state, path):
        # In the main thread it is the rehearsal's.
        if threading.current_thread() is not threading.main_thread() and path.name == "optimizer.pt":
            before(int(path.parent.name.split("-")[1].split(".")[0]))
        save(state, path)

    monkeypatch.setattr(torch, "save", patched)


@pytest.fixture(autouse=True)
def no_thread_stays(monkeypatch):
    monkeypatch.setattr(plots, "plot", lambda directory: None)
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def contents(folder):
    tensors = {f"{path.name}: {k}": v for path in folder.rglob("*.safetensors") for k, v in load_file(path).items()}
    for number, moments in torch.load(folder / "optimizer.pt")["state"].items():
        tensors |= {f"{kind} of {number}": value for kind, value in moments.items()}
    return tensors


# Adapters are merged in the writer's thread, which the simulated CPU does not reach.
UNREACHED = pytest.mark.skipif("config.getoption('other_cpu')", reason="the writer's thread merges adapters")


@pytest.mark.parametrize(
    "changes", [slow({"num_iterations": 2}), pytest.param({"lora": Lora(r=2, dropout=0.1)}, marks=UNREACHED)]
)
def test_what_is_written_during_the_next_step_is_the_state_before_it(tmp_path, monkeypatch, changes):
    """Each is written when the step after it has changed the weights; a run goes on from it bit for bit."""
    changes = {"num_steps": 2, "train_batch_size": 2, **changes}
    train(small(tmp_path / "at once", **changes))
    written, turns, write = threading.Condition(), [0], RunLog.write

    def done(log, step, metrics):
        write(log, step, metrics)
        with written:
            turns[0] = step + 1
            written.notify()

    def wait(step):
        with written:
            assert step == 2 or written.wait_for(lambda: turns[0] > step, PATIENCE), "training did not go on"

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", done)
        writing(patch, wait)
        whole = train(small(tmp_path / "later", async_save=True, **changes))
    for step in (0, 1, 2):
        one, two = (contents(tmp_path / name / "checkpoints" / f"step-00000{step}") for name in ("at once", "later"))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), step
        checkpoint.check(tmp_path / "later" / "checkpoints" / f"step-00000{step}")
    assert whole["checkpoint"].endswith("step-000002")
    start = str(tmp_path / "later" / "checkpoints" / "step-000001")
    again = train(small(tmp_path / "later", async_save=True, resume_from_checkpoint=start, **changes))
    assert_same_weights(whole, again)
    assert metrics_of(tmp_path / "at once") == metrics_of(tmp_path / "later")


def full(step):
    if step == 1:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_of_the_writer_ends_the_run(tmp_path, monkeypatch):
    writing(monkeypatch, full)
    with pytest.raises(OSError, match=r"step-000001 was not saved: .*No space left"):
        train(small(tmp_path, async_save=True))
    # The last complete step is saved.
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [0, 2]
    assert not list((tmp_path / "checkpoints").glob(".step*"))


class Ending(Wrapped):
    """Sudoku that raises, or signals its process, at a completion of step 2."""

    def __init__(self, what):
        super().__init__(Sudoku(split="train", size=32))
        self.what, self.graded = what, 0

    def reward(self, problem, completion):
        self.graded += 1
        if self.graded == 1 + 16 + 4:  # the rehearsal's, the first step's
            self.what()
        return self.task.reward(problem, completion)


def fail():
    raise ZeroDivisionError("by zero")


@pytest.mark.parametrize(
    ("what", "error", "steps"),
    [(fail, Exception, [0, 1]), (partial(os.kill, os.getpid(), signal.SIGTERM), SystemExit, [0, 1, 2])],
)
@pytest.mark.repeated(first_only=True)
def test_an_error_and_a_signal_wait_for_what_is_being_written(tmp_path, monkeypatch, what, error, steps):
    """The first checkpoint's writing is held up until the step that ends the run."""
    ended = threading.Event()
    task = Ending(lambda: (ended.set(), what()))
    writing(monkeypatch, lambda step: step == 1 and (ended.wait(PATIENCE) or fail()))
    with pytest.raises(error):
        train(small(tmp_path, async_save=True, task=task, num_generations=4))
    assert ended.is_set()
    folders = checkpoint.list_checkpoints(tmp_path / "checkpoints")
    assert [step for step, _ in folders] == steps
    for _, folder in folders:
        checkpoint.check(folder)


def test_weights_without_a_copy_on_the_host_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"saves\.in_background=True cannot be combined with base_quantization='nf4'"):
        small(tmp_path, async_save=True, base_quantization="nf4", lora=Lora())
    with pytest.raises(ValueError, match=r"late=Late\(.*\) cannot be combined with base_quantization='int8', whose"):
        small(tmp_path, late=Late(), base_quantization="int8", lora=Lora())
    with pytest.raises(ValueError, match=r"warmup\.steps=2 trains all weights, and base_quantization='nf4' freezes"):
        small(tmp_path, sft_warmup_steps=2, base_quantization="nf4", lora=Lora())


def test_a_step_replaces_the_state_as_a_whole(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    before = TrainingState(step=3, version=6, dtype="float32", eval_before={"reward": 0.5}, recipe={})
    recipe = tiny_recipe(tmp_path, save_steps=10, num_steps=10)
    run = make_run(recipe=recipe, state=before, policy=SimpleNamespace(weights_version=8))
    record_update(run, 3, {})
    checkpoint_if_due(run, {})
    assert (run.state.step, run.state.version, run.state.eval_before) == (4, 8, {"reward": 0.5})
    assert (before.step, before.version) == (3, 6)
    assert run.log.entered == "" and run.saved is None and run.checkpoint == ""
